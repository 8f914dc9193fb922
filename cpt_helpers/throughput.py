"""What a training does with its machine: FLOPs a token, the peak they are held against, memory.

The Trainer's own FLOP count sees only a rank's shard under ZeRO-3, so it is counted here.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

# Dense bf16 matrix products, FLOP/s, and memory in GiB as the driver reports it; from NVIDIA's data
# sheets (their figures «with sparsity» halved). T4 and V100 have no bf16: fp16.
GPUS: dict[str, tuple[float, float]] = {
    "B200": (2250e12, 178.0),
    "H200": (989e12, 139.8),
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
_IMAGE = ("vision_tower", "multi_modal_projector")


def gpu_named(name: str) -> str | None:
    """The key of :data:`GPUS` for a device's name, ``"NVIDIA H100 80GB HBM3"`` → ``"H100"``."""
    words = set(re.split(r"[^A-Z0-9]+", name.upper().replace("RTX ", "RTX")))
    if "H100" in words and "PCIE" in words:
        return "H100-PCIE"
    if "A100" in words:
        return "A100-80G" if words & {"80G", "80GB"} else "A100-40G"
    return next((key for key in GPUS if key in words), None)


def attention_widths(config: Any, length: int) -> int:
    """Heads × head size × tokens looked at, summed over the layers; windows are narrower."""
    text = getattr(config, "text_config", config)
    heads = text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    layers, window = text.num_hidden_layers, getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    pattern = getattr(text, "sliding_window_pattern", None)
    seen = 0
    for layer in range(layers):
        if kinds:
            local = kinds[layer] == "sliding_attention"
        else:
            local = bool(pattern and window and (layer + 1) % pattern)
        seen += min(length, window) if local and window else length
    return width * seen


def flops_per_token(config: Any, parameters: int, trained: int, length: int) -> float:
    """Floating-point operations of a training step, for each token.

    6 a parameter (2 forward, 2 for the gradient of the activations, 2 for the weights') and
    12 × heads × head size × length for attention, as Chowdhery et al. 2022 (arXiv 2204.02311,
    appendix B) count them: causal masks and recomputed activations are not taken off or added.
    Frozen weights need no gradient of their own: 4.

    Args:
        config: The model's ``transformers`` configuration.
        parameters: Those text goes through, a tied embedding once (as the output layer; looking
            up a row costs nothing), an untied input embedding not.
        trained: Those of them that are trained.
        length: Tokens in a block.
    """
    return 4.0 * parameters + 2.0 * trained + 12.0 * attention_widths(config, length)


def text_parameters(model: Any) -> tuple[int, int]:
    """A model's parameters that text is multiplied with: all, and trained; also under ZeRO-3."""
    lookup = model.get_input_embeddings().weight
    output = model.get_output_embeddings()
    tied = output is not None and output.weight is lookup
    every = trained = 0
    for name, parameter in model.named_parameters():
        if any(mark in name for mark in _IMAGE) or (parameter is lookup and not tied):
            continue
        count = getattr(parameter, "ds_numel", parameter.numel())
        every += count
        trained += count if parameter.requires_grad else 0
    return every, trained


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
