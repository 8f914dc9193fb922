"""A checkpoint becomes a plain Hugging Face folder, in one of its forms.

Nothing of the training state goes along: safetensors weights, configuration, tokenizer. What LoRA
trained is merged into its base, or goes alone, as an adapter that names its base.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from pathlib import Path

from ..checkpoints.manifests import MANIFEST
from ..errors import CheckpointError, ExportError, WeightsError
from ..redirect import hushed
from ..setup.assets import sha256
from ..setup.machine import require_room
from ..setup.models import (
    ADAPTER,
    BASE,
    base_of,
    config_of,
    copy_processor,
    empty,
    load,
    require_base,
    shapes_of,
    weights_of,
)
from ..train import weights

DTYPES = ("auto", "bfloat16", "float16", "float32")
FORMS = ("merged", "adapter")
_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "BF16": 2, "F16": 2, "F32": 4}


def export(checkpoint: Path, target: Path, *, dtype: str = "auto", form: str = "merged") -> Path:
    """Writes a checkpoint's model as a plain Hugging Face folder; an equal one is left alone.

    Args:
        checkpoint: The Hugging Face checkpoint (``Checkpoint.model``).
        target: The folder to make.
        dtype: ``"auto"`` keeps the precision it was trained in; what LoRA trained is merged into
            the precision its base is stored in.
        form: ``"merged"``, a model that stands alone, or ``"adapter"``, what LoRA trained alone.

    Raises:
        ExportError: The dtype or form is unknown, the folder holds another export, there is no
            adapter to export, or it is not its base's.
        CheckpointError: The checkpoint is missing or broken.
        AssetError: An adapter's base is not there.
        StorageError: There is too little room.
    """
    for name, value, known in (("dtype", dtype, DTYPES), ("form", form, FORMS)):
        if value not in known:
            raise ExportError(f"unknown {name} '{value}'", expected=", ".join(known))
    made_from = {"checkpoint": str(checkpoint), "dtype": dtype, "form": form}
    if _is_there(target, made_from):
        return target
    _require_whole(checkpoint)
    lora = (checkpoint / ADAPTER).is_file()
    if form == "adapter" and not lora:
        raise ExportError(
            "there is no adapter in this checkpoint: all that was trained are the model's weights",
            where=checkpoint,
            expected=f"a LoRA checkpoint, with {ADAPTER}",
            do="export it with form 'merged'",
        )
    if lora:
        require_base(checkpoint)
    existing = next(p for p in target.absolute().parents if p.is_dir())
    need = _size(checkpoint, dtype, form) / 2**30
    require_room(existing, need, f"room for the export ({form}, {dtype})")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        (_write_adapter if form == "adapter" else _write_model)(checkpoint, part, dtype)
        (part / "export.json").write_text(json.dumps(made_from, indent=2) + "\n", "utf-8")
        part.chmod(0o755)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def _is_there(target: Path, made_from: dict[str, str]) -> bool:
    """Whether that very export is there already; another one, or anything else, is refused."""
    if not target.exists():
        return False
    try:
        note = json.loads((target / "export.json").read_text("utf-8"))
        if {"form": "merged"} | note == made_from:  # notes of old do not name a form
            return True
    except (OSError, ValueError, TypeError):
        pass
    raise ExportError(
        "the export folder exists and holds something else",
        where=target,
        expected="no folder, or an export of {checkpoint} as {dtype}, {form}".format(**made_from),
        do="move it away, or export the same again; nothing was changed",
    )


def _require_whole(checkpoint: Path) -> None:
    """Reads what the weights' files say of themselves, and compares them with the manifest."""
    reason = "there is no such folder" if not checkpoint.is_dir() else ""
    try:
        files = weights_of(checkpoint) if not reason else []
        needed = ADAPTER if (checkpoint / ADAPTER).is_file() else "config.json"
        named = {}
        if (checkpoint.parent / MANIFEST).is_file():
            named = json.loads((checkpoint.parent / MANIFEST).read_text("utf-8"))["files"]
        for path in [checkpoint / needed, checkpoint / "tokenizer_config.json", *files]:
            written = named.get(f"{checkpoint.name}/{path.name}")
            if not reason and not path.is_file():
                reason = f"{path.name} is missing"
            elif not reason and written and sha256(path) != written["sha256"]:
                reason = f"{path.name} is not what was written: its sha256 differs"
        if not reason:
            shapes_of(checkpoint)
            json.loads((checkpoint / needed).read_text("utf-8"))
    except Exception as error:  # safetensors has an error of its own, derived from Exception
        reason = f"it cannot be read: {' '.join(str(error).split())[:200]}"
    if reason:
        raise CheckpointError(
            f"the checkpoint cannot be exported: {reason}",
            where=checkpoint,
            expected="a Hugging Face checkpoint with configuration, tokenizer and safetensors",
            do="export another one (checkpoints.pick passes broken ones over); nothing was written",
        )


def _size(checkpoint: Path, dtype: str, form: str) -> int:
    """Bytes the export's weights will take."""
    if form == "merged" and (base := base_of(checkpoint)):
        stored = str(getattr(config_of(base), "torch_dtype", None)).removeprefix("torch.")
        width = _BYTES.get(stored if dtype == "auto" else dtype, 4)
        return width * sum(p.numel() for p in empty(config_of(base)).parameters())
    shapes = shapes_of(checkpoint).values()
    return sum(
        math.prod(shape) * _BYTES.get(own if dtype == "auto" else dtype, 4) for shape, own in shapes
    )


def _write_model(checkpoint: Path, part: Path, dtype: str) -> None:
    import torch

    base = base_of(checkpoint)
    # Merged in fp32 and rounded once: sums in bf16 would lose what a small adapter adds.
    model, tokenizer = load(checkpoint, dtype="float32" if base else dtype)
    if base:
        model = model.merge_and_unload()
        stored = getattr(config_of(base), "torch_dtype", None) or torch.float32
        model = model.to(stored if dtype == "auto" else getattr(torch, dtype))
    with hushed():  # DeepSpeed's import tells where it runs
        model.save_pretrained(part, safe_serialization=True)
    if not base and (changed := weights.differing(checkpoint, part)):
        raise WeightsError(
            f"{len(changed)} exported tensors differ from the checkpoint's: "
            + ", ".join(changed[:3]),
            where=checkpoint,
            expected="the same bytes wherever the precision is the same",
            do="export again; if it happens again, report it with the model's config.json",
        )
    tokenizer.save_pretrained(part)
    for folder in [Path(base), checkpoint] if base else [checkpoint]:
        copy_processor(folder, part)


def _write_adapter(checkpoint: Path, part: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    weights = load_file(checkpoint / "adapter_model.safetensors")
    if dtype != "auto":
        weights = {name: w.to(getattr(torch, dtype)) for name, w in weights.items()}
    save_file(weights, part / "adapter_model.safetensors", {"format": "pt"})
    for name in (ADAPTER, BASE):
        if (checkpoint / name).is_file():  # checkpoints of old do not say which base it was
            shutil.copy(checkpoint / name, part / name)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(part)
