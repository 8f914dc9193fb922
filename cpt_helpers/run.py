"""One run of the walkthrough: the folder it owns on the storage, and what stands in it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ParameterError, RunExistsError, StepError, StorageError

PROJECT = Path(__file__).resolve().parent.parent
STEPS = ("01_setup", "02_data", "03_config", "04_train", "05_checkpoints", "06_export")
CLUSTER_STORAGE = Path("/mnt/cluster_storage")  # shared by all nodes of an Anyscale cluster
LAB = "lab"  # the working copies of the notebooks
# Next to the runs, on the same storage. dataset_info.json is the registry of the corpora.
SHARED = ("models", "corpora", "tokenised", "mlflow", "adapters", "dataset_info.json", LAB)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Run:
    """Everything one run owns, all of it in ``<storage>/<name>/``.

    Attributes:
        name: The run's name, also Ray's ``ray_run_name``.
        storage: Absolute path every node sees; Ray's ``ray_storage_path``.
    """

    name: str
    storage: Path

    @classmethod
    def open(cls, name: str, storage: str | os.PathLike | None = None) -> Run:
        """Names a run and makes sure its storage can be written.

        Raises:
            ParameterError: The name is not one path component, is shared, or is a file's.
            StorageError: The storage does not exist, is no folder, or cannot be written.
        """
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name.lower() in SHARED:
            raise ParameterError(
                f"RUN_NAME {name!r} cannot name a run",
                expected="up to 64 letters, digits, '.', '_' or '-', starting with a letter or "
                f"digit, and none of {', '.join(SHARED)} (shared by all runs)",
                do="choose another name",
            )
        run = cls(name, storage_root(storage))
        if run.folder.exists() and not run.folder.is_dir():
            raise ParameterError(
                f"RUN_NAME {name!r} cannot name a run: a file has this name",
                where=run.folder,
                expected="a new name, or the folder of a run",
                do="choose another name",
            )
        return run

    @property
    def folder(self) -> Path:
        return self.storage / self.name

    @property
    def config_dir(self) -> Path:
        """The resolved recipe and its DeepSpeed file, as the workers read them."""
        return self.folder / "config"

    @property
    def train_yaml(self) -> Path:
        return self.config_dir / "train.yaml"

    @property
    def output(self) -> Path:
        """LLaMA-Factory's ``output_dir``: the final model and the trainer's own logs."""
        return self.folder / "output"

    @property
    def logs(self) -> Path:
        """What each rank printed, ``rank-<n>.log``."""
        return self.folder / "logs"

    @property
    def metrics(self) -> Path:
        """Rank 0's events, one JSON object a line: each start, step, eval, save, end."""
        return self.folder / "metrics.jsonl"

    @property
    def export(self) -> Path:
        return self.folder / "export"

    @property
    def notebooks(self) -> Path:
        """The executed copies of the notebooks."""
        return self.folder / "notebooks"

    @property
    def figures(self) -> Path:
        return self.folder / "figures"

    @property
    def results_json(self) -> Path:
        return self.folder / "results.json"

    @property
    def mlflow_db(self) -> Path:
        return self.storage / "mlflow" / "mlflow.db"

    def step_json(self, step: str) -> Path:
        return self.folder / "results" / f"{step}.json"

    def read_step(self, step: str) -> dict[str, Any]:
        """What a step recorded.

        Raises:
            StepError: The step has not been run for this run.
        """
        path = self.step_json(step)
        if not path.is_file():
            raise StepError(
                f"{step} has not been run for the run '{self.name}'",
                where=f"no {path}",
                expected=f"the results of {step}",
                do=f"run notebooks/{step}.ipynb with RUN_NAME={self.name}, or all with `make run`",
            )
        return json.loads(path.read_text("utf-8"))

    def results(self) -> dict[str, Any]:
        """All steps' results, merged; empty before the first step."""
        return json.loads(self.results_json.read_text()) if self.results_json.is_file() else {}

    def events(self) -> list[dict[str, Any]]:
        """The training's events so far, oldest first; a resumed run's steps appear once."""
        return list(_read_events(self.metrics))

    @property
    def state(self) -> str:
        """``"new"``, ``"started"`` or ``"complete"``."""
        events = self.events()
        if not events:
            return "new"
        return "complete" if events[-1]["event"] == "end" else "started"

    def checkpoint_bytes(self) -> int:
        """Bytes of its checkpoints, finished or not; a resumed run has that room already."""
        folders = [*self.folder.glob("TorchTrainer_*/checkpoint_*")]
        folders += self.output.glob("checkpoint-*")
        return sum(f.stat().st_size for p in folders for f in p.rglob("*") if f.is_file())

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keeps the run to this process while the block runs: two trainings would mix.

        Raises:
            RunExistsError: Another process is training it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / ".lock"
        with path.open("a+", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise RunExistsError(
                    f"the run '{self.name}' is being trained by another process",
                    where=f"{path}: {lock.read().strip() or 'it does not say which'}",
                    do="wait for it, stop it, or choose another RUN_NAME",
                ) from None
            except OSError:  # a file system without locks: go on, as nothing can be known there
                pass
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            lock.flush()
            yield

    def record(self, step: str, values: Mapping[str, Any]) -> None:
        """Writes a step's results and merges all steps' into ``results.json``."""
        write_json(self.step_json(step), values)
        merged: dict[str, Any] = {"run": self.name}
        for name in STEPS:
            if self.step_json(name).is_file():
                recorded = json.loads(self.step_json(name).read_text("utf-8"))
                _merge(merged, {k: v for k, v in recorded.items() if k != "parameters"})
        write_json(self.results_json, merged)


def storage_root(storage: str | os.PathLike | None = None) -> Path:
    """The storage: the argument, else ``CPT_STORAGE``, else ``/mnt/cluster_storage``, else local.

    Raises:
        StorageError: It is remote, cannot be created, or cannot be written.
    """
    given = os.fspath(storage) if storage else os.environ.get("CPT_STORAGE", "")
    if "://" in given:
        raise StorageError(
            f"the storage {given} is not a path",
            expected="a folder that every node of the cluster sees, such as /mnt/cluster_storage",
            do="mount the object storage, or give a shared folder",
        )
    if given:
        root = Path(given).expanduser().absolute()
    elif CLUSTER_STORAGE.is_dir() and os.access(CLUSTER_STORAGE, os.W_OK):
        root = CLUSTER_STORAGE
    else:  # the same folder for JupyterLab, which works in notebooks/, and for `make run`
        here = Path.cwd()
        root = (PROJECT if here == PROJECT / "notebooks" else here) / "cluster_storage"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise StorageError(
            f"the storage cannot be written: {error.strerror}",
            where=root,
            expected="a folder this user may write",
            do="give another with STORAGE or CPT_STORAGE, or change its permissions",
        ) from None
    return root


def write_json(path: Path, values: Any) -> None:
    """Writes JSON in one piece: a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")
    part.replace(path)


def _read_events(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    events: list[dict[str, Any]] = []
    for line in path.read_text("utf-8").splitlines():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:  # the line being written this moment, or at a crash
            continue
        if event["event"] == "start":  # a resumed run goes back to its checkpoint's step
            events = [
                e
                for e in events
                if e["event"] in ("start", "diverged") or 0 < event["step"] >= e["step"]
            ]
        events.append(event)
    yield from events


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = json.loads(json.dumps(value))


class in_one_piece:
    """A folder that is there whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> Path:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.new = Path(
            tempfile.mkdtemp(dir=self.folder.parent, prefix=f".{self.folder.name[:40]}.")
        )
        return self.new

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None and not self.folder.exists():
                self.new.chmod(0o755)
                self.new.rename(self.folder)
        finally:
            shutil.rmtree(self.new, ignore_errors=True)
