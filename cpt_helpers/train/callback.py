"""What a worker does at each event of a training: records it, and hands checkpoints to Ray.

Only workers import this module: it loads torch and transformers. Rank 0 writes the events to
``metrics.jsonl`` on the storage; the driver, the notebooks and the figures read them there.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
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
        run: Whose training this is.
        recipe: Its resolved recipe.
        resumed: The checkpoint that the training resumes from, as ``Checkpoint.handle()`` gives it.
        launch: What the ``start`` event records of this launch: the attempt, times, memory.
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
        self.held_out = recipe.held_out.get("domain")
        self.on_gpu = not recipe.use_cpu
        self.logged = (0, 0.0)  # step and time of the last step event
        self.measured: tuple[int, dict[str, float]] = (-1, {})  # held-out losses, and their step
        self.last = 0.0  # when the trainer last called: what follows began then
        self.base = ""  # of an adapter: the sha256 of the weights it is trained on
        self.flops_per_token = 0.0
        self.peak_flops: float | None = None  # of all workers' devices
        self.peaks: list[int] = []  # memory of each rank after the last step

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
        self._append("diverged", step, rank=self.rank, reason=reason, **self._attempt())
        raise DivergedError(f"the training diverged at step {step} on rank {self.rank}: {reason}")

    def _attempt(self) -> dict[str, str]:
        return {"attempt": self.launch.get("attempt", "")}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        # A checkpoint's state would override these settings of the recipe.
        state.compute_steps(args, state.max_steps)
        verified = weights.verify(model, self.recipe, self.resumed)
        precision = "bfloat16" if self.recipe.get("bf16") else "float32"
        device, peak = flops.peak_flops(self.on_gpu, precision)
        own = {"node": self.node, "pid": os.getpid(), "device": device, "peak_flops": peak}
        ranks = all_ranks(own)
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
            weights=verified.as_dict(),
            **self.launch,
        )
        base = Path(self.recipe["model_name_or_path"])
        if self.rank == 0 and self.recipe.method == "lora" and base.is_dir():
            self.base = models.weights_sha256(base)
        self.logged = (state.global_step, time.time())
        self.last = time.time()

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.logged[1]:
            self.logged = (state.global_step, time.time())

    def on_step_end(self, args, state, control, **kwargs):
        self.last = time.time()
        if state.global_step >= state.max_steps and args.eval_strategy == "steps":
            control.should_evaluate = True  # also where max_steps is no multiple of eval_steps
        return control

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs or "learning_rate" not in logs:
            return
        step, since = self.logged
        seconds = (time.time() - since) / max(state.global_step - step, 1)
        speed = self.tokens_per_step / seconds
        self.write(
            "step",
            state.global_step,
            loss=logs["loss"],
            learning_rate=logs["learning_rate"],
            grad_norm=logs.get("grad_norm"),
            seconds=round(seconds, 3),
            tokens_per_second=round(speed, 1),
            mfu=round(speed * self.flops_per_token / self.peak_flops, 4)
            if self.peak_flops
            else None,
            memory=flops.peak_memory(self.on_gpu),
        )
        self.logged = (state.global_step, time.time())
        self.last = time.time()

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        step = state.global_step
        losses = self.measured[1] if self.measured[0] == step else {}
        for key, value in metrics.items():
            if key.startswith("eval_") and key.endswith("_loss"):
                name = key.removeprefix("eval_").removesuffix("_loss")
                if value == 0 or not math.isfinite(value):
                    self.diverged(step, f"the held-out loss on {name} is {value:g}")
                seconds = round(time.time() - self.last, 3)
                losses[name] = value
                self.write("eval", step, dataset=name, loss=value, seconds=seconds)
        self.measured = (step, losses)
        self.last = time.time()
        self.logged = (step, 0.0)

    def on_save(self, args, state, control, **kwargs):
        written = Path(args.output_dir, f"checkpoint-{state.global_step}")
        target = _next_checkpoint(self.run)
        if self.rank == 0:
            manifests.clear(target)
            self._note_base(written)
        dist.barrier()  # every rank has written its files, and the target is free
        moved = all_ranks(manifests.move_own(written, target / "checkpoint", self.rank))
        files = {name: file for own in moved for name, file in own.items()}
        losses = self.measured[1] if self.measured[0] == state.global_step else {}
        _register(state.global_step, losses)
        dist.barrier()  # every rank has reported it to Ray
        shutil.rmtree(written, ignore_errors=True)  # empty folders, on each node's disk
        if self.rank == 0:
            size = manifests.write_manifest(
                target, state.global_step, args.world_size, files, losses
            )
            seconds = round(time.time() - self.last, 3)  # includes the trainer's writing
            self.write("save", state.global_step, bytes=size, seconds=seconds, path=str(target))
            keep = self.recipe.get("save_total_limit")
            manifests.prune(self.run, keep, self.held_out, newest=target)
        self.logged = (state.global_step, 0.0)

    def on_train_end(self, args, state, control, **kwargs):
        self.steps = state.global_step
        ranks = all_ranks({"memory": flops.peak_memory(self.on_gpu)})
        self.peaks = [rank["memory"] for rank in ranks]
        before = self.resumed and self.resumed["step"] >= state.max_steps
        if self.measured[1] or before:  # LLaMA-Factory would measure once more
            args.do_eval = False

    def end(self) -> None:
        """Records the end of the training; the final model is written."""
        self._note_base(self.run.output)
        peaks = [flops.peak_memory(self.on_gpu), *self.peaks[1:]]
        self.write("end", self.steps, memory=peaks)

    def _note_base(self, folder: Path) -> None:
        if self.base:
            models.note_base(folder, self.recipe["model_name_or_path"], self.base)


def all_ranks(own: dict[str, Any]) -> list[dict[str, Any]]:
    """Gathers a value of every rank, in the order of the ranks; waits for all of them."""
    everyone: list[Any] = [own] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return everyone


def _next_checkpoint(run: Run) -> Path:
    """Where Ray will look for the checkpoint that is reported next."""
    import ray.train

    storage = ray.train.get_context().get_storage()
    name = storage._make_checkpoint_dir_name(storage.current_checkpoint_index + 1)
    return run.folder / storage.trial_dir_name / name


def _register(step: int, losses: dict[str, float]) -> None:
    """Reports a checkpoint whose files are in place to Ray, which has nothing left to copy."""
    import ray.train

    measured = {"step": step, **{f"loss_{name}": loss for name, loss in losses.items()}}
    with tempfile.TemporaryDirectory() as empty:
        ray.train.report(measured, checkpoint=ray.train.Checkpoint.from_directory(empty))


def _zero_stage(args: Any) -> int | None:
    plugin = getattr(args, "hf_deepspeed_config", None)  # absent without DeepSpeed
    return plugin.config.get("zero_optimization", {}).get("stage") if plugin else None


def _parameters(model: Any) -> dict[str, int]:
    """Parameters in all and trained; under ZeRO-3 a rank holds shards, and DeepSpeed the sizes."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return {"all": sum(n for n, _ in sizes), "trained": sum(n for n, grad in sizes if grad)}
