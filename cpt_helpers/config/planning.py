"""The plan of a recipe on a corpus: steps, tokens, disk space and learning rates."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .. import display
from ..errors import AssetError, ConfigError
from ..recipes import Recipe
from ..run import Run
from ..setup import machine
from . import memory
from .flops import ModelSize as ModelSize
from .flops import model_size as model_size

if TYPE_CHECKING:
    from pandas import DataFrame

GIB = 2**30
# Configurations for planning before a model is on the storage: figures of its published
# ``config.json``. Gemma's vision tower is SigLIP.
KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma-3-4b-pt": ("gemma3", {
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
            "vocab_size": 262208, "sliding_window": 1024,
        },
        "vision_config": {
            "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
            "num_attention_heads": 16, "image_size": 896, "patch_size": 14,
            "vision_use_head": False,
        },
        "mm_tokens_per_image": 256,
    }),
    "SmolLM2-135M-Instruct": ("llama", {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
        "max_position_embeddings": 8192, "rope_theta": 100000, "tie_word_embeddings": True,
    }),
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Steps and tokens of a recipe on a corpus."""

    blocks: int  # blocks of ``cutoff_len`` tokens in the training half
    dropped_tokens: int  # tokens at the ends that fill no block
    global_batch: int  # blocks of one optimizer step, over all workers
    tokens_per_step: int  # tokens of one optimizer step
    steps: int  # optimizer steps
    tokens: int  # tokens of all steps
    epochs: float  # passes over the corpus


def plan(args: Recipe, blocks: int, dropped: int) -> Plan:
    """Steps and tokens of a resolved recipe on a packed corpus.

    Raises:
        ConfigError: The corpus does not fill one block, or has too few blocks for ``max_steps``.
    """
    length, batch, asked = args.block_size, args.global_batch, args.max_steps
    if not blocks:
        raise ConfigError(
            f"the corpus '{args['dataset']}' is too small: {dropped} tokens, not one block",
            where=f"cutoff_len: {length}",
            expected=f"at least {length} tokens to train on",
            do="give more text, or a smaller cutoff_len",
        )
    # As in the trainer: each worker takes its share of the blocks, and the last share is filled up.
    micro_batches = math.ceil(math.ceil(blocks / args.workers) / args.micro_batch)
    per_epoch = max(math.ceil(micro_batches / args.accumulation), 1)
    if asked > 0 and asked > per_epoch:
        raise ConfigError(
            f"the corpus '{args['dataset']}' is too small for {asked} steps: "
            f"{blocks:,} blocks last {per_epoch}",
            where=f"max_steps: {asked}, {batch} blocks of {length} tokens a step",
            expected=f"max_steps of at most {per_epoch}",
            do=f"lower max_steps, give more text, or repeat the corpus: "
            f"max_steps: null, num_train_epochs: {math.ceil(asked / per_epoch)}",
        )
    steps = asked if asked > 0 else math.ceil(per_epoch * args.get("num_train_epochs", 3.0))
    tokens = batch * length
    epochs = round(steps / per_epoch, 3)
    return Plan(blocks, dropped, batch, tokens, steps, steps * tokens, epochs)


@dataclass(frozen=True)
class Disk:
    """Disk space of a run on the storage, in GiB."""

    checkpoint: float  # one checkpoint
    # the most checkpoints at once: the last ``save_total_limit``, the best, and the one that
    # is written before an older one is deleted
    kept: int
    model: float  # the final model; the export takes the same again
    total: float  # all of it

    def in_words(self) -> str:
        return (
            f"{self.kept} checkpoint{'s' * (self.kept != 1)} of {self.checkpoint:.3g} GiB at once, "
            f"the final model and its export of {self.model:.3g} GiB"
        )


def disk(args: Recipe, size: ModelSize, steps: int) -> Disk:
    """The disk space that a resolved recipe needs.

    A checkpoint has 12 bytes per trained parameter (fp32 weight and two moments) and the gathered
    weights in the precision of the training. Under ZeRO-3 the shards repeat the frozen weights.
    """
    width = 4 if args.precision == "float32" else 2
    trained = size.trained if size.trained is not None else size.parameters
    weights = width * (trained if args.method == "lora" else size.parameters)
    frozen = width * (size.parameters - trained) if args.get("deepspeed") else 0
    states = 0 if args.get("save_only_model") else 12 * trained + frozen
    every, limit = args.save_steps, args.get("save_total_limit")
    written = math.ceil(steps / every) if every >= 1 else math.ceil(1 / every)
    if str(args.get("save_strategy", "steps")) == "no":
        written = 0
    kept = min(written, limit + 2) if limit else written
    one, model = (weights + states) / GIB, weights / GIB
    merged = width * size.parameters / GIB
    return Disk(round(one, 3), kept, round(model, 3), round(kept * one + model + merged, 3))


@dataclass(frozen=True)
class Estimate:
    """Steps, tokens and disk space of a recipe for its model and corpus. Shows as a table."""

    args: Recipe
    shape: memory.Shape
    plan: Plan
    disk: Disk

    def require_room(self, run: Run) -> None:
        """Checks that the storage has room for a run that has not started.

        Raises:
            StorageError: The storage has too little room.
        """
        if run.state == "new":
            machine.require_room(run.storage, self.disk.total, self.disk.in_words())

    def table(self) -> DataFrame:
        plan, disk, size = self.plan, self.disk, self.shape.size
        return display.table([
            ("blocks of the corpus", f"{plan.blocks:,} of {self.args.block_size} tokens"),
            ("one optimizer step", f"{plan.global_batch} blocks = {plan.tokens_per_step:,} tokens"),
            ("steps", f"{plan.steps:,}"),
            ("tokens of all steps", f"{plan.tokens:,} = {plan.epochs:.2f} epochs"),
            ("parameters trained", f"{size.trained:,} of {size.parameters:,}"),
            ("one checkpoint", f"{disk.checkpoint:.2f} GiB, at most {disk.kept} at once"),
            ("disk space", f"{disk.total:.1f} GiB for checkpoints, final model and export"),
        ])  # fmt: skip

    def __repr__(self) -> str:
        return self.table().to_string()

    def _repr_html_(self) -> str:
        return self.table().to_html()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self.plan) | {"disk": asdict(self.disk)}


def estimate(args: Recipe, blocks: int, dropped: int = 0) -> Estimate:
    """Estimates steps, tokens and disk space of a resolved recipe.

    Args:
        args: The resolved recipe.
        blocks: Blocks of the training half, from step 2.
        dropped: Tokens that fill no block, from step 2.
    """
    steps, shape = plan(args, blocks, dropped), shape_of(args)
    return Estimate(args, shape, steps, disk(args, shape.size, steps.steps))


def shape_of(args: Recipe) -> memory.Shape:
    """A recipe's model; the models of :data:`KNOWN` need not be on the storage.

    Raises:
        AssetError: The model's configuration is not available.
    """
    try:
        return memory.shape_of(args)
    except AssetError:
        name = str(args["model_name_or_path"]).rsplit("/", 1)[-1]
        if name not in KNOWN:
            raise
        return memory.shape_of(args, known_config(name))


def known_config(name: str) -> Any:
    """The ``transformers`` configuration of a model of :data:`KNOWN`."""
    from transformers import AutoConfig

    family, figures = KNOWN[name]
    return AutoConfig.for_model(family, **figures)


def learning_rates(args: Recipe, steps: int) -> list[float]:
    """The learning rate of every step, from the scheduler of the trainer."""
    import torch
    from transformers import get_scheduler

    rate = float(args.get("learning_rate", 5e-5))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    warmup = args.get("warmup_steps") or math.ceil(steps * args.get("warmup_ratio", 0.0))
    scheduler = get_scheduler(
        args.get("lr_scheduler_type", "linear"),
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=steps,
        scheduler_specific_kwargs=args.get("lr_scheduler_kwargs"),
    )
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates
