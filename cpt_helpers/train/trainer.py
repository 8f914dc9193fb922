"""LLaMA-Factory's trainer for pre-training, corrected, and stopped when a training diverges.

Only workers import this module: it loads torch and LLaMA-Factory.
"""

from __future__ import annotations

import math
from typing import Any

from llamafactory.train.pt import workflow
from llamafactory.train.pt.trainer import CustomTrainer

from .callback import RunCallback
from .patches import BlockCollator

LARGEST_NORM = 1e6  # of the gradient; healthy runs stay below 100


class CptTrainer(CustomTrainer):
    """Corrects LLaMA-Factory 0.9.3 and transformers 4.52.4 in seven places.

    - Parameter groups with the same settings become one, and empty groups are dropped. DeepSpeed
      0.16.9 drops empty ones by itself; under LoRA torch 2.13 then fails with "zip() argument 2 is
      longer than argument 1". DeepSpeed's universal checkpoints need a single group.
    - Resumed from the last step's checkpoint, transformers would train one more step.
    - Resumed with another micro-batch, transformers would take the checkpoint's: the global batch
      would change.
    - Resumed from a universal checkpoint, each rank still writes its own model states.
    - LLaMA-Factory saves a multimodal model's processor after all callbacks; ours comes last.
    - A loss that is not finite, or exactly 0, stops the training. transformers would log the mean
      of the losses before.
    - A gradient norm that is not finite, or above :data:`LARGEST_NORM`, stops the training.
    """

    def _run_callback(self) -> Any:
        callbacks = self.callback_handler.callbacks
        return next((c for c in callbacks if isinstance(c, RunCallback)), None)

    def create_optimizer(self) -> Any:
        optimizer = super().create_optimizer()
        merge_groups(optimizer)
        return optimizer

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def _inner_training_loop(self, batch_size: int | None = None, *args: Any, **kwargs: Any) -> Any:
        return super()._inner_training_loop(self.args.train_batch_size, *args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        last = self._run_callback()
        self.callback_handler.callbacks.sort(key=lambda other: other is last)
        return super().train(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # Resumed from a universal checkpoint, DeepSpeed 0.16.9 has all ranks write their model
        # states to rank 0's file (https://github.com/deepspeedai/DeepSpeed/issues/7546).
        if settings := getattr(self.model_wrapped, "_config", None):
            settings.load_universal_checkpoint = False
        super()._save_checkpoint(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        value = loss.item()
        if value == 0 or not math.isfinite(value):
            self._run_callback().diverged(self.state.global_step + 1, f"the loss is {value:g}")
        return loss

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, *args: Any, **kwargs: Any
    ) -> Any:
        # Called once after each optimizer step, before that step's checkpoint is written.
        norm = 0.0 if grad_norm is None else float(grad_norm)
        # DeepSpeed reports -1 for a norm that is not finite. Under fp16, loss scaling skips such
        # steps.
        if not 0 <= norm <= LARGEST_NORM and not self.args.fp16:
            size = f"{norm:g}" if norm > LARGEST_NORM else "not finite"
            self._run_callback().diverged(self.state.global_step, f"the gradient norm is {size}")
        return super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)


def correct_workflow() -> None:
    """Makes LLaMA-Factory's pre-training workflow use the corrected trainer and collator."""
    workflow.CustomTrainer = CptTrainer
    workflow.DataCollatorForLanguageModeling = BlockCollator


def merge_groups(optimizer: Any) -> None:
    """Merges parameter groups with the same settings, and drops empty ones."""
    merged: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        settings = {key: value for key, value in group.items() if key != "params"}
        alike = [g for g in merged if {k: v for k, v in g.items() if k != "params"} == settings]
        if alike:
            alike[0]["params"] = [*alike[0]["params"], *group["params"]]
        elif group["params"]:
            merged.append(group)
    optimizer.param_groups[:] = merged
