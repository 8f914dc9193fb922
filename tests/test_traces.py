"""The libraries write no files next to the storage, and print no useless warnings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TRACKED = """
import sys
from pathlib import Path
from cpt_helpers.export import model_registry
from cpt_helpers.train import tracking
from cpt_helpers.recipes import Recipe
from cpt_helpers.run import Run
run = Run.open("tracked", sys.argv[1])
args = Recipe({"report_to": "mlflow", "dataset": "news", "model_name_or_path": "base"})
exported = {"path": str(run.storage / "export")}
if sys.argv[2] == "train":
    with tracking.mirrored(run, args):
        pass
else:
    tracking.add_export(run, args, exported)
    print("version", model_registry.register(run, args, exported))
    print("again", model_registry.registered(f"sqlite:///{run.mlflow_db}", run.name)[1]["cpt.run"])
"""
FORKED = """
import sys
from cpt_helpers.setup import assets, cluster
from cpt_helpers.data import packing
tokenizer = assets.tokenizer_of(sys.argv[1])
packing.pack(["some text " * 50] * 200, tokenizer, 64)
with cluster.ray_cluster() as ray:
    print(len(ray.nodes()), "node")
"""


def printed(code: str, *arguments: object, cwd: Path, **variables: str) -> tuple[str, str]:
    """Runs code in a new process; returns its standard output and standard error."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        cwd=cwd,
        env={k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"} | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, done.stderr


def test_mlflow_writes_to_the_storage_only_and_prints_no_migrations(tmp_path: Path) -> None:
    """In two processes, as notebooks 04 and 06: each opens the database anew."""
    here = tmp_path / "here"
    here.mkdir()
    assert printed(TRACKED, tmp_path / "storage", "train", cwd=here) == ("", "")
    (tmp_path / "storage" / "export").mkdir()
    output = printed(TRACKED, tmp_path / "storage", "export", cwd=here)
    assert output == ("version 1\nagain tracked\n", "")
    assert list(here.iterdir()) == []


def test_starting_ray_after_tokenising_prints_no_warning(tiny_gemma3: Path, tmp_path: Path) -> None:
    assert printed(FORKED, tiny_gemma3, cwd=tmp_path, RAY_ADDRESS="") == ("1 node\n", "")
