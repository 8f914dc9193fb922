"""Compares the weights that the ranks hold with the files they were loaded from.

A training that starts from other weights than its model's runs to its end and is worthless. Each
rank reads its own part of the files as a stream; nothing is gathered.
"""

from __future__ import annotations

import json
import math
import random
import struct
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
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
    """The result of a comparison.

    Attributes:
        parameters: Parameters that were compared.
        bytes: Bytes that this rank compared.
        share: The share of each parameter that was compared; 1 means every element.
        seconds: How long it took.
        skipped: Why nothing was compared; empty where something was.
    """

    parameters: int
    bytes: int
    share: float
    seconds: float
    skipped: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


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
        model: As the trainer holds it, after DeepSpeed and after a checkpoint was loaded.
        recipe: The resolved recipe.
        resumed: The checkpoint that the training resumes from; its weights are compared then.

    Raises:
        WeightsError: A rank holds other weights, or a parameter is in no file; with their names.
    """
    from .callback import all_ranks

    since = time.monotonic()
    base, adapter = _base_and_adapter(model)
    stored, skipped = _sources(base, adapter, recipe, resumed)
    if skipped:
        print(f"weights not compared with their files: {skipped}", flush=True)
        return Verified(0, 0, 0.0, 0.0, skipped)
    named = _named(model, base, adapter=bool(resumed))
    parts = {name: _own_part(parameter) for name, parameter in named}
    parts = {name: part for name, part in parts.items() if part is not None}
    held = sum(tensor.numel() * tensor.element_size() for tensor, _ in parts.values())
    share = min(1.0, LIMIT / held) if held else 1.0
    wrong, bytes_read = [], 0
    for name, (tensor, start) in parts.items():
        if name not in stored:
            wrong.append(f"{name} is in no file: its values are random")
            continue
        count = tensor.numel()
        compared = count if share == 1 else min(count, max(_FEWEST, int(count * share)))
        at = random.Random(name).randrange(count - compared + 1) if compared else 0
        problem = _compare(tensor[at : at + compared], stored[name], start + at, recipe)
        bytes_read += compared * tensor.element_size()
        if problem:
            wrong.append(f"{name} {problem}")
    found = [
        f"rank {rank}: {problem}"
        for rank, own in enumerate(all_ranks({"wrong": wrong}))
        for problem in own["wrong"]
    ]
    if found:
        more = f"\n… and {len(found) - 8} more" if len(found) > 8 else ""
        raise WeightsError(
            f"{len(found)} parameters differ from the files they were loaded from",
            where="\n".join(found[:8]) + more,
            expected=f"the weights in {resumed['path'] if resumed else _folder(recipe)}",
            do="run it again under another RUN_NAME; if it happens again, report it with the "
            "rank's log",
        )
    seconds = round(time.monotonic() - since, 2)
    print(f"weights compared with their files: {len(parts)} parameters, {seconds} s", flush=True)
    return Verified(len(parts), bytes_read, round(share, 4), seconds)


def differing(one: Path, other: Path) -> list[str]:
    """Names of tensors that two folders of safetensors share and that are not the same bytes.

    Tensors of different precisions are not compared.
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


def _base_and_adapter(model: Any) -> tuple[Any, bool]:
    """The transformers model, and whether an adapter is around it."""
    if hasattr(model, "get_base_model"):
        return model.get_base_model(), True
    return model, False


def _sources(
    base: Any, adapter: bool, recipe: Recipe, resumed: dict[str, Any] | None
) -> tuple[dict[str, _Stored], str]:
    """Where each parameter's values are stored, and why they are not compared where not."""
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
        trained = _stored(checkpoint)
        stored |= {_adapter_name(name): part for name, part in trained.items()}
    return stored, ""


def _folder(recipe: Recipe) -> Path:
    """The folder of the recipe's model; one on the hub is in the hub's cache by now."""
    name = str(recipe["model_name_or_path"])
    if Path(name).is_dir():
        return Path(name)
    from transformers.utils import cached_file

    return Path(cached_file(name, "config.json", local_files_only=True)).parent


def _named(model: Any, base: Any, *, adapter: bool) -> Iterator[tuple[str, Any]]:
    """Parameters by the name that files know them by; an adapter's own, if wanted, by peft's."""
    if base is model:
        yield from model.named_parameters()
        return
    for name, parameter in model.named_parameters():
        plain = name.removeprefix("base_model.model.")
        if ".lora_" in plain:
            if adapter:
                yield name, parameter
        elif "modules_to_save." not in plain:
            yield plain.replace(".base_layer.", "."), parameter


def _adapter_name(key: str) -> str:
    """``…lora_A.weight`` in a file is ``…lora_A.default.weight`` in the model."""
    module, _, last = key.rpartition(".")
    return f"{module}.default.{last}"


def _stored(folder: Path) -> dict[str, _Stored]:
    """Every tensor of a folder's safetensors, from the headers alone."""
    found = {}
    for path in models.weights_of(folder):
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
        for name, tensor in header.items():
            if name != "__metadata__":
                elements = math.prod(tensor["shape"])
                first, end = tensor["data_offsets"]
                start = 8 + size + first
                found[name] = _Stored(path, start, tensor["dtype"], elements, end - first)
    return found


def _by_parameter(base: Any, stored: dict[str, _Stored]) -> dict[str, _Stored]:
    """Stored tensors by the parameter that transformers 4.52 loads each of them into."""
    known = {name.replace(".base_layer.", ".") for name, _ in base.named_parameters()}
    prefix = f"{base.base_model_prefix}."
    renamed = base._get_key_renaming_mapping(list(stored), base._checkpoint_conversion_mapping)
    found = {}
    for key, tensor in stored.items():
        name = renamed.get(key, key)
        names = [key, name, prefix + name, name.removeprefix(prefix)]
        if target := next((n for n in names if n in known), None):
            found[target] = tensor
    for tied in base._tied_weights_keys or ():  # a file may hold either of two tied weights
        lookup = base.get_input_embeddings().weight
        name = next((n for n, p in base.named_parameters() if p is lookup), None)
        if name and name not in found and tied in stored:
            found[name] = stored[tied]
    return found


def _own_part(parameter: Any) -> tuple[Any, int] | None:
    """What this rank holds of a parameter, flat, and the number of its first element.

    ``None`` where it holds nothing that can be compared: padding only, or weights on NVMe.
    """
    import torch.distributed as dist

    shard = getattr(parameter, "ds_tensor", None)
    if shard is None:
        return parameter.data.reshape(-1), 0
    if hasattr(shard, "ds_quant_scale") or str(getattr(shard, "status", "")).endswith(
        "NOT_AVAILABLE"
    ):
        return None
    start = dist.get_rank(parameter.ds_process_group) * shard.ds_numel
    count = min(shard.ds_numel, parameter.ds_numel - start)
    return (shard.data.reshape(-1)[:count], start) if count > 0 else None


def _compare(held: Any, stored: _Stored, start: int, recipe: Recipe) -> str:
    """What is wrong with a part of a parameter; empty where it equals the file's."""
    import torch

    if stored.dtype not in _DTYPES:
        return ""
    if start + held.numel() > stored.elements:
        return "" if recipe.get("resize_vocab") else "has another shape than in the file"
    done = 0
    for read in _read(stored, start, held.numel()):
        ours = held[done : done + read.numel()]
        done += read.numel()
        read = read.to(ours.device)
        # Loaded in the precision of the training, then kept in the parameter's own.
        loaded = read.to(getattr(torch, recipe.precision)).to(ours.dtype)
        if not torch.equal(ours, read.to(ours.dtype)) and not torch.equal(ours, loaded):
            differ = int((ours != loaded).sum())
            return f"differs in {differ:,} of {ours.numel():,} elements"
    return ""


def _read(stored: _Stored, start: int, count: int) -> Iterator[Any]:
    """Elements of a stored tensor, flat, a chunk at a time."""
    import torch

    dtype = getattr(torch, _DTYPES[stored.dtype])
    for chunk in _bytes(stored, start * dtype.itemsize, count * dtype.itemsize):
        yield torch.frombuffer(chunk, dtype=dtype)


def _bytes(stored: _Stored, start: int = 0, count: int | None = None) -> Iterator[bytearray]:
    """A stored tensor's bytes, a chunk at a time."""
    with stored.path.open("rb") as file:
        file.seek(stored.start + start)
        left = stored.bytes if count is None else count
        while left > 0:
            chunk = bytearray(file.read(min(_CHUNK, left)))
            if not chunk:
                raise WeightsError("a file of weights is cut short", where=stored.path)
            left -= len(chunk)
            yield chunk
