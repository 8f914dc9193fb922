"""Callback of the trainer in each worker: records events and hands checkpoints to Ray.

Only workers import this module: it loads torch and transformers. Rank 0 writes the events to
``metrics.jsonl`` on the storage; the driver, the notebooks and the figures read them.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback

from ..checkpoints import manifests
from ..config import flops
from ..errors import DivergedError
from ..recipes import Recipe
from ..run import Run
from ..setup import models
from . import weights


class RunCallback(TrainerCallback):
    """Records events, evaluates after the last step, and hands over every rank's checkpoint files.

    Args:
        run: The run that is trained.
        recipe: Its resolved recipe.
        resumed: The checkpoint that the training resumes from, as ``Checkpoint.handle()`` gives it.
        launch: Recorded in the ``start`` event: the attempt, times, memory.
        node: Ray's id of this worker's node.
    """

    def __init__(
        self,
        run: Run,
        recipe: Recipe,
        resumed: dict[str, Any] | None,
        launch: dict[str, Any],
        node: str = "",
    ) -> None:
        self.run, self.recipe, self.resumed, self.launch = run, recipe, resumed, launch
        self.node, self.rank = node, dist.get_rank()
        self.tokens_per_step = recipe.global_batch * recipe.block_size
        self.on_gpu = not recipe.use_cpu
        self.logged = (0, 0.0)  # step and time of the last step event
        self.measured: tuple[int, dict[str, float]] = (-1, {})  # held-out losses, and their step
        self.last_call = 0.0  # the trainer's next task began at this time
        self.base = ""  # of an adapter: the sha256 of the weights it is trained on
        self.flops_per_token = 0.0
        self.peak_flops: float | None = None  # of all workers' devices
        self.peak_memory: list[int] = []  # of each rank after the last step

    def write(self, event: str, step: int, **values: Any) -> None:
        """Appends an event to the run's ``metrics.jsonl``; only rank 0 does."""
        if self.rank == 0:
            self._append(event, step, **values)

    def _append(self, event: str, step: int, **values: Any) -> None:
        line = {"event": event, "step": step, "time": round(time.time(), 3)}
        with self.run.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line | values) + "\n")

    def diverged(self, step: int, reason: str) -> None:
        """Records that the training diverged, and ends it before another checkpoint is written.

        Raises:
            DivergedError: Always.
        """
        attempt = self.launch.get("attempt", "")
        self._append("diverged", step, rank=self.rank, reason=reason, attempt=attempt)
        raise DivergedError(f"the training diverged at step {step} on rank {self.rank}: {reason}")

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        # A checkpoint's state would override the recipe's logging, saving and evaluation steps.
        state.compute_steps(args, state.max_steps)
        verified = weights.verify(model, self.recipe, self.resumed)
        precision = "bfloat16" if self.recipe.get("bf16") else "float32"
        device, peak = flops.peak_flops(self.on_gpu, precision)
        ranks = all_ranks(
            {"node": self.node, "pid": os.getpid(), "device": device, "peak_flops": peak}
        )
        every, trained = flops.text_parameters(model)
        self.flops_per_token = flops.flops_per_token(
            model.config, every, trained, self.recipe.block_size
        )
        peaks = [rank["peak_flops"] for rank in ranks]
        self.peak_flops = sum(peaks) if all(peaks) else None
        self.write(
            "start",
            state.global_step,
            max_steps=state.max_steps,
            world_size=args.world_size,
            tokens_per_step=self.tokens_per_step,
            optimizer=type(kwargs.get("optimizer")).__name__,
            zero_stage=_zero_stage(args),
            parameters=_parameters(model),
            ranks=ranks,
            resumed_from=self.resumed
            and str(Path(self.resumed["path"]).relative_to(self.run.folder)),
            flops_per_token=self.flops_per_token,
            eval_on_start=bool(args.eval_on_start),
            eval_strategy=str(args.eval_strategy.value),
            weights=asdict(verified),
            **self.launch,
        )
        base = Path(self.recipe["model_name_or_path"])
        if self.rank == 0 and self.recipe.method == "lora" and base.is_dir():
            self.base = models.weights_sha256(base)
        self._step_recorded(state.global_step)

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.logged[1]:
            self.logged = (state.global_step, time.time())

    def on_step_end(self, args, state, control, **kwargs):
        self.last_call = time.time()
        if state.global_step >= state.max_steps and args.eval_strategy == "steps":
            control.should_evaluate = True  # also where max_steps is no multiple of eval_steps
        return control

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs or "learning_rate" not in logs:
            return
        step, since = self.logged
        seconds = (time.time() - since) / max(state.global_step - step, 1)
        speed = self.tokens_per_step / seconds
        mfu = speed * self.flops_per_token / self.peak_flops if self.peak_flops else None
        self.write(
            "step",
            state.global_step,
            loss=logs["loss"],
            learning_rate=logs["learning_rate"],
            grad_norm=logs.get("grad_norm"),
            seconds=round(seconds, 3),
            tokens_per_second=round(speed, 1),
            mfu=mfu and round(mfu, 4),
            memory=flops.peak_memory(self.on_gpu),
        )
        self._step_recorded(state.global_step)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        step = state.global_step
        losses = self._losses_at(step)
        for key, value in metrics.items():
            if key.startswith("eval_") and key.endswith("_loss"):
                name = key.removeprefix("eval_").removesuffix("_loss")
                if value == 0 or not math.isfinite(value):
                    self.diverged(step, f"the held-out loss on {name} is {value:g}")
                seconds = round(time.time() - self.last_call, 3)
                losses[name] = value
                self.write("eval", step, dataset=name, loss=value, seconds=seconds)
        self.measured = (step, losses)
        self.last_call = time.time()
        self.logged = (step, 0.0)

    def on_save(self, args, state, control, **kwargs):
        written = Path(args.output_dir, f"checkpoint-{state.global_step}")
        target = _next_checkpoint(self.run)
        if self.rank == 0:
            manifests.clear(target)
            self._note_base(written)
        dist.barrier()  # every rank has written its files, and the target is free
        moved = all_ranks(manifests.move_own(written, target / "checkpoint", self.rank))
        files = {name: file for of_rank in moved for name, file in of_rank.items()}
        losses = self._losses_at(state.global_step)
        _register(state.global_step, losses)
        dist.barrier()  # every rank has reported it to Ray
        shutil.rmtree(written, ignore_errors=True)  # empty folders, on each node's disk
        if self.rank == 0:
            size = manifests.write_manifest(
                target, state.global_step, args.world_size, files, losses
            )
            seconds = round(time.time() - self.last_call, 3)  # includes the trainer's writing
            self.write("save", state.global_step, bytes=size, seconds=seconds, path=str(target))
            keep, held_out = self.recipe.get("save_total_limit"), self.recipe.held_out
            manifests.prune(self.run, keep, held_out.get("domain"), newest=target)
        self.logged = (state.global_step, 0.0)

    def on_train_end(self, args, state, control, **kwargs):
        self.steps = state.global_step
        self.peak_memory = all_ranks(flops.peak_memory(self.on_gpu))
        was_complete = self.resumed and self.resumed["step"] >= state.max_steps
        if self.measured[1] or was_complete:  # LLaMA-Factory would measure once more
            args.do_eval = False

    def end(self) -> None:
        """Records the end of the training; the final model is written."""
        self._note_base(self.run.output)
        memory = [flops.peak_memory(self.on_gpu), *self.peak_memory[1:]]
        self.write("end", self.steps, memory=memory)

    def _step_recorded(self, step: int) -> None:
        self.logged = (step, time.time())
        self.last_call = time.time()

    def _losses_at(self, step: int) -> dict[str, float]:
        return self.measured[1] if self.measured[0] == step else {}

    def _note_base(self, folder: Path) -> None:
        if self.base:
            models.note_base(folder, self.recipe["model_name_or_path"], self.base)


def all_ranks(value: Any) -> list[Any]:
    """Gathers a value of every rank, in the order of the ranks; waits for all of them."""
    values: list[Any] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _next_checkpoint(run: Run) -> Path:
    """The folder that Ray assigns to the next reported checkpoint."""
    import ray.train

    storage = ray.train.get_context().get_storage()
    name = storage._make_checkpoint_dir_name(storage.current_checkpoint_index + 1)
    return run.folder / storage.trial_dir_name / name


def _register(step: int, losses: dict[str, float]) -> None:
    """Reports a checkpoint to Ray. Its files are in place, so Ray gets an empty folder to copy."""
    import ray.train

    measured = {"step": step, **{f"loss_{name}": loss for name, loss in losses.items()}}
    with tempfile.TemporaryDirectory() as empty:
        ray.train.report(measured, checkpoint=ray.train.Checkpoint.from_directory(empty))


def _zero_stage(args: Any) -> int | None:
    plugin = getattr(args, "hf_deepspeed_config", None)  # absent without DeepSpeed
    return plugin.config.get("zero_optimization", {}).get("stage") if plugin else None


def _parameters(model: Any) -> dict[str, int]:
    """Numbers of parameters; under ZeRO-3 a rank holds shards, and DeepSpeed knows the sizes."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return {"all": sum(n for n, _ in sizes), "trained": sum(n for n, grad in sizes if grad)}
