"""What a training does with its machine: FLOPs a token, the peak they are compared with, memory.

The Trainer's own FLOP count sees only a rank's shard under ZeRO-3, so it is counted here.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Dense bf16 matrix products, FLOP/s, and memory in GiB as torch reports it. From NVIDIA's data
# sheets (nvidia.com/en-us/data-center/<name>), whose figures «with sparsity» are halved: H100 and
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
IMAGE = ("vision_tower", "multi_modal_projector")  # what text does not go through
_LAYER = re.compile(r"\.(\d+)\.")


def gpu_named(name: str) -> str | None:
    """The key of :data:`GPUS` for a device's name, ``"NVIDIA H100 80GB HBM3"`` → ``"H100"``."""
    words = set(re.split(r"[^A-Z0-9]+", name.upper().replace("RTX ", "RTX")))
    if "A100" in words:
        return "A100-80G" if words & {"80G", "80GB"} else "A100-40G"
    # A board's own entry stands before the family's: H100-NVL before H100.
    return next((key for key in GPUS if set(key.split("-")) <= words), None)


@dataclass(frozen=True)
class Backward:
    """What a backward pass reaches: it ends at the lowest layer that is trained.

    Attributes:
        reached: Parameters whose activations get a gradient: the lowest trained layer's, and all
            after it.
        trained: Parameters that get a gradient of their own.
        lowest: Index of the lowest layer reached.
    """

    reached: int
    trained: int
    lowest: int = 0


NOTHING = Backward(0, 0)


def attention_widths(config: Any, length: int, lowest: int = 0) -> int:
    """Heads × head size × tokens looked at, summed over the layers; windows are narrower.

    Args:
        config: The model's ``transformers`` configuration.
        length: Tokens in a block.
        lowest: Index of the first layer that counts.
    """
    text = getattr(config, "text_config", config)
    heads = text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    layers, window = text.num_hidden_layers, getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    pattern = getattr(text, "sliding_window_pattern", None)
    seen = 0
    for layer in range(lowest, layers):
        if kinds:
            local = kinds[layer] == "sliding_attention"
        else:
            local = bool(pattern and window and (layer + 1) % pattern)
        seen += min(length, window) if local and window else length
    return width * seen


def flops_per_token(config: Any, parameters: int, backward: Backward, length: int) -> float:
    """Floating-point operations of a training step, for each token.

    2 a parameter in the forward pass, 2 for the gradient of the activations where the backward
    pass comes by, 2 for the gradient of each trained weight. Attention is 4 × heads × head size ×
    length in a layer forward and 8 backward, as Chowdhery et al. 2022 (arXiv 2204.02311,
    appendix B) count it: causal masks and recomputed activations are not taken off or added.

    Args:
        config: The model's ``transformers`` configuration.
        parameters: Those text goes through (:func:`text_parameters`).
        backward: Those the backward pass reaches and trains.
        length: Tokens in a block.
    """
    forward = 2.0 * parameters + 4.0 * attention_widths(config, length)
    gradients = 2.0 * backward.reached + 2.0 * backward.trained
    return forward + gradients + 8.0 * attention_widths(config, length, backward.lowest)


def text_parameters(model: Any) -> tuple[int, Backward]:
    """A model's parameters that text is multiplied with, and what the backward pass does.

    A tied embedding counts once, as the output layer: looking up a row costs nothing. Of a mixture
    of experts count those a token goes through. Sizes are right under ZeRO-3 too.

    Args:
        model: The model; its ``requires_grad`` say what is trained, its shapes the rest.
    """
    import torch

    output = model.get_output_embeddings()
    tables = {m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    lookups = tables - {output.weight if output is not None else None}
    text = getattr(model.config, "text_config", model.config)
    layers = text.num_hidden_layers
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 1
    chosen = (getattr(text, "num_experts_per_tok", None) or 1) / experts if experts > 1 else 1.0
    places: list[tuple[int, float, bool]] = []  # the layer, the multiplied parameters, trained?
    for name, parameter in model.named_parameters():
        if any(mark in name for mark in IMAGE):
            continue
        count = getattr(parameter, "ds_numel", parameter.numel())
        layer = _LAYER.search(name)
        # What is looked up comes before all layers, the output layer after them.
        place = -1 if parameter in tables else int(layer[1]) if layer else layers
        share = 0.0 if parameter in lookups else chosen if ".experts." in name else 1.0
        places.append((place, count * share, parameter.requires_grad))
    lowest = min((place for place, _, trained in places if trained), default=layers)
    every = sum(count for _, count, _ in places)
    # A tied output layer is multiplied after all layers, wherever its table is looked up.
    reached = sum(c for place, c, _ in places if place >= lowest or place < 0)
    trained = sum(count for _, count, trained in places if trained)
    return round(every), Backward(round(reached), round(trained), max(lowest, 0))


def peak_flops(on_gpu: bool, dtype: str = "float32") -> tuple[str, float | None]:
    """This worker's device, and the most it can do: a GPU's by its name, a CPU's by trying.

    Args:
        on_gpu: Whether the worker trains on a GPU.
        dtype: The precision its matrix products are in, ``"bfloat16"`` or ``"float32"``.

    Returns:
        Its name, and FLOP/s of dense matrix products; ``None`` for a GPU that is not known.
    """
    import torch

    if on_gpu:
        name = torch.cuda.get_device_name()
        key = gpu_named(name)
        return name, GPUS[key][0] if key else None
    size = 1024
    left = torch.ones(size, size, dtype=getattr(torch, dtype))  # no random number is used up
    best = float("inf")
    for _ in range(5):
        since = time.perf_counter()
        left @ left
        best = min(best, time.perf_counter() - since)
    return f"{torch.get_num_threads()} CPU threads", 2 * size**3 / best


def peak_memory(on_gpu: bool = False) -> int:
    """The most memory this process has held so far, in bytes: the GPU's, or the resident set."""
    if on_gpu:
        import torch

        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.is_file():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    import resource
    import sys

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
