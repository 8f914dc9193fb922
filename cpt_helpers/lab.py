"""JupyterLab on working copies of the notebooks: ``make lab``, ``python -m cpt_helpers.lab``.

Outputs and edits stay on the storage, next to the runs, and the checkout stays clean.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

from .errors import CptError
from .run import LAB, PROJECT, storage_root, write_json
from .setup.assets import sha256

_MADE_FROM = ".sources.json"  # beside the copies: the sha256 of the source each was made from


def working_copies(storage: Path) -> Path:
    """Copies the notebooks to the storage; copies of the same sources keep their outputs and edits.

    Where a source has changed since, as after ``git pull``, the old copy is renamed by its date.

    Args:
        storage: The folder of all runs.

    Returns:
        The folder of the copies.
    """
    folder = storage / LAB
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / _MADE_FROM
    made_from = json.loads(record.read_text("utf-8")) if record.is_file() else {}
    for source in sorted((PROJECT / "notebooks").glob("*.ipynb")):
        copy, digest = folder / source.name, sha256(source)
        if copy.is_file() and made_from.get(source.name) == digest:
            continue
        if copy.is_file():
            written = time.strftime("%Y-%m-%d-%H%M%S", time.localtime(copy.stat().st_mtime))
            older = copy.rename(folder / f"{source.stem}.{written}.ipynb")
            print(f"{source.name} has changed in the project; your copy is now {older.name}")
        shutil.copyfile(source, copy)
        made_from[source.name] = digest
    write_json(record, made_from)
    return folder


def main(arguments: list[str]) -> int:
    """Starts JupyterLab in place of this process.

    Args:
        arguments: The storage (empty: the default one), then JupyterLab's own arguments.
    """
    try:
        storage = storage_root(arguments[0] if arguments else None)
    except CptError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(f"the notebooks are copied to {working_copies(storage)}, and run there", flush=True)
    os.environ["CPT_STORAGE"] = str(storage)  # the kernels work in a folder of the storage
    command = [sys.executable, "-m", "jupyter", "lab", "--ip=127.0.0.1"]
    command += [
        f"--ServerApp.root_dir={storage}",
        f"--LabApp.default_url=/lab/tree/{LAB}/01_setup.ipynb",
    ]
    os.execv(sys.executable, [*command, *arguments[1:]])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
