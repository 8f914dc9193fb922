"""What a recipe will come to, before it is run: steps, tokens, memory, disk, learning rates."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import ConfigError
from ..recipes import Recipe
from ..redirect import hushed
from ..setup import models
from . import flops
from .flops import NOTHING, Backward


@dataclass(frozen=True)
class Plan:
    """What a recipe comes to on a corpus.

    Attributes:
        blocks: Blocks of ``cutoff_len`` tokens in the training half.
        dropped_tokens: Tokens at the ends that fill no block.
        global_batch: Blocks of one optimizer step, over all workers.
        tokens_per_step: The same in tokens.
        steps: Optimizer steps.
        tokens: Tokens trained on in all.
        epochs: How often the corpus is seen.
    """

    blocks: int
    dropped_tokens: int
    global_batch: int
    tokens_per_step: int
    steps: int
    tokens: int
    epochs: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan(args: Recipe, blocks: int, dropped: int) -> Plan:
    """Steps and tokens of a resolved recipe on a packed corpus.

    Raises:
        ConfigError: The corpus does not fill one block, or lasts fewer steps than asked for.
    """
    length, workers = args.block_size, args.workers
    micro = args.micro_batch
    accumulation = args.accumulation
    batch = micro * accumulation * workers
    asked = args.max_steps
    if not blocks:
        raise ConfigError(
            f"the corpus '{args['dataset']}' is too small: {dropped} tokens, not one block",
            where=f"cutoff_len: {length}",
            expected=f"at least {length} tokens to train on",
            do="give more text, or a smaller cutoff_len",
        )
    # What the trainer does: each worker takes its share of the blocks, the last one topped up.
    per_epoch = max(math.ceil(math.ceil(blocks / workers / micro) / accumulation), 1)
    if asked > 0 and asked > per_epoch:
        raise ConfigError(
            f"the corpus '{args['dataset']}' is too small for {asked} steps: "
            f"{blocks:,} blocks last {per_epoch}",
            where=f"max_steps: {asked}, {batch} blocks of {length} tokens a step",
            expected=f"max_steps of at most {per_epoch}",
            do=f"lower max_steps, give more text, or repeat it on purpose: "
            f"max_steps: null, num_train_epochs: {math.ceil(asked / per_epoch)}",
        )
    steps = asked if asked > 0 else math.ceil(per_epoch * args.get("num_train_epochs", 3.0))
    return Plan(
        blocks=blocks,
        dropped_tokens=dropped,
        global_batch=batch,
        tokens_per_step=batch * length,
        steps=steps,
        tokens=steps * batch * length,
        epochs=round(steps / per_epoch, 3),
    )


@dataclass(frozen=True)
class Disk:
    """Room a run takes on the storage, in GiB.

    Attributes:
        checkpoint: One checkpoint.
        kept: Checkpoints there at once: the last ``save_total_limit``, the best, and the one that
            is written before an older one goes.
        model: The final model; the export takes as much again.
        total: All of it.
    """

    checkpoint: float
    kept: int
    model: float
    total: float

    def in_words(self) -> str:
        return (
            f"{self.kept} checkpoint{'s' * (self.kept != 1)} of {self.checkpoint:.3g} GiB at once, "
            "the final model and "
            f"its export of {self.model:.3g} GiB"
        )


def disk(args: Recipe, size: ModelSize, steps: int) -> Disk:
    """What a resolved recipe will write.

    A checkpoint holds 12 bytes a trained parameter (fp32 weight and two moments) and the gathered
    weights in the precision of the training; under ZeRO-3 the frozen ones once more in the shards.
    """
    width = 2 if args.get("bf16") or args.get("fp16") else 4
    trained = size.trained if size.trained is not None else size.parameters
    lora = args.method == "lora"
    weights = width * (trained if lora else size.parameters)
    frozen = width * (size.parameters - trained) if args.get("deepspeed") else 0
    states = 0 if args.get("save_only_model") else 12 * trained + frozen
    every = args.save_steps
    written = math.ceil(steps / every) if every >= 1 else math.ceil(1 / every)
    if str(args.get("save_strategy", "steps")) == "no":
        written = 0
    limit = args.get("save_total_limit")
    kept = min(written, limit + 2) if limit else written
    one, model = (weights + states) / 2**30, weights / 2**30
    merged = width * size.parameters / 2**30
    return Disk(round(one, 3), kept, round(model, 3), round(kept * one + model + merged, 3))


@dataclass(frozen=True)
class ModelSize:
    """What the memory estimate needs of a model.

    Attributes:
        name: The model.
        parameters: All of them, tied ones once.
        largest_layer: Parameters of the largest single module, which ZeRO-3 gathers whole.
        trained: Those that a recipe trains; ``None`` where no recipe was given.
        text: Those that text is multiplied with, adapters too; of no recipe, as if all were
            trained.
        backward: What the backward pass reaches and trains of them.
    """

    name: str
    parameters: int
    largest_layer: int
    trained: int | None = None
    text: int = 0
    backward: Backward = NOTHING


def model_size(config: Any, name: str, args: Recipe | None = None) -> ModelSize:
    """Counts a model's parameters from its configuration, without memory for any of them.

    Args:
        config: The model's ``transformers`` configuration.
        name: What to call it.
        args: The recipe that says which of them are trained.
    """
    model = models.empty(config)
    model.tie_weights()
    largest = max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules())
    every = sum(p.numel() for p in model.parameters())
    trained = None
    if args is not None:
        _choose(model, args)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return ModelSize(name, every, largest, trained, *flops.text_parameters(model))


def _choose(model: Any, args: Recipe) -> None:
    """Freezes what LLaMA-Factory 0.9.3 freezes, and adds adapters' sizes, by its rules."""
    import torch

    kind = args.method
    marks = [""] if kind == "full" else []
    if kind == "freeze":
        layers = getattr(model.config, "text_config", model.config).num_hidden_layers
        count = args.get("freeze_trainable_layers", 2)
        chosen = range(layers - count, layers) if count > 0 else range(-count)
        marks = [f".{layer}." for layer in chosen]
    for name, parameter in model.named_parameters():
        own = not any(mark in name for mark in flops.IMAGE)
        parameter.requires_grad_(own and any(mark in name for mark in marks))
    if kind != "lora":
        return
    rank, target = args.get("lora_rank", 8), str(args.get("lora_target", "all"))
    names = [name.strip() for name in target.split(",")]
    for name, module in list(model.named_modules()):
        linear = isinstance(module, torch.nn.Linear)
        skipped = any(mark in name for mark in (*flops.IMAGE, "lm_head"))
        if linear and not skipped and (target == "all" or name.split(".")[-1] in names):
            size = rank * (module.in_features + module.out_features)
            module.adapter = torch.nn.Parameter(torch.empty(size, device="meta"))


def gemma_3_4b() -> Any:
    """The configuration of ``google/gemma-3-4b-pt``, for planning where the hub is out of reach.

    Figures from its published ``config.json`` (vocabulary 262,208, 34 layers of width 2,560, and a
    SigLIP tower of 27 layers of width 1,152).
    """
    from transformers import Gemma3Config

    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "sliding_window": 1024,
    }
    vision = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 896,
        "patch_size": 14,
        "vision_use_head": False,
    }
    return Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=256)


def smollm2_135m() -> Any:
    """The configuration of the embedded model, for planning before step 1 has fetched it.

    Figures from the published ``config.json`` of SmolLM2-135M-Instruct.
    """
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=8192,
        rope_theta=100000,
        tie_word_embeddings=True,
    )


KNOWN = {"gemma-3-4b-pt": gemma_3_4b, "SmolLM2-135M-Instruct": smollm2_135m}


def zero_memory(size: ModelSize, workers: int, nodes: int = 1) -> list[dict[str, Any]]:
    """Memory of the model states per worker for each ZeRO stage, by DeepSpeed's own estimators.

    Model states are, by DeepSpeed's count for mixed precision, 20 bytes a parameter: 2 of 16-bit
    weight, 2 + 4 of 16-bit and fp32 gradient, 12 of fp32 copy and two moments. Activations and
    logits come on top. DeepSpeed has no estimator for stage 1; there 16-bit weights and gradients
    stay whole and the rest is divided (Rajbhandari et al. 2020, arXiv 1910.02054, section 5).

    Returns:
        One row a setting, in GiB per worker on the accelerator and per node on the host.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with hushed():  # its import tries to compile what it needs none of here
        from deepspeed.runtime.zero.stage3 import (
            estimate_zero3_model_states_mem_needs as zero3,
        )
        from deepspeed.runtime.zero.stage_1_and_2 import (
            estimate_zero2_model_states_mem_needs as zero2,
        )

    def gib(value: float) -> float:
        return round(value / 2**30, 2)

    per_node = workers // nodes
    n, largest = size.parameters, size.largest_layer
    host2, accelerator2 = zero2(n, per_node, nodes, cpu_offload=False)
    host3, accelerator3, _ = zero3(n, largest, per_node, nodes, False, False, True)
    host_off, accelerator_off, _ = zero3(n, largest, per_node, nodes, True, True, True)
    rows = [
        ("none (DDP)", "nothing", 20 * n, 0),
        ("1", "optimizer states", 4 * n + 16 * n / workers, 0),
        ("2", "+ gradients", accelerator2, host2),
        ("3", "+ parameters", accelerator3, host3),
        ("3 + offload", "all of it, kept on the host", accelerator_off, host_off),
    ]
    return [
        {"ZeRO": stage, "shards": what, "GiB per worker": gib(a), "GiB of host memory": gib(h)}
        for stage, what, a, h in rows
    ]


def learning_rates(args: Recipe, steps: int) -> list[float]:
    """The learning rate of every step, from the scheduler the trainer will use."""
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
