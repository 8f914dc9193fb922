"""A run in MLflow: its metrics, files and export. Only the driver sends them."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .. import display, plots
from ..errors import TrackingError
from ..recipes import Recipe
from ..redact import redact
from ..run import Run
from ..setup.tracking_store import client_of, is_server, no_answer, reports, store_of

_TAG = "cpt.run"  # the tag that identifies the run
_SEND_SECONDS = 2.0


@dataclass(frozen=True)
class TrackedRun:
    """A run as MLflow has it, shown as a table of its last metrics."""

    id: str
    name: str
    status: str
    metrics: dict[str, float]

    def _repr_html_(self) -> str:
        rows = [("run", self.name), ("status", self.status), *sorted(self.metrics.items())]
        return display.table(rows)._repr_html_()  # type: ignore[operator]  # missing in the stubs


def how_to_open(uri: str) -> str:
    """How a reader opens MLflow's pages of a store, without the store's credentials."""
    if is_server(uri):
        return redact(uri)
    return f"mlflow ui --backend-store-uri {redact(uri)}    # then http://127.0.0.1:5000"


def prepare_tracking(run: Run, args: Recipe) -> str | None:
    """Creates the experiment and the embedded store before several processes need them.

    Returns:
        The tracking URI without credentials; ``None`` if the recipe does not report to MLflow.

    Raises:
        TrackingError: The store does not answer.
    """
    if not reports(args):
        return None
    uri, experiment, _ = store_of(run, args)
    run.mlflow_db.parent.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    with _as_tracking_errors(uri):
        client = client_of(uri)
        if client.get_experiment_by_name(experiment) is None:
            folder = None if is_server(uri) else (run.mlflow_db.parent / "artifacts").as_uri()
            client.create_experiment(experiment, artifact_location=folder)
    return redact(uri)


def catch_up(run: Run, args: Recipe) -> None:
    """Sends a complete run's events that MLflow did not accept during the training."""
    with mirrored(run, args):
        pass


@contextmanager
def mirrored(run: Run, args: Recipe) -> Iterator[None]:
    """Sends the run's events to MLflow while the block runs, each step once, also over restarts.

    The driver reads ``metrics.jsonl``. If a tracking server fails for a while, the workers continue
    and the events are sent later. A resumed run continues its MLflow run.
    """
    if prepare_tracking(run, args) is None:
        yield
        return
    uri, experiment, _ = store_of(run, args)
    with _as_tracking_errors(uri):
        mirror = _Mirror(run, args, client_of(uri), experiment)
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
    """A run in MLflow, and the metrics that were sent to it."""

    def __init__(self, run: Run, args: Recipe, client: Any, experiment: str) -> None:
        from mlflow.entities import Param

        self.run, self.args, self.client = run, args, client
        self.failed = False
        known = _find(client, run)
        if known is None:
            parent = client.get_experiment_by_name(experiment).experiment_id
            known = client.create_run(parent, run_name=run.name, tags={_TAG: _id_of(run)})
        self.id = known.info.run_id
        client.update_run(self.id, status="RUNNING")
        self.sent = {
            (key, metric.step)
            for key in known.data.metrics
            for metric in client.get_metric_history(self.id, key)
        }
        new = {key: str(value)[:500] for key, value in args.items() if key not in known.data.params}
        client.log_batch(self.id, params=[Param(key, value) for key, value in new.items()])

    def send(self) -> None:
        from mlflow.entities import Metric

        new = [
            Metric(key, value, int(event["time"] * 1000), event["step"])
            for event in self.run.events()
            for key, value in _metrics(event).items()
            if (key, event["step"]) not in self.sent
        ]
        try:
            for i in range(0, len(new), 500):  # MLflow accepts a thousand at once
                self.client.log_batch(self.id, metrics=new[i : i + 500])
        except Exception as error:
            if not self.failed:
                display.say(f"MLflow does not accept metrics now; they will be sent later: {error}")
            self.failed = True
            return
        self.failed = False
        self.sent |= {(metric.key, metric.step) for metric in new}

    def close(self) -> None:
        self._log_files()
        try:
            complete = self.run.state == "complete"
            for event in self.run.events():
                if event["event"] == "diverged":
                    reason = f"step {event['step']}, rank {event['rank']}: {event['reason']}"
                    self.client.set_tag(self.id, "cpt.diverged", reason)
            self.client.set_terminated(self.id, "FINISHED" if complete else "FAILED")
        except Exception as error:
            display.say(f"MLflow's record of the run could not be closed: {error}")

    def _log_files(self) -> None:
        """Logs the resolved files and the curves as artifacts."""
        try:
            from matplotlib import pyplot

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
    client, known = known_run(run, uri)
    with _as_tracking_errors(uri):
        client.set_tag(known.info.run_id, "cpt.export", exported["path"])
        client.log_dict(known.info.run_id, exported, "export.json")


def tracked_run(run: Run, args: Recipe) -> TrackedRun:
    """The run in MLflow: its name, status and last metrics.

    Raises:
        TrackingError: MLflow does not answer, or does not know the run.
    """
    _, known = known_run(run, store_of(run, args)[0])
    info = known.info
    return TrackedRun(info.run_id, info.run_name, info.status, dict(known.data.metrics))


def known_run(run: Run, uri: str) -> tuple[Any, Any]:
    """MLflow's client for a store, and the run there.

    Raises:
        TrackingError: MLflow does not answer, or does not know the run.
    """
    with _as_tracking_errors(uri):
        client = client_of(uri)
        known = _find(client, run)
    if known is None:
        raise TrackingError(
            f"MLflow has no run named '{run.name}'", where=uri, do="run notebook 04_train again"
        )
    return client, known


def _metrics(event: dict[str, Any]) -> dict[str, float]:
    """An event's numbers under the trainer's names, which MLflow users know."""
    if event["event"] == "eval":
        return {f"eval_{event['dataset']}_loss": event["loss"]}
    if event["event"] != "step":
        return {}
    keys = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu")
    numbers = {key: event[key] for key in keys if event.get(key) is not None}
    if event.get("memory"):
        numbers["memory_gib"] = event["memory"] / 2**30
    return numbers | {"seconds_per_step": event["seconds"]}


def _find(client: Any, run: Run) -> Any | None:
    """The run in MLflow by the id in its folder: names and paths can be used again."""
    experiments = [e.experiment_id for e in client.search_experiments()]
    query = f"tags.`{_TAG}` = '{_id_of(run)}'"
    runs = client.search_runs(experiments, query, max_results=1) if experiments else []
    return runs[0] if runs else None


def _id_of(run: Run) -> str:
    """A random id, kept in the run's folder."""
    path = run.logs / "mlflow-mark"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(uuid.uuid4().hex, "utf-8")
    return path.read_text("utf-8")


@contextmanager
def _as_tracking_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except TrackingError:
        raise
    except Exception as error:
        raise no_answer(uri, error) from None
