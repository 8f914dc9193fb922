"""What a recipe will come to on given GPUs, before it is paid for: does it fit, how long, how much.

Puts together what :mod:`planning`, :mod:`memory` and :mod:`throughput` know.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..errors import AssetError, ParameterError, nearest
from ..recipes import Recipe
from . import flops, memory, planning

USABLE = 0.94  # of a GPU's memory; the rest goes to fragments and other libraries
IDLE = 0.40  # of a GPU's memory: with more unused, the plan says so
FILLED = 0.85  # of a GPU's memory: what a larger micro-batch may take
# Tokens a second of one GPU in the guide's own run: 20 steps of 8 x 512 tokens in 1.9 s each on
# four L40S, from the log it prints. It holds for a recipe with these settings and ZeRO-3.
MEASURED = ("L40S", 539.0, "the guide's run, with the guide's settings")
MEASURED_WITH = {
    "model_name_or_path": "google/gemma-3-4b-pt",
    "finetuning_type": "full",
    "cutoff_len": 512,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "ray_num_workers": 4,
    "bf16": True,
    "disable_gradient_checkpointing": False,
    "enable_liger_kernel": False,
}
METHODS = ("full", "freeze", "lora")
# Shares of the GPU's peak that bound a speed nobody measured.
MFU = {
    "slow": (0.035, "3.5 % of the peak, as the guide's run with one block of 512 at once"),
    "fast": (0.40, "40 % of the peak, assumed: what full micro-batches reach at best"),
}


@dataclass(frozen=True)
class Fit:
    """One way to run a recipe on one kind of GPU.

    Attributes:
        change: What is different from the recipe; empty for the recipe itself.
        memory: The peak of a worker.
        capacity: What the GPU has, in bytes.
    """

    change: str
    memory: memory.Memory
    capacity: float

    @property
    def fits(self) -> bool:
        return self.memory.peak <= USABLE * self.capacity


@dataclass(frozen=True)
class Unused:
    """Memory that a recipe leaves unused on a GPU, and the micro-batch that would use it.

    Attributes:
        gpu: A key of :data:`flops.GPUS`.
        free: In bytes.
        share: The same as a share of the GPU.
        largest: Blocks of a micro-batch that fills the GPU to :data:`FILLED`.
        changes: The largest micro-batch with the same global batch; empty where it is at its most.
        peak: A worker's with these changes, in bytes.
    """

    gpu: str
    free: float
    share: float
    largest: int
    changes: dict[str, int]
    peak: int

    def __str__(self) -> str:
        said = f"{100 * self.share:.0f} % of an {self.gpu} is unused, {self.free / 2**30:.1f} GiB"
        room = f"there is room for per_device_train_batch_size: {self.largest}"
        if self.changes:
            changes = ", ".join(f"{key}: {value}" for key, value in self.changes.items())
            use = f"{self.peak / 2**30:.1f} GiB"
            said += f"; {changes} would use {use} with the same global batch"
            if self.changes["per_device_train_batch_size"] == self.largest:
                return said
            return f"{said}; {room} with a larger one"
        fewer = "fewer workers with more blocks each, or a larger global batch"
        return f"{said}; {room}, which takes {fewer}" if self.largest > 1 else said


@dataclass(frozen=True)
class Cost:
    """How long a run takes, and what that costs.

    Attributes:
        tokens_per_second: Over all workers.
        source: Where that is from.
        hours: Of steps; start-up, evaluation and checkpoints come on top.
        price: Of these hours; ``None`` where no price per hour was given.
    """

    tokens_per_second: float
    source: str
    hours: float
    price: float | None


def gpu_of(args: Recipe, named: str = "") -> str | None:
    """The kind of GPU a recipe will run on: the one named, or the one it asks for; else ``None``.

    Raises:
        ParameterError: A GPU was named that is not known.
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
        kind = re.search(r"accelerator_(?:type:|shape:\d+x)(.+)", resource)
        if kind and (key := flops.gpu_named(kind[1])):
            return key
    return None


def shape_of(args: Recipe) -> memory.Shape:
    """A recipe's model; Gemma-3-4B's and the embedded one are known before they are there.

    Raises:
        AssetError: The model's configuration cannot be had.
    """
    name = str(args["model_name_or_path"]).rsplit("/", 1)[-1]
    try:
        return memory.shape_of(args)
    except AssetError:
        if name not in planning.KNOWN:
            raise
        return memory.shape_of(args, planning.KNOWN[name]())


def fits(args: Recipe, shape: memory.Shape, gpu: str) -> list[Fit]:
    """The recipe on a kind of GPU and, where it does not fit, the first change that makes it fit.

    Changes are tried from the cheapest on: what costs no speed first, offloading last.

    Args:
        args: The resolved recipe; its ``deepspeed`` a file that can be read.
        shape: Its model.
        gpu: A key of :data:`flops.GPUS`.
    """
    capacity = flops.GPUS[gpu][1] * 2**30
    tried = [Fit("", memory.of_worker(args, shape), capacity)]
    if tried[0].fits:
        return tried
    changed = args
    for change, keys in _changes(args):
        changed = changed | keys
        tried.append(Fit(change, memory.of_worker(changed, shape), capacity))
        if tried[-1].fits:
            break
    return tried


def _changes(args: Recipe) -> list[tuple[str, dict[str, Any]]]:
    """What makes a recipe smaller, each on top of the ones before."""
    from ..recipes import DEEPSPEED_CONFIGS

    micro = args.micro_batch
    accumulation = args.accumulation
    changes: list[tuple[str, dict[str, Any]]] = []
    if not args.get("bf16") and not args.get("fp16"):
        changes.append(("bf16: true", {"bf16": True}))
    if micro > 1:
        one = {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": accumulation * micro,
        }
        changes.append((", ".join(f"{k}: {v}" for k, v in one.items()), one))
    if not args.get("enable_liger_kernel"):
        changes.append(("enable_liger_kernel: true", {"enable_liger_kernel": True}))
    if args.get("disable_gradient_checkpointing"):
        changes.append(("with gradient checkpointing", {"disable_gradient_checkpointing": False}))
    stage = memory.settings_of(args, 1).stage
    for name, number in (("z2", 2), ("z3", 3), ("z3_offload", 4)):
        if number > stage:
            file = f"deepspeed-configs/ds_{name}_config.json"
            path = str(DEEPSPEED_CONFIGS / f"ds_{name}_config.json")
            changes.append((f"deepspeed: {file}", {"deepspeed": path}))
    return changes


def unused(args: Recipe, shape: memory.Shape, gpu: str) -> Unused | None:
    """What a recipe that fits leaves unused of a GPU, where that is more than :data:`IDLE`.

    Args:
        args: The resolved recipe; its ``deepspeed`` a file that can be read.
        shape: Its model.
        gpu: A key of :data:`flops.GPUS`.
    """

    def peak(blocks: int) -> int:
        return memory.of_worker(args | {"per_device_train_batch_size": blocks}, shape).peak

    capacity = flops.GPUS[gpu][1] * 2**30
    micro = args.micro_batch
    now = peak(micro)
    if now >= (1 - IDLE) * capacity:
        return None
    each = (peak(2 * micro) - now) / micro  # only what grows with the blocks is different
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
        shape: Its model.
        tokens: How many it trains on.
        gpu: The kind of GPU; ``None`` for CPUs.
        tokens_per_second: Over all workers, where it was measured.
        price_per_hour: Of the whole cluster, in whatever currency.

    Returns:
        One where the speed was measured, two where it can only be bounded, none without a clue.
    """
    workers = args.workers
    speeds: list[tuple[float, str]] = []
    if tokens_per_second is not None:
        speeds = [(tokens_per_second, "as measured")]
    elif _measured(args, shape, gpu):
        _, each, why = MEASURED
        speeds = [(each * workers, f"{each:g} a GPU, {why}")]
    elif gpu:
        size = shape.size
        each = flops.flops_per_token(shape.config, size.text, size.backward, args.block_size)
        speeds = [(share * flops.GPUS[gpu][0] * workers / each, why) for share, why in MFU.values()]
    hours = [tokens / speed / 3600 for speed, _ in speeds]
    return [
        Cost(speed, source, h, None if price_per_hour is None else h * price_per_hour)
        for (speed, source), h in zip(speeds, hours, strict=True)
    ]


def _measured(args: Recipe, shape: memory.Shape, gpu: str | None) -> bool:
    """Whether a recipe is the one whose speed is known: the method and batches decide it too."""
    zero = memory.settings_of(args, shape.hidden)
    return (
        gpu == MEASURED[0]
        and (zero.stage, zero.offload_optimizer, zero.offload_parameters) == (3, False, False)
        and all((args.get(key) or False) == value for key, value in MEASURED_WITH.items())
    )


def memory_rows(args: Recipe, shape: memory.Shape) -> list[dict[str, Any]]:
    """A worker's memory by ZeRO stage and offload, in GiB; the last columns are the peaks."""
    from ..recipes import DEEPSPEED_CONFIGS

    rows = []
    estimates = planning.zero_memory(shape.size, args.workers)
    files = {"none (DDP)": None, "1": "z1", "2": "z2", "3": "z3", "3 + offload": "z3_offload"}
    for (stage, name), estimate in zip(files.items(), estimates, strict=True):
        path = name and str(DEEPSPEED_CONFIGS / f"ds_{name}_config.json")
        peaks = {}
        for checkpointing in (False, True):
            off = not checkpointing
            changed = args | {"deepspeed": path, "disable_gradient_checkpointing": off}
            peaks[checkpointing] = memory.of_worker(changed, shape)
        one, less = peaks[False], peaks[True]
        values = {
            "DeepSpeed's estimate": estimate["GiB per worker"] * 2**30,
            "model states": one.states,
            "activations": one.activations,
            "with checkpointing": less.activations,
            "logits": one.logits,
            "buffers": one.buffers,
            "peak": one.peak,
            "peak with checkpointing": less.peak,
            "on the host": one.host,
        }
        rows.append({"ZeRO": stage} | {k: round(v / 2**30, 2) for k, v in values.items()})
    return rows


def methods(args: Recipe, steps: int) -> list[dict[str, Any]]:
    """What training all weights, the last layers or adapters comes to, for one model and workers.

    The settings of a method are those of its recipe in ``train-configs/``; all else is as given.

    Args:
        args: The resolved recipe.
        steps: Optimizer steps of the run.

    Raises:
        AssetError: The model's configuration cannot be had.
    """
    from ..recipes import read_recipe

    rows = []
    for method in METHODS:
        recipe = read_recipe(f"cpt_cpu{'' if method == 'full' else '_' + method}.yaml")[1]
        own = {k: v for k, v in recipe.items() if k.startswith(("finetuning_", "freeze_", "lora_"))}
        kept = {k: v for k, v in args.items() if not k.startswith(("freeze_", "lora_"))}
        changed = Recipe(kept) | own
        shape = shape_of(changed)
        trained = shape.size.trained or shape.size.parameters
        disk = planning.disk(changed, shape.size, steps)
        rows.append(
            {
                "": method,
                "parameters trained": f"{trained:,}",
                "of all": f"{trained / shape.size.parameters:.1%}",
                "GiB a worker": round(memory.of_worker(changed, shape).peak / 2**30, 2),
                "GiB a checkpoint": disk.checkpoint,
                "GiB of the final model": disk.model,
            }
        )
    return rows
