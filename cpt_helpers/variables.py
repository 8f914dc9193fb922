"""Environment variables of the workers: from the driver through Ray's memory, into no file."""

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
OF_MLFLOW = ("MLFLOW_", "DATABRICKS_")


def worker_environment(args: dict[str, Any]) -> dict[str, str]:
    """Variables of the workers: the recipe's, and the access to hub and buckets of this process.

    The driver reports to MLflow. No worker does, so MLflow's variables stay with the driver.
    """
    own = {name: value for name, value in os.environ.items() if name.startswith(("HF_", "AWS_"))}
    variables = worker_variables(args) | own
    return {name: value for name, value in variables.items() if not name.startswith(OF_MLFLOW)}


@contextmanager
def variables_for_workers(run: Run, args: dict[str, Any]) -> Iterator[None]:
    """Keeps the workers' variables in the memory of Ray's head while the block runs.

    As part of the training's configuration, Ray would write them to ``params.json`` and
    ``params.pkl`` next to the checkpoints. As a runtime environment, it would write them to its
    logs.
    """
    from ray.experimental import internal_kv

    variables = json.dumps(worker_environment(args)).encode()
    key = str(run.folder).encode()
    internal_kv._internal_kv_put(key, variables, overwrite=True, namespace=VARIABLES)
    try:
        yield
    finally:
        internal_kv._internal_kv_del(key, namespace=VARIABLES)


def take_variables(run: Run) -> dict[str, str]:
    """In a worker: reads the variables that the driver stored for this run.

    Raises:
        TrackingError: There are none, because the driver has ended.
    """
    from ray.experimental import internal_kv

    stored = internal_kv._internal_kv_get(str(run.folder).encode(), namespace=VARIABLES)
    if stored is None:
        raise TrackingError("the driver of this training has ended", where=run.folder)
    return json.loads(stored)
