"""Variables the workers need, secrets among them: from the driver to them, and into no file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .checks import worker_variables
from .errors import TrackingError
from .run import Run

VARIABLES = b"cpt_helpers"  # namespace in the key-value store of Ray's head, which is in memory


def worker_environment(run: Run, args: dict[str, Any]) -> dict[str, str]:
    """Variables the workers need: where MLflow's store is, and the secrets of this process.

    They reach the workers by :func:`variables_for_workers`, and no file.
    """
    passed = ("HF_TOKEN", "HF_HOME", "HF_HUB_OFFLINE", "HF_HUB_ENABLE_HF_TRANSFER")
    of = ("MLFLOW_", "DATABRICKS_", "AWS_")
    names = [n for n in os.environ if n in passed or n.startswith(of)]
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
