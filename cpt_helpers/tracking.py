"""MLflow: an embedded store on the storage, or the server the environment names."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .config import worker_variables
from .errors import TrackingError
from .run import Run
from .streams import hushed

VARIABLES = b"cpt_helpers"  # namespace in the key-value store of Ray's head, which is in memory


def worker_environment(run: Run, args: dict[str, Any]) -> dict[str, str]:
    """Variables the workers need: where MLflow's store is, and the secrets of this process.

    They reach the workers by :func:`variables_for_workers`, and no file.
    """
    passed = ("HF_TOKEN", "HF_HOME", "HF_HUB_OFFLINE", "HF_HUB_ENABLE_HF_TRANSFER")
    names = [name for name in os.environ if name in passed or name.startswith("MLFLOW_")]
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
    key = run.name.encode()
    internal_kv._internal_kv_put(key, variables, overwrite=True, namespace=VARIABLES)
    try:
        yield
    finally:
        internal_kv._internal_kv_del(key, namespace=VARIABLES)


def take_variables(run_name: str) -> dict[str, str]:
    """In a worker: the variables the driver laid down for this run."""
    from ray.experimental import internal_kv

    return json.loads(internal_kv._internal_kv_get(run_name.encode(), namespace=VARIABLES))


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
        raise TrackingError(
            f"MLflow's tracking store does not answer: {str(error).splitlines()[0][:200]}",
            where=uri.split("@")[-1],  # without a user's password
            expected="a running server, and leave to write to it",
            do="correct MLFLOW_TRACKING_URI, unset it for the embedded store, or train without "
            "tracking: OVERRIDES = {'report_to': 'none'}",
        ) from None
    return uri


def recorded(run: Run, uri: str) -> dict[str, Any]:
    """The run in MLflow: its name, status and last metrics; the newest of that name.

    Raises:
        TrackingError: There is none.
    """
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "cpt")
    experiment = client.get_experiment_by_name(name)
    query = f"attributes.run_name = '{run.name}'"
    runs = (
        client.search_runs([experiment.experiment_id], query, max_results=1) if experiment else []
    )
    if not runs:
        raise TrackingError(
            f"MLflow has no run named '{run.name}'", where=uri, do="look at the log of rank 0"
        )
    return {
        "id": runs[0].info.run_id,
        "name": run.name,
        "status": runs[0].info.status,
        "metrics": dict(runs[0].data.metrics),
    }
