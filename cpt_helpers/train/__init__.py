"""Training: from the resolved recipe (step 3) to checkpoints, events and the final model.

In: a :class:`~cpt_helpers.run.Run` with ``config/train.yaml``.
Out: ``TorchTrainer_*/checkpoint_*/``, ``output/``, ``metrics.jsonl``, ``logs/`` and an MLflow run.

On the driver:

- :mod:`.launch` places the workers, starts the training and summarizes it;
- :mod:`.failures` finds the cause of a failure, restarts the workers or raises one error;
- :mod:`.tracking` sends the events to MLflow;
- :mod:`.fault_demo` kills a worker of a small run and compares it with an uninterrupted run.

In each worker, in this order:

- :mod:`.worker_env` sets the environment variables, before torch is imported;
- :mod:`.worker` opens the log, resumes, and calls LLaMA-Factory;
- :mod:`.patches` and :mod:`.trainer` correct the pinned libraries;
- :mod:`.callback` records events and hands over checkpoints;
- :mod:`.weights` compares the loaded weights with their files.
"""

from __future__ import annotations

from .fault_demo import FaultDemo, demonstrate_fault
from .launch import Summary, evidence, perplexity_table, settings, train
from .tracking import how_to_open, prepare_tracking, tracked_run

__all__ = [
    "FaultDemo",
    "Summary",
    "demonstrate_fault",
    "evidence",
    "how_to_open",
    "perplexity_table",
    "prepare_tracking",
    "settings",
    "tracked_run",
    "train",
]
