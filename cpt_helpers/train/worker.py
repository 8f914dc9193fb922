"""The training in each Ray worker: its log, process group and callback, then LLaMA-Factory.

Ray Train calls :func:`train_loop` in every worker with a plain dict.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checkpoints import resharding
from ..config import flops
from ..recipes import Recipe
from ..redirect import redirected
from ..run import Run
from . import patches
from .worker_env import take_over

# Optional packages that the libraries import if installed, which takes seconds at every start. No
# worker needs them: the driver reports to MLflow, transformers uses SciPy for object detection, and
# matplotlib is needed for ``plot_loss`` only.
_NOT_NEEDED = ("mlflow", "sklearn", "scipy", "matplotlib")


def train_loop(config: dict[str, Any]) -> None:
    """Trains one rank to the end, from the checkpoint that the driver chose, if any.

    Args:
        config: ``args`` (the resolved recipe), ``run`` (its name) and ``storage`` (its path).
    """
    entered = time.time()
    import ray
    import ray.train

    context = ray.train.get_context()
    run, args = Run(config["run"], Path(config["storage"])), Recipe(config["args"])
    passed = take_over(run)
    launch = {"attempt": passed["attempt"], "entered": round(entered, 3)}
    with _log_of(context.get_world_rank(), run.logs, launch["attempt"]):
        print(f"variables from the driver: {', '.join(sorted(passed['variables']))}", flush=True)
        if args.use_cpu:
            patches.join_cpu_group()
        node = ray.get_runtime_context().get_node_id()
        train_rank(run, args, passed["resume"], launch, node, context.get_local_rank())


def train_rank(
    run: Run,
    args: Recipe,
    resumed: dict[str, Any] | None,
    launch: dict[str, Any],
    node: str = "",
    local_rank: int = 0,
) -> None:
    """Trains one rank whose process group exists.

    Args:
        run: Whose storage and records are used.
        args: The resolved recipe.
        resumed: The checkpoint to resume from, as ``Checkpoint.handle()`` returns it.
        launch: ``attempt``, the name of this launch or restart, and ``entered``, its start time.
        node: Ray's id of this worker's node.
        local_rank: This worker's number on its node.
    """
    import torch.distributed as dist

    for name in _NOT_NEEDED[: 3 if args.get("plot_loss") else 4]:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    patches.freeze_whole_layers()
    if args.get("deepspeed"):
        patches.correct_deepspeed(args.ddp_timeout)
    if dist.get_rank() == 0:
        rewind(run, resumed["step"] if resumed else 0)
    if resumed:
        print(f"resuming from step {resumed['step']}, {resumed['path']}", flush=True)
    _clear_output(Path(args["output_dir"]), local_rank)
    args = args | _resume_arguments(run, args, resumed, dist.get_world_size())
    import torch
    from llamafactory.train.tuner import _training_function

    from .callback import RunCallback
    from .trainer import correct_workflow

    correct_workflow()
    # DeepSpeed collects garbage a dozen times at its start; imported modules need no scan.
    gc.freeze()
    torch.serialization.set_crc32_options(False)  # the manifest has a sha256 of every file
    launch = launch | {
        "imported": round(time.time(), 3),
        "memory_before": flops.peak_memory(),  # the libraries loaded, and no model
    }
    callback = RunCallback(run, args, resumed, launch, node)
    _training_function({"args": args, "callbacks": [callback]})
    callback.end()


def rewind(run: Run, step: int) -> None:
    """Removes records after a step, so that repeated steps are recorded once.

    ``start`` and ``diverged`` events stay: they count the starts and failures of the run.
    """
    for path, key in ((run.metrics, "step"), (run.output / "trainer_log.jsonl", "current_steps")):
        if not path.is_file():
            continue
        kept = []
        for line in path.read_text("utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # cut short by the crash
                continue
            is_kept = record.get("event") in ("start", "diverged")
            if is_kept or 0 < step >= record.get(key, 0):
                kept.append(line + "\n")
        part = path.with_name(f".{path.name}")
        part.write_text("".join(kept), "utf-8")
        part.replace(path)


def _clear_output(output: Path, local_rank: int) -> None:
    """Removes checkpoints that an earlier attempt did not finish; whole ones are elsewhere."""
    import torch.distributed as dist

    if local_rank == 0:
        for unfinished in output.glob("checkpoint-*"):
            shutil.rmtree(unfinished, ignore_errors=True)
    dist.barrier()


def _resume_arguments(
    run: Run, args: Recipe, resumed: dict[str, Any] | None, world_size: int
) -> dict[str, Any]:
    """LLaMA-Factory's arguments to resume from a checkpoint, or to start without one."""
    # The driver reports. A loss that is not finite must not be replaced by a mean.
    changed: dict[str, Any] = {"report_to": "none", "logging_nan_inf_filter": False}
    if not resumed:
        # Otherwise LLaMA-Factory would resume from any checkpoint in its output folder.
        return changed | {"overwrite_output_dir": True, "resume_from_checkpoint": None}
    folder = Path(resumed["path"], "checkpoint")
    if args.get("deepspeed") and resumed["world_size"] != world_size:
        folder = resharding.universal_folder(run, resumed["step"], world_size)
        settings = json.loads(Path(args["deepspeed"]).read_text("utf-8"))
        changed["deepspeed"] = resharding.settings_for_universal(settings)
    return changed | {
        "overwrite_output_dir": False,  # keeps the trainer's own log
        "resume_from_checkpoint": str(folder),
        "eval_on_start": False,
    }


@contextmanager
def _log_of(rank: int, folder: Path, attempt: str) -> Iterator[None]:
    """Appends all output of a rank to ``rank-<n>.log``, a final traceback included."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank-{rank}.log"
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    with path.open("a", encoding="utf-8") as log:
        log.write(f"--- rank {rank}, attempt {attempt}, {now}, pid {os.getpid()}\n")
    with redirected(path):
        try:
            yield
        except BaseException:
            traceback.print_exc()
            raise
