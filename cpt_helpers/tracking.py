"""MLflow: an embedded store on the storage, or the server the environment names."""

from __future__ import annotations

import os
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import curves, show
from .config import held_out_of
from .errors import TrackingError
from .run import Run
from .streams import hushed
from .variables import worker_environment

_MARK = "cpt.run"  # the tag by which a run is known again
_SEND_SECONDS = 2.0


def prepare(run: Run, args: dict[str, Any]) -> str | None:
    """Makes the embedded MLflow store ready, so that only one process ever creates it.

    Returns:
        The tracking URI in use; ``None`` where the recipe reports to nothing of MLflow's.

    Raises:
        TrackingError: A server is named by ``MLFLOW_TRACKING_URI`` and does not answer.
    """
    if "mlflow" not in str(args.get("report_to")):
        return None
    variables = worker_environment(run, args)
    uri, experiment = variables["MLFLOW_TRACKING_URI"], variables["MLFLOW_EXPERIMENT_NAME"]
    run.mlflow_db.parent.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    try:
        client = client_of(uri)
        if client.get_experiment_by_name(experiment) is None:
            own = None if _is_server(uri) else (run.mlflow_db.parent / "artifacts").as_uri()
            client.create_experiment(experiment, artifact_location=own)
    except Exception as error:
        raise no_answer(uri, error) from None
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
        raise no_answer(uri, error) from None
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
        raise no_answer(uri, OSError(f"{answer.status_code} {answer.reason}, not MLflow's API"))
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


def no_answer(uri: str, error: Exception) -> TrackingError:
    """What to raise where MLflow itself failed: its own words, cut to a line."""
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
        raise no_answer(uri, error) from None
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
        self.run, self.args, self.client = run, args, client_of(uri)
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
    client, found = known_run(run, uri)
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


def known_run(run: Run, uri: str) -> tuple[Any, Any]:
    """MLflow's client for a store, and the run there.

    Raises:
        TrackingError: MLflow does not answer, or does not know the run.
    """
    try:
        client = client_of(uri)
        found = _find(client, run)
    except Exception as error:
        raise no_answer(uri, error) from None
    if found is None:
        raise TrackingError(
            f"MLflow has no run named '{run.name}'",
            where=uri.split("@")[-1],
            do="run notebook 04_train again",
        )
    return client, found


def client_of(uri: str) -> Any:
    """MLflow's client for a store; the process's own URI is set to it too.

    MLflow 3.4.0 looks for a run's artifacts by the process's URI, whatever the client's is. When it
    opens a database it makes ``./mlruns`` and prints the migrations, in each process again.
    """
    import mlflow
    from mlflow.tracking._tracking_service import utils

    mlflow.set_tracking_uri(uri)
    if _is_server(uri):
        return mlflow.MlflowClient(uri)
    own, path = uri.startswith("sqlite:///"), Path(uri.removeprefix("sqlite:///"))
    # A folder that exists anyway, in place of ./mlruns; our experiment names its own.
    utils.DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH = str(path.parent if own else tempfile.gettempdir())
    with hushed():
        client = mlflow.MlflowClient(uri)
        client.search_registered_models(max_results=1)  # the registry opens it by itself
    return client


def _is_server(uri: str) -> bool:
    return uri.startswith(("http", "databricks"))


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
        TrackingError: MLflow does not answer, or does not know the run.
    """
    _, found = known_run(run, uri)
    return {
        "id": found.info.run_id,
        "name": found.info.run_name,
        "status": found.info.status,
        "metrics": dict(found.data.metrics),
    }
