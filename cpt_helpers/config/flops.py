"""Model sizes: parameters, trained parameters and FLOPs per token; GPUs and their peaks.

The Trainer's own FLOP count sees only a rank's shard under ZeRO-3, so this module counts them.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..recipes import Recipe
from ..setup import models

# Dense bf16 matrix products in FLOP/s, and memory in GiB as torch reports it. From NVIDIA's data
# sheets (nvidia.com/en-us/data-center/<name>), whose figures "with sparsity" are halved: H100 and
# H200 SXM 1,979, their NVL boards 1,671, H100 PCIe 1,513 TFLOP/s. T4 and V100 have no bf16: fp16.
GPUS: dict[str, tuple[float, float]] = {
    "B200": (2250e12, 178.0),
    "H200-NVL": (835.5e12, 139.8),
    "H200": (989e12, 139.8),
    "H100-NVL": (835.5e12, 93.0),
    "H100-PCIE": (756e12, 79.1),
    "H100": (989e12, 79.1),
    "A100-80G": (312e12, 79.1),
    "A100-40G": (312e12, 39.4),
    "L40S": (362e12, 44.4),
    "L4": (121e12, 22.0),
    "A10G": (70e12, 22.0),
    "RTX4090": (165e12, 23.5),
    "V100": (125e12, 15.8),
    "T4": (65e12, 14.6),
}
IMAGE = ("vision_tower", "multi_modal_projector")  # modules that text does not pass through
_LAYER = re.compile(r"\.(\d+)\.")  # the first match in a parameter's name is its layer


def gpu_named(name: str) -> str | None:
    """The key of :data:`GPUS` for a device's name, ``"NVIDIA H100 80GB HBM3"`` → ``"H100"``."""
    words = set(re.split(r"[^A-Z0-9]+", name.upper().replace("RTX ", "RTX")))
    if "A100" in words:
        return "A100-80G" if words & {"80G", "80GB"} else "A100-40G"
    # The entry of a board precedes the entry of its family: H100-NVL before H100.
    return next((key for key in GPUS if set(key.split("-")) <= words), None)


@dataclass(frozen=True)
class Backward:
    """The parameters that a backward pass reaches. It ends at the lowest trained layer."""

    # parameters whose activations get a gradient: the lowest trained layer's and all after it
    reached: int
    trained: int  # parameters that get a gradient themselves
    lowest: int = 0  # index of the lowest layer reached


@dataclass(frozen=True)
class ModelSize:
    """The parameters of a model."""

    name: str  # the model
    parameters: int  # all parameters; tied ones count once
    largest_layer: int  # parameters of the largest single module, which ZeRO-3 gathers whole
    trained: int | None = None  # parameters that a recipe trains; ``None`` without a recipe
    text: int = 0  # parameters that text is multiplied with, adapters included
    # those of ``text`` that the backward pass reaches and trains
    backward: Backward = Backward(0, 0)


def model_size(config: Any, name: str, args: Recipe | None = None) -> ModelSize:
    """Counts a model's parameters from its configuration, without memory for any of them.

    Args:
        config: The model's ``transformers`` configuration.
        name: The model's name.
        args: The recipe that selects the trained parameters; without it all are trained.
    """
    model = models.empty(config)
    model.tie_weights()
    largest = max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules())
    parameters = sum(p.numel() for p in model.parameters())
    trained = None
    if args is not None:
        _select_trained(model, args)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return ModelSize(name, parameters, largest, trained, *text_parameters(model))


def _select_trained(model: Any, args: Recipe) -> None:
    """Freezes what the training freezes, and adds parameters of the adapters' sizes.

    Follows LLaMA-Factory 0.9.3 and the correction of its freeze method (``train.patches``): a
    parameter is trained if the first number in its name is a trained layer. An expert's number is
    the second one.
    """
    import torch

    layers = getattr(model.config, "text_config", model.config).num_hidden_layers
    count = args.get("freeze_trainable_layers", 2)
    chosen = range(layers - count, layers) if count > 0 else range(-count)
    for name, parameter in model.named_parameters():
        layer = _LAYER.search(name)
        in_layers = args.method == "freeze" and bool(layer and int(layer[1]) in chosen)
        text = not any(mark in name for mark in IMAGE)
        parameter.requires_grad_(text and (args.method == "full" or in_layers))
    if args.method != "lora":
        return
    rank, target = args.get("lora_rank", 8), str(args.get("lora_target", "all"))
    names = [name.strip() for name in target.split(",")]
    for name, module in list(model.named_modules()):
        linear = isinstance(module, torch.nn.Linear)
        skipped = any(mark in name for mark in (*IMAGE, "lm_head"))
        if linear and not skipped and (target == "all" or name.split(".")[-1] in names):
            size = rank * (module.in_features + module.out_features)
            module.adapter = torch.nn.Parameter(torch.empty(size, device="meta"))


def experts_of(config: Any) -> tuple[int, int]:
    """Experts of each layer and experts per token of a mixture of experts; else ``(1, 1)``."""
    text = getattr(config, "text_config", config)
    counts = (getattr(text, key, None) for key in ("num_local_experts", "num_experts"))
    experts = next(filter(None, counts), 1)
    return experts, (getattr(text, "num_experts_per_tok", None) or 1) if experts > 1 else 1


def attention_widths(config: Any, length: int, lowest: int = 0) -> int:
    """Heads × head size × attended tokens, summed over the layers. Windows limit the tokens.

    Args:
        config: The model's ``transformers`` configuration.
        length: Tokens in a block.
        lowest: Index of the first layer that counts.
    """
    text = getattr(config, "text_config", config)
    heads = text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    layers, window = text.num_hidden_layers, getattr(text, "sliding_window", None)
    types = getattr(text, "layer_types", None)
    pattern = getattr(text, "sliding_window_pattern", None)
    seen = 0
    for layer in range(lowest, layers):
        if types:
            local = types[layer] == "sliding_attention"
        else:
            local = bool(pattern and window and (layer + 1) % pattern)
        seen += min(length, window) if local and window else length
    return width * seen


def flops_per_token(config: Any, parameters: int, backward: Backward, length: int) -> float:
    """Floating-point operations per token of a training step.

    Each parameter takes 2 in the forward pass, 2 for the gradient of the activations where the
    backward pass reaches it, and 2 for its own gradient if it is trained. Attention takes 4 × heads
    × head size × length per layer forward and 8 backward, as in Chowdhery et al. 2022 (arXiv
    2204.02311, appendix B). Causal masks and recomputed activations are not considered.

    Args:
        config: The model's ``transformers`` configuration.
        parameters: Parameters that text passes through (:func:`text_parameters`).
        backward: Those that the backward pass reaches and trains.
        length: Tokens in a block.
    """
    forward = 2.0 * parameters + 4.0 * attention_widths(config, length)
    gradients = 2.0 * backward.reached + 2.0 * backward.trained
    return forward + gradients + 8.0 * attention_widths(config, length, backward.lowest)


def text_parameters(model: Any) -> tuple[int, Backward]:
    """A model's parameters that text is multiplied with, and those the backward pass reaches.

    A tied embedding counts once, as the output layer: looking up a row costs nothing. Of a mixture
    of experts, only the experts of one token count. Sizes are right under ZeRO-3 too.

    Args:
        model: The model; ``requires_grad`` marks the trained parameters.
    """
    import torch

    output = model.get_output_embeddings()
    tables = {m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    lookups = tables - {output.weight if output is not None else None}
    layers = getattr(model.config, "text_config", model.config).num_hidden_layers
    experts, per_token = experts_of(model.config)
    counted: list[tuple[int, float, bool]] = []  # layer, multiplied parameters, trained
    for name, parameter in model.named_parameters():
        if any(mark in name for mark in IMAGE):
            continue
        count = getattr(parameter, "ds_numel", parameter.numel())
        match = _LAYER.search(name)
        # Embeddings precede all layers, the output layer follows them.
        layer = -1 if parameter in tables else int(match[1]) if match else layers
        share = per_token / experts if ".experts." in name else 1.0
        share = 0.0 if parameter in lookups else share
        counted.append((layer, count * share, parameter.requires_grad))
    lowest = min((layer for layer, _, trained in counted if trained), default=layers)
    text = sum(count for _, count, _ in counted)
    # A tied output layer is multiplied after all layers, wherever its table is looked up.
    reached = sum(count for layer, count, _ in counted if layer >= lowest or layer < 0)
    trained = sum(count for _, count, trained in counted if trained)
    return round(text), Backward(round(reached), round(trained), max(lowest, 0))


def peak_flops(on_gpu: bool, dtype: str = "float32") -> tuple[str, float | None]:
    """This worker's device and its peak: a GPU's from :data:`GPUS`, a CPU's as measured.

    Args:
        on_gpu: Whether the worker trains on a GPU.
        dtype: The precision of its matrix products, ``"bfloat16"`` or ``"float32"``.

    Returns:
        The device's name, and FLOP/s of dense matrix products; ``None`` for an unknown GPU.
    """
    import torch

    if on_gpu:
        name = torch.cuda.get_device_name()
        key = gpu_named(name)
        return name, GPUS[key][0] if key else None
    size = 1024
    left = torch.ones(
        size, size, dtype=getattr(torch, dtype)
    )  # random numbers would change the training
    best = float("inf")
    for _ in range(5):
        since = time.perf_counter()
        left @ left
        best = min(best, time.perf_counter() - since)
    return f"{torch.get_num_threads()} CPU threads", 2 * size**3 / best


def peak_memory(on_gpu: bool = False) -> int:
    """The peak memory of this process in bytes: of the GPU, or the resident set."""
    if on_gpu:
        import torch

        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.is_file() and (match := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(match[1]) * 1024
    import resource
    import sys

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
