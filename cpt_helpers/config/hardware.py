"""A recipe on given hardware: memory by ZeRO stage, GPUs that fit, hours and price."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import display
from ..errors import ParameterError, nearest
from ..recipes import DEEPSPEED_CONFIGS, Recipe, read_recipe
from ..redirect import hushed
from . import flops, memory, planning
from .flops import ModelSize

if TYPE_CHECKING:
    from pandas import DataFrame

USABLE = 0.94  # of a GPU's memory; fragments and other libraries take the rest
IDLE = 0.40  # of a GPU's memory: if more is unused, the plan warns
FILLED = 0.85  # of a GPU's memory: the most that a proposed micro-batch may take
# Tokens per second of one GPU in the guide's run: 20 steps of 8 x 512 tokens in 1.9 s each on four
# L40S, from its log. It is valid for a recipe with these settings and ZeRO-3.
MEASURED = ("L40S", 539.0, "the guide's run, with the guide's settings")
MEASURED_WITH = {
    "model_name_or_path": "google/gemma-3-4b-pt", "finetuning_type": "full", "cutoff_len": 512,
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "ray_num_workers": 4,
    "bf16": True, "disable_gradient_checkpointing": False, "enable_liger_kernel": False,
}  # fmt: skip
_SHOWN_FOLDER = (str(DEEPSPEED_CONFIGS), "deepspeed-configs")
METHODS = ("full", "freeze", "lora")
# Model FLOPs utilization, the share of a GPU's peak: bounds of a speed that was not measured.
MFU = {
    "slow": (0.035, "3.5 % of the peak, as the guide's run with a micro-batch of one block"),
    "fast": (0.40, "40 % of the peak, the assumed best case with full micro-batches"),
}


@dataclass(frozen=True)
class Fit:
    """A recipe on a kind of GPU."""

    change: str  # the last change of the recipe; empty for the recipe itself
    memory: memory.Memory  # the peak of a worker
    capacity: float  # the GPU's memory in bytes

    @property
    def fits(self) -> bool:
        return self.memory.peak <= USABLE * self.capacity


@dataclass(frozen=True)
class Unused:
    """Memory that a recipe leaves unused on a GPU, and the micro-batch that would use it."""

    gpu: str  # a key of :data:`flops.GPUS`
    free: float  # unused bytes
    share: float  # unused share of the GPU
    largest: int  # blocks of a micro-batch that fills the GPU to :data:`FILLED`
    # the largest micro-batch with the same global batch; empty if there is no larger
    changes: dict[str, int]
    peak: int  # the peak of a worker with these changes, in bytes

    def __str__(self) -> str:
        text = f"{100 * self.share:.0f} % of an {self.gpu} is unused, {self.free / 2**30:.1f} GiB"
        room = f"there is room for per_device_train_batch_size: {self.largest}"
        if self.changes:
            changes = ", ".join(f"{key}: {value}" for key, value in self.changes.items())
            text += f"; {changes} would use {self.peak / 2**30:.1f} GiB with the same global batch"
            if self.changes["per_device_train_batch_size"] == self.largest:
                return text
            return f"{text}; {room} with a larger one"
        fewer = "fewer workers with more blocks each, or a larger global batch"
        return f"{text}; {room}, which takes {fewer}" if self.largest > 1 else text


@dataclass(frozen=True)
class Cost:
    """The time and price of a run."""

    tokens_per_second: float  # the speed of all workers
    source: str  # where the speed comes from
    hours: float  # hours of the steps; start-up, evaluation and checkpoints come on top
    price: float | None  # the price of these hours; ``None`` without a price per hour


def gpu_of(args: Recipe, named: str = "") -> str | None:
    """The kind of GPU of a recipe: the named one, or the one it asks for; ``None`` if unknown.

    Raises:
        ParameterError: The named GPU is not known.
    """
    if named:
        key = flops.gpu_named(named)
        if key is None:
            raise ParameterError(
                f"unknown GPU '{named}'",
                expected=f"one of {', '.join(flops.GPUS)} ({nearest(named, flops.GPUS)})",
                do="give one of these",
            )
        return key
    for resource in args.get("resources_per_worker") or {}:
        label = re.search(r"accelerator_(?:type:|shape:\d+x)(.+)", resource)
        if label and (key := flops.gpu_named(label[1])):
            return key
    return None


def fits(args: Recipe, shape: memory.Shape, gpu: str) -> list[Fit]:
    """The recipe on a kind of GPU and, if it does not fit, changes until it fits.

    The cheapest changes come first: those that cost no speed, then others, then offloading.

    Args:
        args: The resolved recipe; ``deepspeed`` is a file that can be read.
        shape: The recipe's model.
        gpu: A key of :data:`flops.GPUS`.
    """
    capacity = flops.GPUS[gpu][1] * 2**30
    tried = [Fit("", memory.of_worker(args, shape), capacity)]
    for keys in _changes(args):
        if tried[-1].fits:
            break
        args = args | keys
        change = ", ".join(f"{key}: {value}" for key, value in keys.items())
        for value, shown in (("True", "true"), ("False", "false"), _SHOWN_FOLDER):
            change = change.replace(value, shown)
        tried.append(Fit(change, memory.of_worker(args, shape), capacity))
    return tried


def _changes(args: Recipe) -> Iterator[dict[str, Any]]:
    """Changes that make a recipe smaller, each on top of the ones before."""
    if args.precision == "float32":
        yield {"bf16": True}
    if args.micro_batch > 1:
        batch = args.accumulation * args.micro_batch
        yield {"per_device_train_batch_size": 1, "gradient_accumulation_steps": batch}
    if not args.get("enable_liger_kernel"):
        yield {"enable_liger_kernel": True}
    if args.get("disable_gradient_checkpointing"):
        yield {"disable_gradient_checkpointing": False}
    for name, stage in (("z2", 2), ("z3", 3), ("z3_offload", 4)):
        if stage > memory.settings_of(args).stage:
            yield {"deepspeed": _deepspeed_file(name)}


def _deepspeed_file(name: str) -> str:
    return str(DEEPSPEED_CONFIGS / f"ds_{name}_config.json")


def fit_table(args: Recipe, gpus: Iterable[str]) -> DataFrame:
    """Whether a resolved recipe fits on each GPU, and the changes that make it fit."""
    shape, rows = planning.shape_of(args), []
    for gpu in gpus:
        tried = fits(args, shape, gpu)
        rows.append({
            "GPU": gpu,
            "GiB": flops.GPUS[gpu][1],
            "GiB needed": round(tried[0].memory.peak / 2**30, 1),
            "changes": " + ".join(fit.change for fit in tried[1:]) or "none",
            "GiB needed with changes": round(tried[-1].memory.peak / 2**30, 1),
            "fits": tried[-1].fits,
        })  # fmt: skip
    return display.table(rows)


def unused(args: Recipe, shape: memory.Shape, gpu: str) -> Unused | None:
    """The unused memory of a GPU if it is more than :data:`IDLE`; arguments as of :func:`fits`."""

    def peak(blocks: int) -> int:
        return memory.of_worker(args | {"per_device_train_batch_size": blocks}, shape).peak

    capacity = flops.GPUS[gpu][1] * 2**30
    micro = args.micro_batch
    now = peak(micro)
    if now >= (1 - IDLE) * capacity:
        return None
    each = (peak(2 * micro) - now) / micro  # only tensors that grow with the blocks differ
    largest = micro + int((FILLED * capacity - now) / each)
    batch = micro * args.accumulation
    same = max(n for n in range(micro, batch + 1) if n == micro or (n <= largest and not batch % n))
    changes = {"per_device_train_batch_size": same, "gradient_accumulation_steps": batch // same}
    free = capacity - now
    return Unused(gpu, free, free / capacity, largest, changes if same > micro else {}, peak(same))


def cost(
    args: Recipe,
    shape: memory.Shape,
    tokens: int,
    gpu: str | None,
    *,
    tokens_per_second: float | None = None,
    price_per_hour: float | None = None,
) -> list[Cost]:
    """Hours and price of a run.

    Args:
        args: The resolved recipe.
        shape: The recipe's model.
        tokens: Tokens of all steps.
        gpu: The kind of GPU; ``None`` for CPUs.
        tokens_per_second: The measured speed of all workers.
        price_per_hour: The price of the whole cluster per hour, in any currency.

    Returns:
        One cost for a measured speed, two bounds for a known GPU, else none.
    """
    speeds: list[tuple[float, str]] = []
    zero = memory.settings_of(args)
    plain_zero3 = (zero.stage, zero.offload_optimizer, zero.offload_parameters) == (3, False, False)
    as_measured = all((args.get(key) or False) == value for key, value in MEASURED_WITH.items())
    if tokens_per_second is not None:
        speeds = [(tokens_per_second, "as measured")]
    elif gpu == MEASURED[0] and plain_zero3 and as_measured:
        speeds = [(MEASURED[1] * args.workers, f"{MEASURED[1]:g} per GPU, {MEASURED[2]}")]
    elif gpu:
        size = shape.size
        each = flops.flops_per_token(shape.config, size.text, size.backward, args.block_size)
        peak = flops.GPUS[gpu][0] * args.workers
        speeds = [(share * peak / each, source) for share, source in MFU.values()]
    hours = [tokens / speed / 3600 for speed, _ in speeds]
    return [
        Cost(speed, source, h, None if price_per_hour is None else h * price_per_hour)
        for (speed, source), h in zip(speeds, hours, strict=True)
    ]


def deepspeed_estimates(size: ModelSize, workers: int) -> dict[str, tuple[float, float]]:
    """Model states by ZeRO stage, from DeepSpeed's own estimators.

    They count 20 bytes per parameter for mixed precision: 2 of the 16-bit weight, 2 + 4 of the
    16-bit and fp32 gradient, 12 of the fp32 copy and two moments. DeepSpeed has no estimator for
    stage 1: the 16-bit weights and gradients stay whole, and the rest is divided (Rajbhandari et
    al. 2020, arXiv 1910.02054, section 5).

    Returns:
        GiB per worker on the accelerator and GiB on the host of one node, by stage.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with hushed():  # the import tries to compile operators that are not needed here
        from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero3
        from deepspeed.runtime.zero.stage_1_and_2 import (
            estimate_zero2_model_states_mem_needs as zero2,
        )
    n, largest = size.parameters, size.largest_layer
    host2, worker2 = zero2(n, workers, 1, cpu_offload=False)
    host3, worker3, _ = zero3(n, largest, workers, 1, False, False, True)
    host4, worker4, _ = zero3(n, largest, workers, 1, True, True, True)
    rows = {
        "none (DDP)": (20 * n, 0),
        "1": (4 * n + 16 * n / workers, 0),
        "2": (worker2, host2),
        "3": (worker3, host3),
        "3 + offload": (worker4, host4),
    }
    return {zero: (worker / 2**30, host / 2**30) for zero, (worker, host) in rows.items()}


def memory_table(args: Recipe, shape: memory.Shape | None = None) -> DataFrame:
    """A worker's memory in GiB by ZeRO stage, with and without gradient checkpointing.

    The recipe is resolved; ``shape`` is its model, if it is at hand.
    """
    shape = shape or planning.shape_of(args)
    files = (None, *map(_deepspeed_file, ("z1", "z2", "z3", "z3_offload")))
    rows = []
    estimates = deepspeed_estimates(shape.size, args.workers)
    for (zero, estimate), path in zip(estimates.items(), files, strict=True):
        without, with_it = (
            memory.of_worker(
                args | {"deepspeed": path, "disable_gradient_checkpointing": off}, shape
            )
            for off in (True, False)
        )
        values = {
            "DeepSpeed's estimate": estimate[0] * 2**30,
            "model states": without.states,
            "activations": without.activations,
            "with checkpointing": with_it.activations,
            "logits": without.logits,
            "buffers": without.buffers,
            "peak": without.peak,
            "peak with checkpointing": with_it.peak,
            "on the host": without.host,
        }
        rows.append({"ZeRO": zero} | {k: round(v / 2**30, 2) for k, v in values.items()})
    return display.table(rows)


def methods(args: Recipe, steps: int) -> DataFrame:
    """Parameters, memory and disk of full, freeze and LoRA training for one model and its workers.

    The settings of a method are those of its recipe in ``train-configs/``; all else is as given.

    Raises:
        AssetError: The model's configuration is not available.
    """
    rows = []
    for method in METHODS:
        recipe = read_recipe(f"cpt_cpu{'' if method == 'full' else '_' + method}.yaml")[1]
        given = {k: v for k, v in args.items() if not k.startswith(("freeze_", "lora_"))}
        prefixes = ("finetuning_", "freeze_", "lora_")
        changed = Recipe(given) | {k: v for k, v in recipe.items() if k.startswith(prefixes)}
        shape = planning.shape_of(changed)
        size, trained = shape.size, shape.size.trained or shape.size.parameters
        disk = planning.disk(changed, size, steps)
        rows.append({
            "method": method,
            "parameters trained": f"{trained:,}",
            "share": f"{trained / size.parameters:.1%}",
            "GiB per worker": round(memory.of_worker(changed, shape).peak / 2**30, 2),
            "GiB per checkpoint": disk.checkpoint,
            "GiB of the final model": disk.model,
        })  # fmt: skip
    return display.table(rows)
