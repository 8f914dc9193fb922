"""Step 3: a recipe becomes the files of a run, and its cost is known before it runs.

In: a recipe of ``train-configs/``, its overrides, and the blocks of step 2. Out: ``<run>/config/``
with the resolved YAML and the DeepSpeed JSON, the plan, and the findings of every check.

============== ==================================================================================
module         content
============== ==================================================================================
resolution     recipe + overrides → the run's files: paths, defaults, secrets
validation     errors of a recipe: keys, types, datasets, contradictions, settings that cannot work
ranges         the allowed range of every number
findings       warnings about a recipe, and the findings of checks
planning       steps, tokens, disk space, learning rates
hardware       memory by ZeRO stage, GPUs that fit, hours and price
memory         memory of a worker: states, activations, logits, buffers
flops          parameters, FLOPs per token, peaks of GPUs
preflight      checks before a launch: model, tracking, disk, placement, memory
node_checks    checks on each node: storage, files, packages, CUDA toolkit
dry_run        the commands ``plan`` and ``--dry-run``
============== ==================================================================================
"""

from .hardware import fit_table, memory_table, methods
from .planning import estimate, learning_rates
from .preflight import check
from .resolution import check_keys, resolve, write

__all__ = [
    "check",
    "check_keys",
    "estimate",
    "fit_table",
    "learning_rates",
    "memory_table",
    "methods",
    "resolve",
    "write",
]
