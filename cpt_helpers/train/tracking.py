"""The driver's records in MLflow: a run's metrics, files and export."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .. import display, plots
from ..errors import TrackingError
from ..recipes import Recipe
from ..redact import redact
from ..run import Run
from ..setup.tracking_store import client_of, is_server, no_answer, reports, store_of

_MARK = "cpt.run"  # the tag by which a run is known again
_SEND_SECONDS = 2.0


def how_to_open(uri: str) -> str:
    """How a reader opens MLflow's pages of a store, without the store's credentials."""
    if uri.startswith(("http", "databricks")):
        return redact(uri)
    return f"mlflow ui --backend-store-uri {redact(uri)}    # then http://127.0.0.1:5000"


def prepare(run: Run, args: Recipe) -> str | None:
    """Creates the experiment, and the embedded store, so that only one process ever does.

    Returns:
        The tracking URI without its credentials; ``None`` where the recipe does not report to
        MLflow.

    Raises:
        TrackingError: The store does not answer.
    """
    if not reports(args):
        return None
    uri, experiment, _ = store_of(run, args)
    run.mlflow_db.parent.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    try:
        client = client_of(uri)
        if client.get_experiment_by_name(experiment) is None:
            own = None if is_server(uri) else (run.mlflow_db.parent / "artifacts").as_uri()
            client.create_experiment(experiment, artifact_location=own)
    except Exception as error:
        raise no_answer(uri, error) from None
    return redact(uri)


def catch_up(run: Run, args: Recipe) -> None:
    """Sends what MLflow did not accept while a run was trained that is complete now."""
    if reports(args):
        with mirrored(run, args):
            pass


@contextmanager
def mirrored(run: Run, args: Recipe) -> Iterator[None]:
    """Sends the run's events to MLflow while the block runs, each step once, also over restarts.

    The driver sends them, from ``metrics.jsonl``. A tracking server that fails for a while does
    not stop the workers: the events are sent later. A resumed run continues its MLflow run.
    """
    if prepare(run, args) is None:
        yield
        return
    uri, experiment, _ = store_of(run, args)
    try:
        mirror = _Mirror(run, args, client_of(uri), experiment)
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
    """A run in MLflow, and the metrics that have been sent to it."""

    def __init__(self, run: Run, args: Recipe, client: Any, experiment: str) -> None:
        self.run, self.args, self.client = run, args, client
        self.failed = False
        found = _find(self.client, run)
        if found is None:
            known = self.client.get_experiment_by_name(experiment)
            found = self.client.create_run(
                known.experiment_id, run_name=run.name, tags={_MARK: _mark(run)}
            )
        self.id = found.info.run_id
        self.client.update_run(self.id, status="RUNNING")
        self.sent = {
            (key, metric.step)
            for key in found.data.metrics
            for metric in self.client.get_metric_history(self.id, key)
        }
        self._describe(args, known=found.data.params)

    def _describe(self, args: Recipe, known: dict[str, str]) -> None:
        from mlflow.entities import Param

        fresh = {key: str(value)[:500] for key, value in args.items() if key not in known}
        self.client.log_batch(self.id, params=[Param(key, value) for key, value in fresh.items()])

    def send(self) -> None:
        from mlflow.entities import Metric

        fresh = [
            (Metric(key, value, int(event["time"] * 1000), event["step"]))
            for event in self.run.events()
            for key, value in _metrics(event).items()
            if (key, event["step"]) not in self.sent
        ]
        try:
            for i in range(0, len(fresh), 500):  # MLflow accepts a thousand at once
                self.client.log_batch(self.id, metrics=fresh[i : i + 500])
        except Exception as error:
            if not self.failed:
                display.say(f"MLflow does not accept metrics now; they are sent later: {error}")
            self.failed = True
            return
        self.failed = False
        self.sent |= {(metric.key, metric.step) for metric in fresh}

    def close(self) -> None:
        self._keep_files()
        try:
            complete = self.run.state == "complete"
            for event in self.run.events():
                if event["event"] == "diverged":
                    said = f"step {event['step']}, rank {event['rank']}: {event['reason']}"
                    self.client.set_tag(self.id, "cpt.diverged", said)
            self.client.set_terminated(self.id, "FINISHED" if complete else "FAILED")
        except Exception as error:
            display.say(f"MLflow's record of the run could not be closed: {error}")

    def _keep_files(self) -> None:
        """The resolved files, and the curves so far, as artifacts."""
        from matplotlib import pyplot

        try:
            if any(event["event"] == "step" for event in self.run.events()):
                figure = plots.plot(self.run, self.args.held_out)
                path = plots.save_figure(self.run, figure, "training")
                pyplot.close(figure)
                self.client.log_artifact(self.id, str(path), "figures")
            self.client.log_artifacts(self.id, str(self.run.config_dir), "config")
        except Exception as error:
            display.say(f"MLflow did not accept the run's files: {error}")


def add_export(run: Run, args: Recipe, exported: dict[str, Any]) -> None:
    """Records in MLflow where the exported model is, and its perplexities.

    Args:
        run: The run that was exported.
        args: Its resolved recipe.
        exported: ``path``, ``dtype``, ``perplexity`` by role, ….

    Raises:
        TrackingError: MLflow does not answer, or does not know the run.
    """
    if not reports(args):
        return
    uri = store_of(run, args)[0]
    client, found = known_run(run, uri)
    try:
        client.set_tag(found.info.run_id, "cpt.export", exported["path"])
        client.log_dict(found.info.run_id, exported, "export.json")
    except Exception as error:
        raise no_answer(uri, error) from None


def _metrics(event: dict[str, Any]) -> dict[str, float]:
    """An event's numbers, by the trainer's names, which MLflow users know."""
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
            where=uri,
            do="run notebook 04_train again",
        )
    return client, found


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


def recorded(run: Run, args: Recipe) -> dict[str, Any]:
    """The run in MLflow: its name, status and last metrics.

    Raises:
        TrackingError: MLflow does not answer, or does not know the run.
    """
    _, found = known_run(run, store_of(run, args)[0])
    return {
        "id": found.info.run_id,
        "name": found.info.run_name,
        "status": found.info.status,
        "metrics": dict(found.data.metrics),
    }
