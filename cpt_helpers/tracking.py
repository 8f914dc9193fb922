"""MLflow: an embedded store on the storage, or the server the environment names."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import subprocess
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from . import curves, show
from .assets import sha256
from .checks import worker_variables
from .config import held_out_of
from .errors import TrackingError
from .run import PROJECT, Run
from .streams import hushed

_MARK = "cpt.run"  # the tag by which a run is known again
_SEND_SECONDS = 2.0
VARIABLES = b"cpt_helpers"  # namespace in the key-value store of Ray's head, which is in memory


def worker_environment(run: Run, args: dict[str, Any]) -> dict[str, str]:
    """Variables the workers need: where MLflow's store is, and the secrets of this process.

    They reach the workers by :func:`variables_for_workers`, and no file.
    """
    passed = ("HF_TOKEN", "HF_HOME", "HF_HUB_OFFLINE", "HF_HUB_ENABLE_HF_TRANSFER")
    names = [n for n in os.environ if n in passed or n.startswith(("MLFLOW_", "DATABRICKS_"))]
    variables = worker_variables(args) | {name: os.environ[name] for name in names}
    if "mlflow" in str(args.get("report_to")):
        variables.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{run.mlflow_db}")
        variables.setdefault("MLFLOW_EXPERIMENT_NAME", "cpt")
        variables.setdefault("MLFLOW_FLATTEN_PARAMS", "1")
    return variables


@contextmanager
def variables_for_workers(run: Run, args: dict[str, Any]) -> Iterator[None]:
    """Lays the workers' variables into the memory of Ray's head while the block runs.

    As part of the training's configuration they would be written to ``params.json`` and
    ``params.pkl`` beside the checkpoints, as a runtime environment into Ray's logs.
    """
    from ray.experimental import internal_kv

    variables = json.dumps(worker_environment(run, args)).encode()
    key = str(run.folder).encode()
    internal_kv._internal_kv_put(key, variables, overwrite=True, namespace=VARIABLES)
    try:
        yield
    finally:
        internal_kv._internal_kv_del(key, namespace=VARIABLES)


def take_variables(run: Run) -> dict[str, str]:
    """In a worker: the variables the driver laid down for this run.

    Raises:
        TrackingError: There are none: the driver has ended.
    """
    from ray.experimental import internal_kv

    laid = internal_kv._internal_kv_get(str(run.folder).encode(), namespace=VARIABLES)
    if laid is None:
        raise TrackingError("the driver of this training has ended", where=run.folder)
    return json.loads(laid)


def prepare(run: Run, args: dict[str, Any]) -> str | None:
    """Makes the embedded MLflow store ready, so that only one process ever creates it.

    Returns:
        The tracking URI in use; ``None`` where the recipe reports to nothing of MLflow's.

    Raises:
        TrackingError: A server is named by ``MLFLOW_TRACKING_URI`` and does not answer.
    """
    if "mlflow" not in str(args.get("report_to")):
        return None
    import mlflow

    variables = worker_environment(run, args)
    uri, experiment = variables["MLFLOW_TRACKING_URI"], variables["MLFLOW_EXPERIMENT_NAME"]
    run.mlflow_db.parent.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    try:
        mlflow.set_tracking_uri(uri)
        with hushed():  # fifty lines of a new database's migrations
            known = mlflow.get_experiment_by_name(experiment)
        if known is None:
            store = (run.mlflow_db.parent / "artifacts").as_uri() if "sqlite" in uri else None
            mlflow.create_experiment(experiment, artifact_location=store)
    except Exception as error:
        raise _no_answer(uri, error) from None
    return uri


def ask(run: Run, args: dict[str, Any], timeout: float) -> str:
    """Asks the tracking server whether it is there and lets this user in; writes nothing.

    Raises:
        TrackingError: It does not answer, or refuses.
    """
    if "mlflow" not in str(args.get("report_to")):
        return "nothing is reported (report_to: none)"
    variables = worker_environment(run, args)
    uri, experiment = variables["MLFLOW_TRACKING_URI"], variables["MLFLOW_EXPERIMENT_NAME"]
    if uri.startswith("databricks"):
        return _ask_databricks(uri, experiment, variables)
    if not uri.startswith("http"):
        return f"MLflow's embedded store, {uri.split('@')[-1]}"
    import requests

    token = variables.get("MLFLOW_TRACKING_TOKEN")
    user = variables.get("MLFLOW_TRACKING_USERNAME")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    login = (user, variables.get("MLFLOW_TRACKING_PASSWORD", "")) if user else None
    where = f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/get-by-name"
    try:
        answer = requests.get(
            where,
            params={"experiment_name": experiment},
            headers=headers,
            auth=login,
            timeout=timeout,
        )
    except requests.RequestException as error:
        raise _no_answer(uri, error) from None
    if answer.status_code in (401, 403):
        raise TrackingError(
            f"MLflow's server does not let this user in ({answer.status_code} {answer.reason})",
            where=uri.split("@")[-1],
            expected="a token or a user with leave to write to the experiment "
            f"'{experiment}': " + ("one is set" if token or login else "none is set"),
            do="export MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and _PASSWORD; or train "
            "without tracking: OVERRIDES = {'report_to': 'none'}",
        )
    known = answer.status_code == 200 and "experiment" in answer.text
    absent = answer.status_code == 404 and "RESOURCE_DOES_NOT_EXIST" in answer.text
    if not known and not absent:
        raise _no_answer(uri, OSError(f"{answer.status_code} {answer.reason}, not MLflow's API"))
    return f"MLflow at {uri.split('@')[-1]}, experiment '{experiment}'" + " (new)" * absent


def _ask_databricks(uri: str, experiment: str, variables: dict[str, str]) -> str:
    """What Databricks needs of its users; its server is asked when the run is opened."""
    profile = Path("~/.databrickscfg").expanduser().is_file()
    lacking = [n for n in ("DATABRICKS_HOST", "DATABRICKS_TOKEN") if not variables.get(n)]
    if lacking and not profile:
        raise TrackingError(
            f"MLflow is to report to Databricks, and {' and '.join(lacking)} "
            f"{'are' if len(lacking) > 1 else 'is'} not set",
            where=f"MLFLOW_TRACKING_URI={uri}",
            expected="DATABRICKS_HOST=https://…, DATABRICKS_TOKEN=…, or ~/.databrickscfg",
            do="export them before starting; they reach the workers from there and no file",
        )
    if not experiment.startswith("/"):
        raise TrackingError(
            f"Databricks takes no experiment named '{experiment}'",
            where="MLFLOW_EXPERIMENT_NAME",
            expected="an absolute path of the workspace, such as /Users/you@example.com/cpt",
            do="export MLFLOW_EXPERIMENT_NAME=/Users/…/cpt",
        )
    return f"MLflow on Databricks, experiment '{experiment}'"


def _no_answer(uri: str, error: Exception) -> TrackingError:
    return TrackingError(
        f"MLflow's tracking store does not answer: {(str(error).splitlines() or [''])[0][:200]}",
        where=uri.split("@")[-1],  # without a user's password
        expected="a running server, and leave to write to it",
        do="correct MLFLOW_TRACKING_URI, unset it for the embedded store, or train without "
        "tracking: OVERRIDES = {'report_to': 'none'}",
    )


def catch_up(run: Run, args: dict[str, Any]) -> None:
    """Sends what MLflow did not take while a run was trained that is complete now."""
    if "mlflow" in str(args.get("report_to")):
        with mirrored(run, args):
            pass


@contextmanager
def mirrored(run: Run, args: dict[str, Any]) -> Iterator[None]:
    """Sends the run's events to MLflow while the block runs, each step once, also over restarts.

    The driver does it, from ``metrics.jsonl``: a tracking server that fails for a while does not
    stop the workers, and what was not sent is sent later. A run taken up again continues its
    MLflow run.
    """
    uri = prepare(run, args)
    if uri is None:
        yield
        return
    try:
        mirror = _Mirror(run, args, uri)
    except Exception as error:
        raise _no_answer(uri, error) from None
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_SEND_SECONDS):
            mirror.send()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        mirror.send()
        mirror.close()


class _Mirror:
    """A run in MLflow, and what of it has been sent."""

    def __init__(self, run: Run, args: dict[str, Any], uri: str) -> None:
        self.run, self.args, self.client = run, args, _client(uri)
        self.failed = False
        found = _find(self.client, run)
        if found is None:
            name = worker_environment(run, args)["MLFLOW_EXPERIMENT_NAME"]
            experiment = self.client.get_experiment_by_name(name)
            found = self.client.create_run(
                experiment.experiment_id, run_name=run.name, tags={_MARK: _mark(run)}
            )
        self.id = found.info.run_id
        self.client.update_run(self.id, status="RUNNING")
        self.sent = {
            (key, metric.step)
            for key in found.data.metrics
            for metric in self.client.get_metric_history(self.id, key)
        }
        self._describe(args, known=found.data.params)

    def _describe(self, args: dict[str, Any], known: dict[str, str]) -> None:
        from mlflow.entities import Param

        said = {key: str(value)[:500] for key, value in args.items() if key not in known}
        self.client.log_batch(self.id, params=[Param(key, value) for key, value in said.items()])

    def send(self) -> None:
        from mlflow.entities import Metric

        fresh = [
            (Metric(key, value, int(event["time"] * 1000), event["step"]))
            for event in self.run.events()
            for key, value in _metrics(event).items()
            if (key, event["step"]) not in self.sent
        ]
        try:
            for i in range(0, len(fresh), 500):  # MLflow takes a thousand at once
                self.client.log_batch(self.id, metrics=fresh[i : i + 500])
        except Exception as error:
            if not self.failed:
                show.say(f"MLflow does not take metrics now, they will be sent later: {error}")
            self.failed = True
            return
        self.failed = False
        self.sent |= {(metric.key, metric.step) for metric in fresh}

    def close(self) -> None:
        self._keep_files()
        try:
            complete = self.run.state == "complete"
            self.client.set_terminated(self.id, "FINISHED" if complete else "FAILED")
        except Exception as error:
            show.say(f"MLflow was not told that the run ended: {error}")

    def _keep_files(self) -> None:
        """The resolved files, and the curves so far, as artifacts."""
        from matplotlib import pyplot

        try:
            if any(event["event"] == "step" for event in self.run.events()):
                figure = curves.plot(self.run, held_out_of(self.args))
                path = curves.save_figure(self.run, figure, "training")
                pyplot.close(figure)
                self.client.log_artifact(self.id, str(path), "figures")
            self.client.log_artifacts(self.id, str(self.run.config_dir), "config")
        except Exception as error:
            show.say(f"MLflow did not take the run's files: {error}")


def add_export(run: Run, args: dict[str, Any], exported: dict[str, Any]) -> None:
    """Notes in MLflow where the exported model lies, and what it came to.

    Args:
        run: Whose.
        args: Its resolved recipe.
        exported: ``path``, ``dtype``, ``perplexity`` by role, ….

    Raises:
        TrackingError: MLflow does not answer, or does not know the run.
    """
    if "mlflow" not in str(args.get("report_to")):
        return
    uri = worker_environment(run, args)["MLFLOW_TRACKING_URI"]
    try:
        client = _client(uri)
        found = _find(client, run)
    except Exception as error:
        raise _no_answer(uri, error) from None
    if found is None:
        raise _unknown_run(run, uri)
    client.set_tag(found.info.run_id, "cpt.export", exported["path"])
    client.log_dict(found.info.run_id, exported, "export.json")


def _metrics(event: dict[str, Any]) -> dict[str, float]:
    """An event's figures by MLflow's names for them, which are the trainer's."""
    if event["event"] == "eval":
        return {f"eval_{event['dataset']}_loss": event["loss"]}
    if event["event"] == "step":
        keys = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu")
        figures = {key: event[key] for key in keys if event.get(key) is not None}
        if event.get("memory"):
            figures["memory_gib"] = event["memory"] / 2**30
        return figures | {"seconds_per_step": event["seconds"]}
    return {}


def _client(uri: str) -> Any:
    """MLflow's client for a store; the process's own URI is set to it too.

    MLflow 3.4.0 looks for a run's artifacts by the process's URI, whatever the client's is.
    """
    import mlflow

    mlflow.set_tracking_uri(uri)
    return mlflow.MlflowClient(uri)


def _find(client: Any, run: Run) -> Any | None:
    """The run in MLflow, by the mark in its folder: names and paths may be used again."""
    experiments = [e.experiment_id for e in client.search_experiments()]
    query = f"tags.`{_MARK}` = '{_mark(run)}'"
    found = client.search_runs(experiments, query, max_results=1) if experiments else []
    return found[0] if found else None


def _mark(run: Run) -> str:
    """A random name of the run's own, kept in its folder."""
    path = run.logs / "mlflow-mark"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(uuid.uuid4().hex, "utf-8")
    return path.read_text("utf-8")


def recorded(run: Run, uri: str) -> dict[str, Any]:
    """The run in MLflow: its name, status and last metrics.

    Raises:
        TrackingError: There is none.
    """
    found = _find(_client(uri), run)
    if found is None:
        raise _unknown_run(run, uri)
    return {
        "id": found.info.run_id,
        "name": found.info.run_name,
        "status": found.info.status,
        "metrics": dict(found.data.metrics),
    }


def _unknown_run(run: Run, uri: str) -> TrackingError:
    return TrackingError(
        f"MLflow has no run named '{run.name}'",
        where=uri.split("@")[-1],
        do="run notebook 04_train again",
    )


def register(
    run: Run, args: dict[str, Any], exported: dict[str, Any], name: str = ""
) -> int | None:
    """Makes the exported model a version in MLflow's registry, with where it comes from.

    By reference: the version names the folder and the sha256 of its weights. A copy would take
    gigabytes through the tracking server for each version, and servers load from the storage.

    Args:
        run: Whose.
        args: Its resolved recipe.
        exported: As for :func:`add_export`; ``path`` and ``perplexity`` are looked at.
        name: The model's name in the registry; default the run's.

    Returns:
        The version; that of the same weights in the same folder is not made twice. ``None`` where
        the recipe reports to nothing of MLflow's.

    Raises:
        TrackingError: MLflow does not answer, or does not know the run.
    """
    if "mlflow" not in str(args.get("report_to")):
        return None
    from mlflow.exceptions import MlflowException

    uri, name = worker_environment(run, args)["MLFLOW_TRACKING_URI"], name or run.name
    tags = _lineage(run, args, exported)
    client = _client(uri)
    try:
        found = _find(client, run)
        if found is None:
            raise _unknown_run(run, uri)
        with suppress(MlflowException):  # it is there already
            client.create_registered_model(name)
        for known in client.search_model_versions(f"name = '{name}'"):
            if all(known.tags.get(key) == tags[key] for key in ("cpt.path", "cpt.weights")):
                return int(known.version)
        # A server takes no path as a source; the run's artifacts hold export.json, which has it.
        source = f"runs:/{found.info.run_id}/export.json"
        made = client.create_model_version(name, source, found.info.run_id, tags=tags)
    except TrackingError:
        raise
    except Exception as error:
        raise _no_answer(uri, error) from None
    return int(made.version)


def registered(uri: str, name: str, version: int | None = None) -> tuple[Path, dict[str, str]]:
    """A model of MLflow's registry: the folder it lies in, and where it comes from.

    Args:
        uri: The tracking server, or the embedded store, ``sqlite:///<storage>/mlflow/mlflow.db``.
        name: The model's name in the registry.
        version: Which; default the newest.

    Returns:
        The folder, whose weights are the registered ones, and the version's tags.

    Raises:
        TrackingError: MLflow does not answer, knows no such model, or the folder does not hold
            these weights any more.
    """
    try:
        found = _client(uri).search_model_versions(f"name = '{name}'")
    except Exception as error:
        raise _no_answer(uri, error) from None
    versions = {int(one.version): one for one in found if "cpt.path" in one.tags}
    chosen = versions.get(max(versions, default=0) if version is None else version)
    if chosen is None:
        raise TrackingError(
            f"MLflow's registry has no model '{name}'"
            + (f", version {version}" if version else ""),
            where=uri.split("@")[-1],
            expected=f"one of the versions {sorted(versions)}"
            if versions
            else "a registered model",
            do="run notebook 06_export, or tracking.register, again",
        )
    folder = Path(chosen.tags["cpt.path"])
    if _weights(folder) != chosen.tags["cpt.weights"]:
        raise TrackingError(
            f"'{name}' version {chosen.version} is not what was registered any more",
            where=folder,
            expected=f"a folder whose weights have the sha256 {chosen.tags['cpt.weights'][:12]}…",
            do="export the run again and register that, or take another version",
        )
    return folder, dict(chosen.tags)


def _weights(folder: Path) -> str:
    """The sha256 of a folder's weights, all files as one; of nothing where there are none."""
    each = [sha256(path) for path in sorted(folder.glob("*.safetensors"))]
    return each[0] if len(each) == 1 else hashlib.sha256(" ".join(each).encode()).hexdigest()


def _lineage(run: Run, args: dict[str, Any], exported: dict[str, Any]) -> dict[str, str]:
    """Where a model comes from and what it came to, as tags: MLflow's values are short strings."""
    step = run.step_json("03_config")
    recipe = json.loads(step.read_text("utf-8"))["parameters"] if step.is_file() else {}
    tags = {
        "path": exported["path"],
        "weights": _weights(Path(exported["path"])),
        "run": run.name,
        "recipe": recipe.get("TRAIN_CONFIG", run.train_yaml),
        "base_model": args["model_name_or_path"],
        "code": _code_version(),
        "data": args["dataset"],
    }
    for name in str(args["dataset"]).split(","):
        corpus = run.storage / "corpora" / name / "corpus.json"
        if corpus.is_file():
            kept = json.loads(corpus.read_text("utf-8"))["sha256"]
            tags[f"data.{name}.sha256"] = kept
    for role, value in exported.get("perplexity", {}).items():
        tags[f"perplexity.{role}"] = value
    return {f"cpt.{key}": str(value)[:5000] for key, value in tags.items()}


def _code_version() -> str:
    """The commit this package is at, marked where files differ from it, else its release."""
    git = ["git", "-C", str(PROJECT)]
    with suppress(OSError, subprocess.CalledProcessError):
        if (PROJECT / ".git").exists():
            ask_git = partial(subprocess.run, capture_output=True, text=True, check=True)
            commit = ask_git([*git, "rev-parse", "HEAD"]).stdout.strip()
            return commit + " with changes" * bool(ask_git([*git, "status", "--short"]).stdout)
    with suppress(importlib.metadata.PackageNotFoundError):
        return f"cpt-helpers {importlib.metadata.version('cpt-helpers')}"
    return "unknown"
