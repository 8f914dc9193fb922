"""The allowed range of every number in a recipe, in one table.

LLaMA-Factory and transformers check the types of numbers, but few ranges. Other values fail in a
worker a minute later, or change the training silently.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..recipes import Recipe, where_of

_CORRECT = "correct the value"


@dataclass(frozen=True)
class Range:
    """The values that a number may have."""

    lowest: float  # the lowest value
    highest: float  # the highest value
    unit: str  # what the number counts or measures
    above: bool = False  # whether ``lowest`` itself is excluded
    below: bool = False  # whether ``highest`` itself is excluded
    also: tuple[float, ...] = ()  # values outside the range that have a special meaning
    never: tuple[float, ...] = ()  # values inside the range that are refused
    whole_above: float = math.inf  # from this value on, only whole numbers are allowed
    do: str = _CORRECT  # what to write instead

    def holds(self, value: float) -> bool:
        """Whether a value is allowed. NaN and infinity are never allowed."""
        if not math.isfinite(value) or value in self.also:
            return value in self.also
        low = value > self.lowest if self.above else value >= self.lowest
        high = value < self.highest if self.below else value <= self.highest
        whole = value < self.whole_above or float(value).is_integer()
        return low and high and whole and value not in self.never

    def __str__(self) -> str:
        parts = [f"{self.unit}: {self.lowest:,g} or more"]
        if self.above:
            parts = [f"{self.unit}: more than {self.lowest:,g}"]
        if self.highest < math.inf:
            parts.append(f"{'less than' if self.below else 'at most'} {self.highest:,g}")
        parts += [f"not {value:g}" for value in self.never]
        if self.whole_above < math.inf:
            parts.append(f"a whole number from {self.whole_above:g} on")
        return ", ".join([*parts, *(f"or {value:g}" for value in self.also)])


def _count(unit: str, lowest: int = 1, do: str = _CORRECT) -> Range:
    return Range(lowest, math.inf, unit, do=do)


def _positive(unit: str) -> Range:
    return Range(0, math.inf, unit, above=True)


def _share(unit: str, above: bool = False, below: bool = False, do: str = _CORRECT) -> Range:
    return Range(0, 1, unit, above, below, do=do)


def _every(event: str, do: str) -> Range:
    """Steps between two events. Below 1, transformers reads a share of all steps."""
    return Range(0, math.inf, f"steps from one {event} to the next, or a share of all steps",
                 above=True, whole_above=1, do=do)  # fmt: skip


_STATES = "decay of the optimizer's moments"

# Every number that continued pre-training reads. The numbers of other stages, of generation and of
# LLaMA-Factory's export are not used, so only NaN and infinity are refused there.
RANGES: dict[str, Range] = {
    # steps of the optimizer
    "learning_rate": Range(0, 1, "step size", above=True, do="1e-6 to 1e-3 is usual: write 1.0e-5"),
    "warmup_ratio": _share("share of all steps", do="0.03 to 0.1 is usual"),
    "warmup_steps": _count("steps", 0),
    "weight_decay": _share("share per unit of learning rate", do="0 to 0.1 is usual"),
    "adam_beta1": _share(_STATES, below=True, do="0.9 is usual"),
    "adam_beta2": _share(_STATES, below=True, do="0.95 to 0.999 is usual"),
    "adam_epsilon": _share("added to the denominator", above=True, below=True, do="write 1.0e-8"),
    "max_grad_norm": Range(0, math.inf, "gradient norm, 0 for no limit", do="1.0 is usual"),
    "label_smoothing_factor": _share("share of the target", below=True),
    "neftune_noise_alpha": Range(0, math.inf, "noise"),
    "moe_aux_loss_coef": Range(0, math.inf, "weight of the loss that balances experts"),
    "lr_scheduler_kwargs.min_lr_rate": _share("share of learning_rate", do="0.1 is usual"),
    "lr_scheduler_kwargs.min_lr": _share("learning rate"),
    "lr_scheduler_kwargs.lr_end": _share("learning rate"),
    "lr_scheduler_kwargs.num_cycles": _positive("cycles"),
    "lr_scheduler_kwargs.power": _positive("exponent"),
    "lr_scheduler_kwargs.timescale": _count("steps"),
    "lr_scheduler_kwargs.num_decay_steps": _count("steps", 0),
    "lr_scheduler_kwargs.num_stable_steps": _count("steps", 0),
    "lr_scheduler_kwargs.min_lr_ratio": _share("share of learning_rate"),
    # length of the training
    "num_train_epochs": _positive("passes over the corpus"),
    "max_steps": Range(1, math.inf, "steps", also=(-1,),
                       do="a number of steps, or leave it out and set num_train_epochs"),
    "save_steps": _every("checkpoint", "a number of steps; save_strategy: 'no' saves none"),
    "eval_steps": _every("evaluation", "a number of steps; eval_strategy: 'no' evaluates nothing"),
    "logging_steps": _every("log line", "a number of steps: 1 logs each"),
    "eval_delay": Range(0, math.inf, "steps or epochs"),
    "early_stopping_steps": _count("evaluations"),
    "save_total_limit": _count(
        "checkpoints kept next to the best one",
        do="write 1 or more, or leave the key out to keep every checkpoint. "
        "0 and less also keep every one, until the disk is full",
    ),
    "torch_empty_cache_steps": _count("steps"),
    # sizes
    "cutoff_len": Range(2, 2**20, "tokens in a block"),
    "per_device_train_batch_size": _count("blocks"),
    "per_device_eval_batch_size": _count("blocks"),
    "gradient_accumulation_steps": _count("micro-batches"),
    "eval_accumulation_steps": _count("micro-batches"),
    "ray_num_workers": _count("workers"),
    "max_samples": _count("documents", do="leave it out to take all"),
    "val_size": Range(0, math.inf, "share of the documents, or their number", whole_above=1),
    "buffer_size": _count("documents"),
    "preprocessing_batch_size": _count("documents"),
    "preprocessing_num_workers": Range(1, 1024, "processes"),
    "dataloader_num_workers": Range(0, 256, "processes for each worker"),
    "dataloader_prefetch_factor": _count("batches"),
    "ddp_bucket_cap_mb": _count("MiB"),
    "ddp_timeout": Range(
        10, 86400, "seconds that a collective may take",
        do="half an hour, such as 1800. With years, a hung run never stops and is always paid for",
    ),
    "seed": Range(0, 2**32 - 1, "seed"),
    "data_seed": Range(0, 2**32 - 1, "seed"),
    # what is trained
    "lora_rank": _count("width of an adapter"),
    "lora_alpha": _count("scale of an adapter", do="twice lora_rank is usual"),
    "lora_dropout": _share("share of an adapter's inputs", below=True),
    "loraplus_lr_ratio": _positive("factor of the learning rate"),
    "loraplus_lr_embedding": _share("learning rate", above=True),
    "pissa_iter": Range(1, math.inf, "iterations", also=(-1,)),
    "freeze_trainable_layers": Range(
        -1024, 1024, "layers that are trained: the last ones, or the first ones if negative",
        never=(0,), do="a number of layers; finetuning_type: full trains all",
    ),
    "quantization_bit": Range(2, 8, "bits"),
    "galore_rank": _count("rank"),
    "galore_update_interval": _count("steps"),
    "galore_scale": _positive("factor"),
    "apollo_rank": _count("rank"),
    "apollo_update_interval": _count("steps"),
    "apollo_scale": _positive("factor"),
    "badam_start_block": _count("index of a block", 0),
    "badam_switch_interval": Range(1, math.inf, "steps", also=(-1,)),
    "badam_update_ratio": _share("share of the parameters", above=True),
}  # fmt: skip
_RESOURCES = "resources_per_worker."
_RESOURCE = Range(0, math.inf, "amount of a resource")


def problems(args: Recipe, path: Path, overrides: dict[str, Any]) -> Iterator[ConfigError]:
    """Every number of a recipe that is out of its range, NaN or infinite.

    Args:
        args: The recipe's keys with their values.
        path: The recipe's file.
        overrides: The keys that do not come from the file.
    """
    for key, value in _numbers(args):
        allowed = _RESOURCE if key.startswith(_RESOURCES) else RANGES.get(key)
        number, do = _as_number(value), allowed.do if allowed else _CORRECT
        if number is None:
            problem, do = "is not a number", _as_yaml_number(value)
        elif not math.isfinite(number):
            problem = "is not a finite number"
        elif allowed and not allowed.holds(number):
            problem = "is out of range"
        else:
            continue
        where = where_of(path, key.split(".")[0], overrides)
        expected = str(allowed or "a finite number")
        yield ConfigError(f"{key}: {value!r} {problem}", where=where, expected=expected, do=do)


def _numbers(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Every number by its dotted key, and every value of a key that expects a number."""
    for name, value in values.items():
        key = f"{above}{name}"
        if isinstance(value, list):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, dict):
            yield from _numbers(value, f"{key}.")
        elif _as_number(value) is not None or key in RANGES or above == _RESOURCES:
            yield key, value


def _as_number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _as_yaml_number(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+e[+-]?\d+", value.strip(), re.I):
        return f"YAML reads {value} as text: write {float(value):.1e}"
    return "write a number"
