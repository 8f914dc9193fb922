"""Environment variables of the workers: from the driver through Ray's memory, into no file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import TrackingError
from ..recipes import Recipe
from ..run import Run
from ..setup.tracking_store import MLFLOW_PREFIXES

VARIABLES = b"cpt_helpers"  # namespace in the key-value store of Ray's head, which is in memory


def worker_environment(args: Recipe) -> dict[str, str]:
    """Variables of the workers: the recipe's, and the access to hub and buckets of this process.

    The driver reports to MLflow. No worker does, so MLflow's variables stay with the driver.
    """
    own = {name: value for name, value in os.environ.items() if name.startswith(("HF_", "AWS_"))}
    variables = args.variables | own
    from huggingface_hub import get_token

    if token := get_token():  # that of `huggingface-cli login` is in a file of this machine
        variables.setdefault("HF_TOKEN", token)
    return {
        name: value for name, value in variables.items() if not name.startswith(MLFLOW_PREFIXES)
    }


@contextmanager
def handed_to_workers(run: Run, args: Recipe) -> Iterator[Callable[..., None]]:
    """Hands values to the workers through the memory of Ray's head while the block runs.

    As part of the training's configuration they would be written to ``params.json`` and
    ``params.pkl`` next to the checkpoints, as a runtime environment into Ray's logs.

    Yields:
        A function that hands over ``attempt`` (the name of a launch or restart) and ``resume`` (the
        checkpoint to resume from, or ``None``), together with the workers' variables.
    """
    from ray.experimental import internal_kv

    key = str(run.folder).encode()

    def hand_over(attempt: str, resume: dict[str, Any] | None) -> None:
        variables = worker_environment(args)
        values = {"variables": variables, "attempt": attempt, "resume": resume}
        internal_kv._internal_kv_put(
            key, json.dumps(values).encode(), overwrite=True, namespace=VARIABLES
        )

    try:
        yield hand_over
    finally:
        internal_kv._internal_kv_del(key, namespace=VARIABLES)


def take_over(run: Run) -> dict[str, Any]:
    """In a worker: the ``variables``, ``attempt`` and ``resume`` that the driver handed over.

    Raises:
        TrackingError: There are none, because the driver has ended.
    """
    from ray.experimental import internal_kv

    handed = internal_kv._internal_kv_get(str(run.folder).encode(), namespace=VARIABLES)
    if handed is None:
        raise TrackingError("the driver of this training has ended", where=run.folder)
    return json.loads(handed)


def set_variables(run: str, storage: str) -> None:
    """In a worker, before torch is imported: sets the variables that the driver handed over."""
    os.environ.update(take_over(Run(run, Path(storage)))["variables"])
