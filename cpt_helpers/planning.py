"""What a recipe will come to, before it is run: steps, tokens, memory, disk, learning rates."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from typing import Any

from .errors import ConfigError
from .streams import hushed


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


def plan(args: dict[str, Any], blocks: int, dropped: int) -> Plan:
    """Steps and tokens of a resolved recipe on a packed corpus.

    Raises:
        ConfigError: The corpus does not fill one block, or lasts fewer steps than asked for.
    """
    length, workers = args["cutoff_len"], args.get("ray_num_workers", 1)
    micro = args.get("per_device_train_batch_size", 8)
    accumulation = args.get("gradient_accumulation_steps", 1)
    batch = micro * accumulation * workers
    asked = args.get("max_steps", -1)
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


def disk_gib(args: dict[str, Any], plan: Plan, size: ModelSize) -> float:
    """Room a run takes on the storage: its checkpoints, the final model and the export, in GiB.

    A checkpoint holds 12 bytes a trained parameter (fp32 weight and two moments) and the gathered
    weights in the precision of the training.
    """
    weights = size.parameters * (2 if args.get("bf16") or args.get("fp16") else 4)
    shards = 12 * size.parameters if args.get("finetuning_type", "lora") == "full" else 0
    every = args.get("save_steps", 500)
    kept = math.ceil(plan.steps / every) if every >= 1 else math.ceil(1 / every)
    kept = min(kept, args.get("save_total_limit") or kept) + 1  # one is written before one goes
    return (kept * (weights + shards) + 2 * weights) / 2**30


@dataclass(frozen=True)
class ModelSize:
    """What the memory estimate needs of a model.

    Attributes:
        name: The model.
        parameters: All of them, tied ones once.
        largest_layer: Parameters of the largest single module, which ZeRO-3 gathers whole.
    """

    name: str
    parameters: int
    largest_layer: int


def model_size(config: Any, name: str) -> ModelSize:
    """Counts a model's parameters from its configuration, without memory for any of them."""
    import torch
    import transformers

    auto = transformers.AutoModelForCausalLM
    if hasattr(config, "vision_config"):
        auto = transformers.AutoModelForImageTextToText
    with torch.device("meta"):
        model = auto.from_config(config)
    model.tie_weights()
    largest = max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules())
    return ModelSize(name, sum(p.numel() for p in model.parameters()), largest)


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


def zero_memory(size: ModelSize, workers: int, nodes: int = 1) -> list[dict[str, Any]]:
    """Memory of the model states per worker for each ZeRO stage, by DeepSpeed's own estimators.

    Model states are, by DeepSpeed's count for mixed precision, 20 bytes a parameter: 2 of 16-bit
    weight, 2 + 4 of 16-bit and fp32 gradient, 12 of fp32 copy and two moments. Activations and
    logits come on top. DeepSpeed has no estimator for stage 1; there the optimizer's 12 bytes are
    divided and 8 stay whole (Rajbhandari et al. 2020, arXiv 1910.02054, section 5).

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
        ("1", "optimizer states", 8 * n + 12 * n / workers, 0),
        ("2", "+ gradients", accelerator2, host2),
        ("3", "+ parameters", accelerator3, host3),
        ("3 + offload", "all of it, kept on the host", accelerator_off, host_off),
    ]
    return [
        {"ZeRO": stage, "shards": what, "GiB per worker": gib(a), "GiB of host memory": gib(h)}
        for stage, what, a, h in rows
    ]


def learning_rates(args: dict[str, Any], steps: int) -> list[float]:
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
