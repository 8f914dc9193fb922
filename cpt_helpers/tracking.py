"""MLflow: an embedded store on the storage, or the server the environment names."""

from __future__ import annotations

import os
from typing import Any

from .config import worker_variables
from .errors import TrackingError
from .run import Run


def worker_environment(run: Run, args: dict[str, Any]) -> dict[str, str]:
    """Variables the workers need: where MLflow's store is, and the secrets of this process.

    They travel in Ray's memory only, never in a file.
    """
    passed = ("HF_TOKEN", "HF_HOME", "HF_HUB_OFFLINE", "HF_HUB_ENABLE_HF_TRANSFER")
    names = [name for name in os.environ if name in passed or name.startswith("MLFLOW_")]
    variables = worker_variables(args) | {name: os.environ[name] for name in names}
    if "mlflow" in str(args.get("report_to")):
        variables.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{run.mlflow_db}")
        variables.setdefault("MLFLOW_EXPERIMENT_NAME", "cpt")
        variables.setdefault("MLFLOW_FLATTEN_PARAMS", "1")
    return variables


def prepare(run: Run, args: dict[str, Any]) -> str | None:
    """Makes the embedded MLflow store ready, so that only one process ever creates it.

    Returns:
        The tracking URI in use; ``None`` where the recipe reports to nothing of MLflow's.

    Raises:
        TrackingError: A server is named by ``MLFLOW_TRACKING_URI`` and does not answer.
    """
    if "mlflow" not in str(args.get("report_to")):
        return None
    import logging

    import mlflow

    variables = worker_environment(run, args)
    uri, experiment = variables["MLFLOW_TRACKING_URI"], variables["MLFLOW_EXPERIMENT_NAME"]
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.ERROR)
    run.mlflow_db.parent.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    try:
        mlflow.set_tracking_uri(uri)
        if mlflow.get_experiment_by_name(experiment) is None:
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
