"""The workers' environment variables. The driver passes them through Ray's memory, not a file."""

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
    """The recipe's variables, and this process's ``HF_*`` and ``AWS_*`` (hub and buckets).

    Only the driver reports to MLflow, so MLflow's variables stay with the driver.
    """
    from huggingface_hub import get_token

    access = {name: value for name, value in os.environ.items() if name.startswith(("HF_", "AWS_"))}
    variables = args.variables | access
    if token := get_token():  # `huggingface-cli login` keeps it in a file of this machine
        variables.setdefault("HF_TOKEN", token)
    return {
        name: value for name, value in variables.items() if not name.startswith(MLFLOW_PREFIXES)
    }


@contextmanager
def handed_to_workers(run: Run, args: Recipe) -> Iterator[Callable[..., None]]:
    """Passes values to the workers through the memory of Ray's head while the block runs.

    Ray would write the training's configuration to ``params.json`` and ``params.pkl`` next to the
    checkpoints, and a runtime environment to its logs.

    Yields:
        A function that passes ``attempt`` (the name of a launch or restart) and ``resume`` (the
        checkpoint to resume from, or ``None``), together with the workers' variables.
    """
    from ray.experimental import internal_kv

    key = str(run.folder).encode()

    def hand_over(attempt: str, resume: dict[str, Any] | None) -> None:
        values = {"variables": worker_environment(args), "attempt": attempt, "resume": resume}
        content = json.dumps(values).encode()
        internal_kv._internal_kv_put(key, content, overwrite=True, namespace=VARIABLES)

    try:
        yield hand_over
    finally:
        internal_kv._internal_kv_del(key, namespace=VARIABLES)


def take_over(run: Run) -> dict[str, Any]:
    """In a worker: the driver's ``variables``, ``attempt`` and ``resume``.

    Raises:
        TrackingError: The driver has exited.
    """
    from ray.experimental import internal_kv

    handed = internal_kv._internal_kv_get(str(run.folder).encode(), namespace=VARIABLES)
    if handed is None:
        raise TrackingError("the driver of this training has exited", where=run.folder)
    return json.loads(handed)


def set_variables(run: str, storage: str) -> None:
    """In a worker, before torch is imported: sets the variables that the driver passed."""
    os.environ.update(take_over(Run(run, Path(storage)))["variables"])
