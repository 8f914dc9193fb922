"""What runs in each Ray worker: its log, its process group, its callbacks, then LLaMA-Factory.

Ray Train calls :func:`train_loop` in every worker with a plain dict. Rank 0 writes the run's events
to ``metrics.jsonl`` on the storage; the driver, the notebooks and the figures read them there.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .streams import redirected
from .tracking import take_variables


def train_loop(config: dict[str, Any]) -> None:
    """Trains one rank to the end.

    Args:
        config: ``args`` (the resolved recipe), ``metrics`` and ``logs`` (paths on the storage),
            ``variables`` (under which the driver laid down environment variables).
    """
    import ray.train

    rank = ray.train.get_context().get_world_rank()
    os.environ.update(take_variables(config["variables"]))
    args = dict(config["args"])
    with _log_of(rank, Path(config["logs"])):
        if args.get("use_cpu"):
            join_cpu_group()
        from llamafactory.train.tuner import _training_function

        checkpoint = ray.train.get_checkpoint()
        with checkpoint.as_directory() if checkpoint else _nothing() as folder:
            args["resume_from_checkpoint"] = str(Path(folder, "checkpoint")) if folder else None
            # Without this LLaMA-Factory would resume from whatever half checkpoint it finds.
            args["overwrite_output_dir"] = True
            args["eval_on_start"] = args.get("eval_on_start", False) and not folder
            tokens = _tokens_per_step(args)
            callback = _make_callback(Path(config["metrics"]), tokens)
            _training_function({"args": args, "callbacks": [callback]})
            callback.write("end", callback.state)  # the final model is written too


def join_cpu_group() -> None:
    """Has DeepSpeed take over the process group on CPUs; unasked, it would think it is alone."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # Only DeepSpeed's inference uses this operator (0.16.9), and making it takes a C++ compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def _tokens_per_step(args: dict[str, Any]) -> int:
    """Tokens of one optimizer step over all workers."""
    micro = args.get("per_device_train_batch_size", 8)
    accumulation = args.get("gradient_accumulation_steps", 1)
    return micro * accumulation * args["cutoff_len"] * args["ray_num_workers"]


def _make_callback(metrics: Path, tokens_per_step: int) -> Any:
    """The callback that writes events and hands checkpoints to Ray; made where torch is loaded."""
    import ray.train
    import torch.distributed as dist
    from transformers import TrainerCallback

    class RunCallback(TrainerCallback):
        """Rank 0's events, an evaluation after the last step, and every rank's checkpoint files."""

        def __init__(self) -> None:
            self.rank = ray.train.get_context().get_world_rank()
            self.logged = (0, 0.0)  # step and time of the last step event
            self.losses: dict[str, float] = {}
            self.evaluating = 0.0

        def write(self, event: str, state: Any, **values: Any) -> None:
            if self.rank == 0:
                line = {"event": event, "step": state.global_step, "time": round(time.time(), 3)}
                with metrics.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line | values) + "\n")

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            engine = kwargs.get("optimizer")
            self.write(
                "start",
                state,
                max_steps=state.max_steps,
                world_size=args.world_size,
                tokens_per_step=tokens_per_step,
                optimizer=type(engine).__name__,
                zero_stage=_zero_stage(args),
                parameters=_parameters(model),
            )
            self.logged = (state.global_step, time.time())
            self.evaluating = time.time()

        def on_step_begin(self, args, state, control, **kwargs):
            if not self.logged[1]:
                self.logged = (state.global_step, time.time())

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step >= state.max_steps and args.eval_strategy != "no":
                control.should_evaluate = True  # also where max_steps is no multiple of eval_steps
            return control

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" not in logs or "learning_rate" not in logs:
                return
            step, since = self.logged
            seconds = (time.time() - since) / max(state.global_step - step, 1)
            self.write(
                "step",
                state,
                loss=logs["loss"],
                learning_rate=logs["learning_rate"],
                grad_norm=logs.get("grad_norm"),
                seconds=round(seconds, 3),
            )
            self.logged = (state.global_step, time.time())
            self.evaluating = time.time()

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            for key, value in metrics.items():
                if key.startswith("eval_") and key.endswith("_loss"):
                    name = key.removeprefix("eval_").removesuffix("_loss")
                    seconds = time.time() - self.evaluating
                    self.losses[name] = value
                    self.write("eval", state, dataset=name, loss=value, seconds=round(seconds, 3))
            self.evaluating = time.time()
            self.logged = (state.global_step, 0.0)

        def on_save(self, args, state, control, **kwargs):
            since = time.time()
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            dist.barrier()  # every rank has written its shard
            measured = {
                "step": state.global_step,
                **{f"loss_{k}": v for k, v in self.losses.items()},
            }
            with _own_files(folder, self.rank, args.world_size) as own:
                ray.train.report(measured, checkpoint=ray.train.Checkpoint.from_directory(own))
            dist.barrier()  # Ray has every rank's files
            if self.rank == 0:
                size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
                shutil.rmtree(folder)
                self.write("save", state, bytes=size, seconds=round(time.time() - since, 3))
            self.logged = (state.global_step, 0.0)

        def on_train_end(self, args, state, control, **kwargs):
            self.state = state
            if self.losses:  # measured after the last step; LLaMA-Factory would do it once more
                args.do_eval = False

    return RunCallback()


@contextmanager
def _own_files(folder: Path, rank: int, world_size: int) -> Iterator[str]:
    """A folder with only the files of a checkpoint that are this rank's to hand over.

    Ray merges what the ranks report, so that one checkpoint is written once. A rank's own are its
    ZeRO shards and its random state; all the rest is rank 0's. They are hard links: nothing is
    copied but by Ray.
    """
    others = [f"_rank_{r}_" for r in range(world_size)]
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".rank-{rank}.") as own:
        for source in sorted(folder.rglob("*")):
            if not source.is_file():
                continue
            name = source.name
            if name.startswith("rng_state_"):
                owner = int(source.stem.removeprefix("rng_state_"))
            else:  # bf16_zero_pp_rank_<r>_mp_rank_00_optim_states.pt, and alike
                owner = next((r for r, mark in enumerate(others) if f"pp{mark}" in name), 0)
            if owner == rank:
                target = Path(own, "checkpoint", source.relative_to(folder))
                target.parent.mkdir(parents=True, exist_ok=True)
                os.link(source, target)
        yield own


def _zero_stage(args: Any) -> int | None:
    plugin = args.hf_deepspeed_config
    return plugin.config.get("zero_optimization", {}).get("stage") if plugin else None


def _parameters(model: Any) -> dict[str, int]:
    """Parameters in all and trained; under ZeRO-3 a rank holds shards, and DeepSpeed the sizes."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return {"all": sum(n for n, _ in sizes), "trained": sum(n for n, grad in sizes if grad)}


@contextmanager
def _log_of(rank: int, folder: Path) -> Iterator[None]:
    """Sends all a rank prints to ``rank-<n>.log``, a traceback at its end too; a restart adds."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank-{rank}.log"
    with path.open("a", encoding="utf-8") as log:
        log.write(f"--- rank {rank}, {time.strftime('%Y-%m-%d %H:%M:%S')}, pid {os.getpid()}\n")
    with redirected(path):
        try:
            yield
        except BaseException:
            traceback.print_exc()
            raise


@contextmanager
def _nothing() -> Iterator[None]:
    yield None
