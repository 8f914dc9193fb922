"""What runs in each Ray worker: its log, its process group, its callback, then LLaMA-Factory.

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

# Optional packages that the libraries import where they find them and that no step needs: the
# driver reports to MLflow, nothing here is scored with scikit-learn, detects objects (what
# transformers has SciPy for) or, without ``plot_loss``, draws. Seconds of every start.
_NOT_NEEDED = ("mlflow", "sklearn", "scipy", "matplotlib")


def train_loop(config: dict[str, Any]) -> None:
    """Trains one rank to the end, from the checkpoint that the driver chose where there is one.

    Args:
        config: ``args`` (the resolved recipe), ``run`` and ``storage`` (whose, where).
    """
    entered = time.time()
    import ray
    import ray.train

    context = ray.train.get_context()
    run = Run(config["run"], Path(config["storage"]))
    handed = take_over(run)
    launch = {"attempt": handed["attempt"], "entered": round(entered, 3)}
    with _log_of(context.get_world_rank(), run.logs, launch["attempt"]):
        print(f"variables from the driver: {', '.join(sorted(handed['variables']))}", flush=True)
        if config["args"].get("use_cpu"):
            patches.join_cpu_group()
        node = ray.get_runtime_context().get_node_id()
        local_rank = context.get_local_rank()
        train_rank(run, config["args"], handed["resume"], launch, node, local_rank)


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
        resumed: The checkpoint to resume from, as ``Checkpoint.handle()`` gives it.
        launch: ``attempt``, which names this launch and restart, and ``entered``, when it began.
        node: Ray's id of this worker's node.
        local_rank: This worker's number on its node.
    """
    import torch.distributed as dist

    for name in _NOT_NEEDED[: 3 if args.get("plot_loss") else 4]:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    patches.correct_llamafactory()
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
    from .trainer import use_own_trainer

    use_own_trainer()
    # DeepSpeed collects garbage a dozen times while it sets up; what was imported is none.
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
    """Takes the run's records back to a step, so that steps done again are in them once.

    ``start`` and ``diverged`` events stay: they tell how often the run was started, and failed.
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
            stays = record.get("event") in ("start", "diverged")
            if stays or 0 < step >= record.get(key, 0):
                kept.append(line + "\n")
        part = path.with_name(f".{path.name}")
        part.write_text("".join(kept), "utf-8")
        part.replace(path)


def _clear_output(output: Path, local_rank: int) -> None:
    """Removes what an earlier attempt left half-written; whole checkpoints are on the storage."""
    import torch.distributed as dist

    if local_rank == 0:
        for left in output.glob("checkpoint-*"):
            shutil.rmtree(left, ignore_errors=True)
    dist.barrier()


def _resume_arguments(
    run: Run, args: Recipe, resumed: dict[str, Any] | None, world_size: int
) -> dict[str, Any]:
    """The arguments by which LLaMA-Factory resumes from a checkpoint, or starts from none."""
    # The driver reports; and a loss that is not finite must not be replaced by a mean.
    changed: dict[str, Any] = {"report_to": "none", "logging_nan_inf_filter": False}
    if not resumed:
        # Without it LLaMA-Factory would resume from whatever it finds in its output folder.
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
    """Sends all a rank prints to ``rank-<n>.log``, a traceback at its end too; a restart adds."""
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
