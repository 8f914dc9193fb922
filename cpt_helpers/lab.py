"""JupyterLab on copies of the notebooks: ``make lab``, ``python -m cpt_helpers lab``.

Outputs and edits stay on the storage, next to the runs. The checkout stays clean.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from .run import LAB, PROJECT, storage_root


def working_copies(storage: Path) -> Path:
    """Copies the notebooks to the storage, keeps copies of unchanged sources; returns the folder.

    If a source has changed since, as after ``git pull``, the old copy is renamed to its date.
    """
    folder = storage / LAB
    originals = folder / ".sources"  # each source as it was when its copy was made
    originals.mkdir(parents=True, exist_ok=True)
    for source in sorted((PROJECT / "notebooks").glob("*.ipynb")):
        copy, original = folder / source.name, originals / source.name
        if copy.is_file():
            if original.is_file() and original.read_bytes() == source.read_bytes():
                continue
            written = time.strftime("%Y-%m-%d-%H%M%S", time.localtime(copy.stat().st_mtime))
            older = copy.rename(folder / f"{source.stem}.{written}.ipynb")
            print(f"{source.name} has changed in the project; your copy is now {older.name}")
        shutil.copyfile(source, copy)
        shutil.copyfile(source, original)
    return folder


def start(arguments: Any) -> int:
    """``python -m cpt_helpers lab``: replaces this process by JupyterLab."""
    storage = storage_root(arguments.storage)
    print(f"the copies of the notebooks are in {working_copies(storage)}", flush=True)
    os.environ["CPT_STORAGE"] = str(storage)  # the kernels work in a folder of the storage
    command = [
        *(sys.executable, "-m", "jupyter", "lab", "--ip=127.0.0.1"),
        f"--ServerApp.root_dir={storage}",
        f"--LabApp.default_url=/lab/tree/{LAB}/01_setup.ipynb",
    ]
    os.execv(sys.executable, [*command, *arguments.jupyter])
