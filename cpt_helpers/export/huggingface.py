"""Writes a checkpoint as a plain Hugging Face folder, and compares it with the trainer's losses.

The folder contains safetensors weights, configuration and tokenizer, and nothing of the training
state. A LoRA adapter is merged into its base, or exported alone with the name of its base.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import display, recipes
from ..checkpoints.manifests import MANIFEST, Checkpoint, pick
from ..errors import CheckpointError, ExportError, WeightsError
from ..redirect import hushed
from ..run import Run, in_one_piece
from ..setup import models
from ..setup.assets import sha256, tokenizer_of
from ..setup.machine import require_room
from ..setup.models import ADAPTER, BASE, base_of, config_of, require_base, shapes_of
from ..train import weights
from . import evaluation

if TYPE_CHECKING:
    from pandas import DataFrame

DTYPES = ("auto", "bfloat16", "float16", "float32")
FORMS = ("merged", "adapter")
NOTE = "export.json"
CARD = "README.md"
_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "BF16": 2, "F16": 2, "F32": 4}


@dataclass(frozen=True)
class Verification:
    """The exported model's perplexities, measured without the trainer.

    Attributes:
        dtype: The precision of the loaded weights.
        table: For each role, the trainer's perplexity, the exported model's, and the difference.
        same_separator: Whether documents end with the base model's token.
    """

    dtype: str
    table: DataFrame
    same_separator: bool

    @property
    def tolerance(self) -> float:
        """The relative difference that rounding explains in this precision."""
        return 1e-3 if self.dtype == "float32" else 2e-2

    @property
    def agrees(self) -> bool:
        """Whether all perplexities equal the trainer's within the tolerance."""
        return not (self.table["difference"].abs() > self.tolerance).any()

    @property
    def perplexity(self) -> dict[str, float]:
        """The exported model's perplexity by role."""
        return self.table["exported model"].round(3).to_dict()

    def __repr__(self) -> str:
        return self.table.to_string()

    def _repr_html_(self) -> str:
        shown = self.table.round(3)
        shown["difference"] = self.table["difference"].map("{:+.3%}".format)
        return shown.to_html()


@dataclass(frozen=True)
class Export:
    """An exported checkpoint: the Hugging Face folder, and its form, merged or adapter."""

    run: Run
    checkpoint: Checkpoint
    folder: Path
    form: str

    @property
    def files(self) -> DataFrame:
        """The files and their sizes, without the model card, which is written later."""
        paths = [path for path in sorted(self.folder.iterdir()) if path.name != CARD]
        rows = [{"file": path.name, "MB": round(path.stat().st_size / 1e6, 2)} for path in paths]
        return display.table(rows)

    def __repr__(self) -> str:
        return f"step {self.checkpoint.step}, {self.form}, in {self.folder}\n{self.files}"

    def _repr_html_(self) -> str:
        source = f"<p>step {self.checkpoint.step}, from <code>{self.checkpoint.path}</code></p>"
        return source + self.files.to_html(index=False, float_format="{:.2f}".format)

    def load(self) -> tuple[Any, Any]:
        """The model and its tokenizer, loaded by plain transformers (and peft)."""
        return models.load(self.folder)

    def verify(self, model: Any, tokenizer: Any) -> Verification:
        """Measures the loaded model's held-out perplexity and compares it with the trainer's."""
        import pandas as pd

        recipe = recipes.load(self.run)
        roles, losses = recipe.held_out, self.checkpoint.losses
        columns = {
            "held-out text": roles,
            "trainer": {role: math.exp(losses.get(name, math.nan)) for role, name in roles.items()},
            "exported model": evaluation.held_out_perplexity(self.run, model, tokenizer),
        }
        table = pd.DataFrame(columns).rename_axis("role")
        table["difference"] = table["exported model"] / table["trainer"] - 1
        base = tokenizer_of(recipe["model_name_or_path"])
        dtype = str(model.dtype).removeprefix("torch.")
        return Verification(dtype, table, tokenizer.eos_token == base.eos_token)

    def as_dict(self, verification: Verification) -> dict[str, Any]:
        """The values for the run's results, the model card and MLflow."""
        return {
            "path": str(self.folder),
            "dtype": verification.dtype,
            "form": self.form,
            "step": self.checkpoint.step,
            "perplexity": verification.perplexity,
            "bytes": sum((self.folder / name).stat().st_size for name in self.files["file"]),
        }


def export_run(
    run: Run, checkpoint: str = "last", *, dtype: str = "auto", form: str = "merged"
) -> Export:
    """Exports the last checkpoint of a run, or the best one, to ``<run>/export``.

    Args:
        run: The run.
        checkpoint: ``"last"``, or ``"best"`` by held-out loss on the domain.
        dtype: As for :func:`write_model`, like ``form`` and the errors.
        form: ``"merged"`` or ``"adapter"``.
    """
    chosen = pick(run, checkpoint, recipes.load(run).held_out.get("domain"))
    return Export(run, chosen, write_model(chosen.model, run.export, dtype=dtype, form=form), form)


def write_model(
    checkpoint: Path, target: Path, *, dtype: str = "auto", form: str = "merged"
) -> Path:
    """Writes a checkpoint's model as a plain Hugging Face folder; an equal one is kept.

    Args:
        checkpoint: The Hugging Face checkpoint (``Checkpoint.model``).
        target: The folder to make.
        dtype: ``"auto"`` keeps the precision of the training. A merged LoRA model has the precision
            of the stored base.
        form: ``"merged"``, a complete model, or ``"adapter"``, the LoRA adapter alone.

    Raises:
        ExportError: The dtype or form is unknown, the folder holds another export, there is no
            adapter to export, or the adapter belongs to another base.
        CheckpointError: The checkpoint is missing or broken.
        AssetError: The base of an adapter is missing.
        StorageError: There is too little room.
    """
    for name, value, known in (("dtype", dtype, DTYPES), ("form", form, FORMS)):
        if value not in known:
            raise ExportError(f"unknown {name} '{value}'", expected=", ".join(known))
    made_from = {"checkpoint": str(checkpoint), "dtype": dtype, "form": form}
    older = {k: v for k, v in made_from.items() if (k, v) != ("form", "merged")}  # no form before
    if is_made(target / NOTE, made_from, f"an export of {checkpoint} as {dtype}, {form}", older):
        return target
    _require_whole(checkpoint)
    lora = (checkpoint / ADAPTER).is_file()
    if form == "adapter" and not lora:
        raise ExportError(
            "there is no adapter in this checkpoint: the training changed the model's weights",
            where=checkpoint,
            expected=f"a LoRA checkpoint, with {ADAPTER}",
            do="export it with form 'merged'",
        )
    if lora:
        require_base(checkpoint)
    existing = next(p for p in target.absolute().parents if p.is_dir())
    need = _size(checkpoint, dtype, form) / 2**30
    require_room(existing, need, f"room for the export ({form}, {dtype})")
    with in_one_piece(target) as new:
        (_write_adapter if form == "adapter" else _write_merged)(checkpoint, new, dtype)
        write_note(new / NOTE, made_from)
    return target


def is_made(note: Path, made_from: dict[str, Any], expected: str, *older: dict[str, Any]) -> bool:
    """Whether the folder of this note exists and was made from these inputs.

    Args:
        note: The file that records the inputs.
        made_from: The inputs.
        expected: A description of the folder for the error message.
        *older: The inputs as earlier releases recorded them.

    Raises:
        ExportError: The folder was made from something else.
    """
    if not note.parent.exists():
        return False
    try:
        if json.loads(note.read_text("utf-8")) in (made_from, *older):
            return True
    except (OSError, ValueError):
        pass
    raise ExportError(
        "the folder exists and holds something else",
        where=note.parent,
        expected=f"no folder, or {expected}",
        do="move it away, or choose another folder; nothing was changed",
    )


def write_note(note: Path, made_from: dict[str, Any]) -> None:
    note.write_text(json.dumps(made_from, indent=2) + "\n", "utf-8")


def _require_whole(checkpoint: Path) -> None:
    """Reads the headers of the weights and compares the files with the manifest."""
    reason = "there is no such folder" if not checkpoint.is_dir() else ""
    try:
        files = models.weights_of(checkpoint) if not reason else []
        needed = ADAPTER if (checkpoint / ADAPTER).is_file() else "config.json"
        named = {}
        if (checkpoint.parent / MANIFEST).is_file():
            named = json.loads((checkpoint.parent / MANIFEST).read_text("utf-8"))["files"]
        for path in [checkpoint / needed, checkpoint / "tokenizer_config.json", *files]:
            written = named.get(f"{checkpoint.name}/{path.name}")
            if not reason and not path.is_file():
                reason = f"{path.name} is missing"
            elif not reason and written and sha256(path) != written["sha256"]:
                reason = f"{path.name} has changed since it was written: its sha256 differs"
        if not reason:
            shapes_of(checkpoint)
            json.loads((checkpoint / needed).read_text("utf-8"))
    except Exception as error:  # safetensors raises its own subclass of Exception
        reason = f"it cannot be read: {' '.join(str(error).split())[:200]}"
    if reason:
        raise CheckpointError(
            f"the checkpoint cannot be exported: {reason}",
            where=checkpoint,
            expected="a Hugging Face checkpoint with configuration, tokenizer and safetensors",
            do="export another checkpoint; nothing was written",
        )


def _size(checkpoint: Path, dtype: str, form: str) -> int:
    """Bytes the export's weights will take."""
    if form == "merged" and (base := base_of(checkpoint)):
        stored = str(getattr(config_of(base), "torch_dtype", None)).removeprefix("torch.")
        width = _BYTES.get(stored if dtype == "auto" else dtype, 4)
        return width * sum(p.numel() for p in models.empty(config_of(base)).parameters())
    shapes = shapes_of(checkpoint).values()
    return sum(
        math.prod(shape) * _BYTES.get(stored if dtype == "auto" else dtype, 4)
        for shape, stored in shapes
    )


def _write_merged(checkpoint: Path, part: Path, dtype: str) -> None:
    import torch

    base = base_of(checkpoint)
    # Merge in fp32 and round once: sums in bf16 would lose a small adapter's change.
    model, tokenizer = models.load(checkpoint, dtype="float32" if base else dtype)
    if base:
        model = model.merge_and_unload()
        stored = getattr(config_of(base), "torch_dtype", None) or torch.float32
        model = model.to(stored if dtype == "auto" else getattr(torch, dtype))
    with hushed():  # importing DeepSpeed prints a log line
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
        models.copy_processor(folder, part)


def _write_adapter(checkpoint: Path, part: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    tensors = load_file(checkpoint / "adapter_model.safetensors")
    if dtype != "auto":
        tensors = {name: w.to(getattr(torch, dtype)) for name, w in tensors.items()}
    save_file(tensors, part / "adapter_model.safetensors", {"format": "pt"})
    for name in (ADAPTER, BASE):
        if (checkpoint / name).is_file():  # older checkpoints do not record their base
            shutil.copy(checkpoint / name, part / name)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(part)
