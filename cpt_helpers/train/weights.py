"""Compares the weights that the ranks hold with the files they were loaded from.

A training that starts from wrong weights runs to its end, and its result is worthless. Each rank
reads its own part of the files as a stream; nothing is gathered.
"""

from __future__ import annotations

import json
import math
import random
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import WeightsError
from ..recipes import Recipe
from ..setup import models

LIMIT = 16 * 2**30  # bytes that one rank compares; a few seconds from the page cache
_CHUNK = 16 * 2**20  # bytes read at once
_FEWEST = 4096  # elements of a parameter that are compared, however large the model
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Verified:
    """The result of a comparison on one rank.

    Attributes:
        parameters: Number of compared parameters.
        bytes: Number of compared bytes.
        share: The compared share of each parameter; 1 means every element.
        seconds: How long it took.
        skipped: Why nothing was compared; else empty.
    """

    parameters: int
    bytes: int
    share: float
    seconds: float
    skipped: str = ""


@dataclass(frozen=True)
class _Stored:
    """A tensor in a safetensors file."""

    path: Path
    start: int  # byte of its first element
    dtype: str
    elements: int
    bytes: int


def verify(model: Any, recipe: Recipe, resumed: dict[str, Any] | None) -> Verified:
    """Compares every parameter of a loaded model with its file, on all ranks.

    Args:
        model: The trainer's model, after DeepSpeed's start and after a checkpoint was loaded.
        recipe: The resolved recipe.
        resumed: The checkpoint that the training resumes from; its weights are compared instead.

    Raises:
        WeightsError: A rank holds other weights, or a parameter is in no file; with their names.
    """
    since = time.monotonic()
    adapter = hasattr(model, "get_base_model")  # peft's wrapper
    base = model.get_base_model() if adapter else model
    stored, skipped = _sources(base, adapter, recipe, resumed)
    if skipped:
        print(f"weights not compared with their files: {skipped}", flush=True)
        return Verified(0, 0, 0.0, 0.0, skipped)
    shards = {name: _shard(p) for name, p in _named(model, base, adapter=bool(resumed))}
    held = {name: shard for name, shard in shards.items() if shard}
    size = sum(tensor.numel() * tensor.element_size() for tensor, _ in held.values())
    share = min(1.0, LIMIT / size) if size else 1.0
    problems, compared_bytes = [], 0
    for name, (tensor, start) in held.items():
        if name not in stored:
            problems.append(f"{name} is in no file: its values are random")
            continue
        count = tensor.numel()
        compared = count if share == 1 else min(count, max(_FEWEST, int(count * share)))
        at = random.Random(name).randrange(count - compared + 1) if compared else 0
        problem = _compare(tensor[at : at + compared], stored[name], start + at, recipe)
        compared_bytes += compared * tensor.element_size()
        if problem:
            problems.append(f"{name} {problem}")
    _raise_on_any_rank(problems, resumed["path"] if resumed else _folder(recipe))
    seconds = round(time.monotonic() - since, 2)
    print(f"weights compared with their files: {len(held)} parameters, {seconds} s", flush=True)
    return Verified(len(held), compared_bytes, round(share, 4), seconds)


def _raise_on_any_rank(problems: list[str], source: Any) -> None:
    from .callback import all_ranks

    everywhere = [f"rank {rank}: {p}" for rank, own in enumerate(all_ranks(problems)) for p in own]
    if everywhere:
        more = f"\n… and {len(everywhere) - 8} more" if len(everywhere) > 8 else ""
        raise WeightsError(
            f"{len(everywhere)} parameters differ from the files they were loaded from",
            where="\n".join(everywhere[:8]) + more,
            expected=f"the weights in {source}",
            do="train again under another RUN_NAME; if it happens again, report it with the "
            "rank's log",
        )


def differing(one: Path, other: Path) -> list[str]:
    """Names of tensors whose bytes differ between two folders of safetensors.

    Tensors that only one folder has, or of different precisions, are not compared.
    """
    ours, theirs = _stored(one), _stored(other)
    return [
        name
        for name, tensor in sorted(ours.items())
        if name in theirs
        and theirs[name].dtype == tensor.dtype
        and (
            theirs[name].elements != tensor.elements
            or any(a != b for a, b in zip(_bytes(tensor), _bytes(theirs[name]), strict=True))
        )
    ]


def _sources(
    base: Any, adapter: bool, recipe: Recipe, resumed: dict[str, Any] | None
) -> tuple[dict[str, _Stored], str]:
    """The stored tensor of each parameter, or the reason why nothing is compared."""
    if recipe.get("quantization_bit"):
        return {}, "the base model is quantized while it is loaded"
    if recipe.get("adapter_name_or_path"):
        return {}, "an adapter is merged into the model while it is loaded"
    checkpoint = Path(resumed["path"], "checkpoint") if resumed else None
    source = checkpoint if checkpoint and not adapter else _folder(recipe)
    if not any(source.glob("*.safetensors")):
        return {}, f"{source} holds no safetensors"
    stored = _by_parameter(base, _stored(source))
    if adapter and checkpoint:
        for name, tensor in _stored(checkpoint).items():
            # "…lora_A.weight" in a file is "…lora_A.default.weight" in the model.
            module, _, last = name.rpartition(".")
            stored[f"{module}.default.{last}"] = tensor
    return stored, ""


def _folder(recipe: Recipe) -> Path:
    """The folder of the recipe's model; a model on the hub is in the hub's cache now."""
    name = str(recipe["model_name_or_path"])
    if Path(name).is_dir():
        return Path(name)
    from transformers.utils import cached_file

    return Path(str(cached_file(name, "config.json", local_files_only=True))).parent


def _named(model: Any, base: Any, *, adapter: bool) -> Iterator[tuple[str, Any]]:
    """Parameters by their names in files; an adapter's, if wanted, by peft's names."""
    if base is model:
        yield from model.named_parameters()
        return
    for name, parameter in model.named_parameters():
        plain = name.removeprefix("base_model.model.")
        if ".lora_" in plain and adapter:
            yield name, parameter
        elif ".lora_" not in plain and "modules_to_save." not in plain:
            yield plain.replace(".base_layer.", "."), parameter


def _stored(folder: Path) -> dict[str, _Stored]:
    """Every tensor of a folder's safetensors, read from the headers."""
    tensors = {}
    for path in models.weights_of(folder):
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
        for name, tensor in header.items():
            if name != "__metadata__":
                elements = math.prod(tensor["shape"])
                first, end = tensor["data_offsets"]
                start = 8 + size + first
                tensors[name] = _Stored(path, start, tensor["dtype"], elements, end - first)
    return tensors


def _by_parameter(base: Any, stored: dict[str, _Stored]) -> dict[str, _Stored]:
    """Stored tensors by the parameter that transformers 4.52 loads each of them into."""
    known = {name.replace(".base_layer.", ".") for name, _ in base.named_parameters()}
    prefix = f"{base.base_model_prefix}."
    renamed = base._get_key_renaming_mapping(list(stored), base._checkpoint_conversion_mapping)
    tensors = {}
    for key, tensor in stored.items():
        name = renamed.get(key, key)
        names = [key, name, prefix + name, name.removeprefix(prefix)]
        if target := next((n for n in names if n in known), None):
            tensors[target] = tensor
    for tied in base._tied_weights_keys or ():  # a file may hold either of two tied weights
        lookup = base.get_input_embeddings().weight
        shared = next((n for n, p in base.named_parameters() if p is lookup), None)
        if shared and shared not in tensors and tied in stored:
            tensors[shared] = stored[tied]
    return tensors


def _shard(parameter: Any) -> tuple[Any, int] | None:
    """This rank's part of a parameter, flat, and the index of its first element.

    ``None`` if nothing can be compared: it holds padding only, or the weights are on NVMe.
    """
    import torch.distributed as dist

    shard = getattr(parameter, "ds_tensor", None)
    if shard is None:
        return parameter.data.reshape(-1), 0
    on_nvme = str(getattr(shard, "status", "")).endswith("NOT_AVAILABLE")
    if on_nvme or hasattr(shard, "ds_quant_scale"):
        return None
    start = dist.get_rank(parameter.ds_process_group) * shard.ds_numel
    count = min(shard.ds_numel, parameter.ds_numel - start)
    return (shard.data.reshape(-1)[:count], start) if count > 0 else None


def _compare(held: Any, stored: _Stored, start: int, recipe: Recipe) -> str:
    """How a part of a parameter differs from the file's; empty if it is equal."""
    import torch

    if stored.dtype not in _DTYPES:
        return ""
    if start + held.numel() > stored.elements:
        return "" if recipe.get("resize_vocab") else "has another shape than in the file"
    dtype, done = getattr(torch, _DTYPES[stored.dtype]), 0
    for chunk in _bytes(stored, start * dtype.itemsize, held.numel() * dtype.itemsize):
        read = torch.frombuffer(chunk, dtype=dtype).to(held.device)
        ours = held[done : done + read.numel()]
        done += read.numel()
        # Loaded in the precision of the training, then kept in the parameter's own.
        loaded = read.to(getattr(torch, recipe.precision)).to(ours.dtype)
        if not torch.equal(ours, read.to(ours.dtype)) and not torch.equal(ours, loaded):
            differ = int((ours != loaded).sum())
            return f"differs in {differ:,} of {ours.numel():,} elements"
    return ""


def _bytes(stored: _Stored, start: int = 0, count: int | None = None) -> Iterator[bytearray]:
    """A stored tensor's bytes, a chunk at a time."""
    with stored.path.open("rb") as file:
        file.seek(stored.start + start)
        remaining = stored.bytes if count is None else count
        while remaining > 0:
            chunk = bytearray(file.read(min(_CHUNK, remaining)))
            if not chunk:
                raise WeightsError("a file of weights is truncated", where=stored.path)
            remaining -= len(chunk)
            yield chunk
