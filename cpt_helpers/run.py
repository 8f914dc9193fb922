"""One run of the walkthrough: its folder on the storage and the files in it."""

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
# Names next to the runs on the storage. dataset_info.json is the registry of the corpora.
SHARED = ("models", "corpora", "tokenised", "mlflow", "adapters", "dataset_info.json", LAB)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class _Inside:
    """A path in the folder of a run."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __get__(self, run: Run, owner: type[Run]) -> Path:
        return run.folder / self.path


@dataclass(frozen=True)
class Run:
    """The files of one run, all of them in ``<storage>/<name>/``.

    Attributes:
        name: The run's name, also Ray's ``ray_run_name``.
        storage: Absolute path that every node sees; Ray's ``ray_storage_path``.
    """

    name: str
    storage: Path

    @classmethod
    def open(cls, name: str, storage: str | os.PathLike | None = None) -> Run:
        """Validates the name of a run and checks that its storage can be written.

        Raises:
            ParameterError: The name is no single path component, is reserved, or is a file's.
            StorageError: The storage does not exist, is not a folder, or cannot be written.
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
                do="choose another name",
            )
        return run

    @property
    def folder(self) -> Path:
        return self.storage / self.name

    config_dir = _Inside("config")  # the resolved recipe and its DeepSpeed file
    train_yaml = _Inside("config/train.yaml")
    output = _Inside("output")  # LLaMA-Factory's output_dir: the final model, the trainer's logs
    logs = _Inside("logs")  # the output of each rank, rank-<n>.log
    metrics = _Inside("metrics.jsonl")  # events: start, step, eval, save, end, diverged
    export = _Inside("export")
    notebooks = _Inside("notebooks")  # the executed copies
    figures = _Inside("figures")
    results_json = _Inside("results.json")

    @property
    def mlflow_db(self) -> Path:
        return self.storage / "mlflow" / "mlflow.db"

    def step_json(self, step: str) -> Path:
        return self.folder / "results" / f"{step}.json"

    def read_step(self, step: str) -> dict[str, Any]:
        """Returns the results that a step recorded.

        Raises:
            StepError: The step has not been run for this run, or its record is damaged.
        """
        path = self.step_json(step)
        do = f"run notebooks/{step}.ipynb with RUN_NAME={self.name}, or all with `make run`"
        if not path.is_file():
            raise StepError(
                f"{step} has not been run for the run '{self.name}'",
                where=f"{path} does not exist",
                do=do,
            )
        return _read_record(path, do)

    def results(self) -> dict[str, Any]:
        """Returns the merged results of all steps; empty before the first step.

        Raises:
            StepError: The record is damaged.
        """
        path = self.results_json
        return _read_record(path, "run a notebook of this run again") if path.is_file() else {}

    def events(self) -> list[dict[str, Any]]:
        """Returns the events of the training, oldest first; each step of a resumed run once."""
        events: list[dict[str, Any]] = []
        lines = self.metrics.read_text("utf-8").splitlines() if self.metrics.is_file() else []
        for line in lines:
            try:
                event = json.loads(line)
            except json.JSONDecodeError:  # an incomplete line, at a crash or while it is written
                continue
            if event["event"] == "start":  # it repeats the steps after its checkpoint
                events = [
                    e
                    for e in events
                    if e["event"] in ("start", "diverged") or 0 < event["step"] >= e["step"]
                ]
            events.append(event)
        return events

    @property
    def state(self) -> str:
        """``"new"``, ``"started"`` or ``"complete"``."""
        events = self.events()
        if not events:
            return "new"
        return "complete" if events[-1]["event"] == "end" else "started"

    def checkpoint_bytes(self) -> int:
        """Returns the size of all checkpoints, complete or not, which a resumed run reuses."""
        folders = [*self.folder.glob("TorchTrainer_*/checkpoint_*")]
        folders += self.output.glob("checkpoint-*")
        return sum(f.stat().st_size for p in folders for f in p.rglob("*") if f.is_file())

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Locks the run for this process while the block runs.

        Raises:
            RunExistsError: Another process is training the run.
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
                    where=f"{path}: {lock.read().strip() or 'unknown process'}",
                    do="wait for it, stop it, or choose another RUN_NAME",
                ) from None
            except OSError:  # a file system without locks
                pass
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            lock.flush()
            yield

    def record(self, step: str, values: Mapping[str, Any]) -> None:
        """Writes the results of a step, and the merged results of all steps."""
        write_json(self.step_json(step), values)
        merged: dict[str, Any] = {"run": self.name}
        for name in STEPS:
            if self.step_json(name).is_file():
                recorded = self.read_step(name)
                _merge(merged, {k: v for k, v in recorded.items() if k != "parameters"})
        write_json(self.results_json, merged)


def storage_root(storage: str | os.PathLike | None = None) -> Path:
    """Returns the storage: the argument, ``CPT_STORAGE``, ``/mnt/cluster_storage``, or local.

    Raises:
        StorageError: It is remote, cannot be created, or cannot be written.
    """
    given = os.fspath(storage) if storage else os.environ.get("CPT_STORAGE", "")
    if "://" in given:
        raise StorageError(
            f"the storage {given} is not a path",
            expected="a folder that every node of the cluster sees, such as /mnt/cluster_storage",
            do="mount the object storage, or choose a shared folder",
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
            do="choose another with STORAGE or CPT_STORAGE, or change its permissions",
        ) from None
    return root


def write_json(path: Path, values: Any) -> None:
    """Writes JSON atomically: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")
    part.replace(path)


@contextlib.contextmanager
def in_one_piece(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder, which is renamed to ``folder`` if the block succeeds.

    A folder that another process has written in the meantime is kept.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name[:40]}."))
    try:
        yield new
        if not folder.exists():
            new.chmod(0o755)
            new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _read_record(path: Path, do: str) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text("utf-8"))
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise StepError(f"{path.name} is not a record of results", where=path, do=do)
    return record


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = json.loads(json.dumps(value))
