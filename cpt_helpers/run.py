"""One run of the walkthrough: the folder it owns, its steps, and what it came to."""

from __future__ import annotations

import ast
import contextlib
import fcntl
import json
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import ParameterError, RunExistsError, StepError, StorageError, nearest

PROJECT = Path(__file__).resolve().parent.parent
STEPS = ("01_setup", "02_data", "03_config", "04_train", "05_checkpoints", "06_export")
CLUSTER_STORAGE = Path("/mnt/cluster_storage")  # shared by all nodes of an Anyscale cluster
_SHARED_FOLDERS = ("models", "corpora", "mlflow")  # beside the runs, on the same storage
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# These decide what a run trains; the rest of the parameters only decide what is shown.
_DEFINING = (
    "TRAIN_CONFIG",
    "CORPUS",
    "TEXT_COLUMN",
    "MAX_SAMPLES",
    "TOLERATE",
    "CLEAN",
    "REPLAY",
    "EPOCHS",
    "OVERRIDES",
)


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
            ParameterError: The name is not one path component, or belongs to a shared folder.
            StorageError: The storage does not exist, is no folder, or cannot be written.
        """
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in _SHARED_FOLDERS:
            raise ParameterError(
                f"RUN_NAME {name!r} cannot name a run",
                expected="up to 64 letters, digits, '.', '_' or '-', starting with a letter or "
                f"digit, and none of {', '.join(_SHARED_FOLDERS)} (folders the runs share)",
                do="choose another name",
            )
        return cls(name, storage_root(storage))

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


@dataclass
class Step:
    """One notebook at work: made by :func:`begin`, ended by :meth:`finish`."""

    name: str
    run: Run
    parameters: dict[str, Any]
    _started: float = field(default_factory=time.monotonic)

    def finish(self, results: Mapping[str, Any], checks: Mapping[str, bool]) -> None:
        """Holds the step to its promises, then records what it came to.

        Args:
            results: What to keep, merged with the other steps' into ``results.json``.
            checks: Each promise, and whether it was kept.

        Raises:
            StepError: Some promise was not kept; the results are not recorded.
        """
        for promise, kept in checks.items():
            print(("✓ " if kept else "✗ ") + promise)
        broken = [promise for promise, kept in checks.items() if not kept]
        if broken:
            raise StepError(
                f"{self.name} did not come to what it promised: {'; '.join(broken)}",
                where=self.run.folder,
                do="see «If it fails» at the end of the notebook",
            )
        seconds = round(time.monotonic() - self._started, 1)
        timed = {"notebooks": {self.name: {"seconds": seconds}}}
        self.run.record(self.name, {"parameters": self.parameters, **results, **timed})
        print(f"recorded in {self.run.step_json(self.name)} ({seconds:.0f} s)")


def begin(step: str, *, needs: str | None = None, **parameters: Any) -> Step:
    """Opens a step: refuses unknown parameters, a missing predecessor, and a run that is another's.

    Args:
        step: The notebook's name, ``"04_train"``.
        needs: The step that must have been run before.
        **parameters: Every parameter of the notebook by its own name, ``RUN_NAME`` among them.

    Raises:
        ParameterError: A parameter is unknown or of the wrong type.
        StepError: The step before has not been run.
        RunExistsError: This run has been trained with other settings.
    """
    _refuse_unknown(step, parameters)
    name, storage = parameters["RUN_NAME"], parameters.get("STORAGE")
    run = Run.open(name, storage)
    defining = defining_parameters(parameters)
    if needs:
        run.read_step(needs)
    refuse_other_settings(run, step, defining)
    return Step(step, run, defining)


def defining_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a step's parameters that decide what is trained, in one form to compare."""
    defining = {key: parameters[key] for key in _DEFINING if key in parameters}
    if "OVERRIDES" in defining:
        defining["OVERRIDES"] = as_overrides(defining["OVERRIDES"])
    from .checks import has_token

    for key, value in defining.items():
        if has_token(value):
            raise ParameterError(
                f"{key} holds a token",
                expected="secrets in the environment only: parameters stand in notebooks",
                do="`export HF_TOKEN=…` before starting, and take it out of the parameter",
            )
    return defining


def refuse_other_settings(run: Run, step: str, defining: Mapping[str, Any]) -> None:
    """A run that has begun to train keeps its settings.

    Raises:
        RunExistsError: A step of it was recorded with other ones.
    """
    if run.state == "new" or not run.step_json(step).is_file():
        return
    before = run.read_step(step)["parameters"]
    changed = [key for key, value in defining.items() if before.get(key) != value]
    if changed == ["OVERRIDES"] and run.state == "started":
        old, new = before["OVERRIDES"], defining["OVERRIDES"]
        from .config import MAY_CHANGE

        if {k for k in old.keys() | new.keys() if old.get(k) != new.get(k)} <= MAY_CHANGE:
            return  # 03_config looks closer
    if changed:
        raise RunExistsError(
            f"the run '{run.name}' has been trained with other settings: "
            + ", ".join(f"{k} was {before.get(k)!r}, is now {defining[k]!r}" for k in changed),
            where=run.folder,
            expected="the same settings (to look at it again or resume it), or a new run",
            do="choose another RUN_NAME, or move that folder away; nothing was changed",
        )


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


def as_overrides(overrides: Any) -> dict[str, Any]:
    """OVERRIDES as a dict; a string (papermill's ``-p``) is read as YAML.

    Raises:
        ParameterError: It is neither a dict nor YAML of one.
    """
    if isinstance(overrides, str):
        import yaml

        with contextlib.suppress(yaml.YAMLError):
            overrides = yaml.safe_load(overrides)
    overrides = {} if overrides in (None, "") else overrides
    if not isinstance(overrides, dict) or not all(isinstance(key, str) for key in overrides):
        raise ParameterError(
            f"OVERRIDES is {overrides!r}",
            expected="a dict of LLaMA-Factory keys, such as {'max_steps': 10}",
            do='in papermill: -y "OVERRIDES: {max_steps: 10}"',
        )
    return overrides


def write_json(path: Path, values: Any) -> None:
    """Writes JSON in one piece: a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")
    part.replace(path)


def _refuse_unknown(step: str, parameters: Mapping[str, Any]) -> None:
    """Papermill only warns of a parameter a notebook does not have; here it is an error."""
    for key in ("RUN_NAME", "STORAGE", "TRAIN_CONFIG", "TEXT_COLUMN"):
        value = parameters.get(key)
        if value is not None and not isinstance(value, str):
            raise ParameterError(
                f"{key} is {value!r}", where=step, expected="a string", do=f"quote it: {key}='…'"
            )
    try:
        from IPython import get_ipython
    except ImportError:
        return
    shell = get_ipython()
    if shell is None:
        return
    given = {name for name in shell.user_ns if name.isupper() and not name.startswith("_")}
    for cell in shell.user_ns.get("In", []):
        if cell.startswith("# Parameters\n"):  # the cell papermill injects
            for node in ast.walk(ast.parse(cell)):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    given.add(node.id)
    for name in sorted(given - set(parameters)):
        raise ParameterError(
            f"unknown parameter {name}",
            where=f"notebooks/{step}.ipynb",
            expected=f"one of {', '.join(parameters)} ({nearest(name, parameters)})",
            do="correct the name or leave it out",
        )


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
            events = [e for e in events if e["event"] == "start" or 0 < event["step"] >= e["step"]]
        events.append(event)
    yield from events


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = json.loads(json.dumps(value))
