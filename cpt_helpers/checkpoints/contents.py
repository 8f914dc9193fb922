"""Checkpoints as tables: their state, their files, their ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .. import display
from .manifests import Checkpoint, owner

if TYPE_CHECKING:
    from pandas import DataFrame

_CONTENTS = {  # of a file, by a part of its name
    "_optim_states.pt": "a rank's ZeRO shard: fp32 weights and the optimizer's two moments",
    "_model_states.pt": "a rank's engine state: counters, scheduler, shapes",
    ".safetensors": "the model's weights, gathered, as transformers loads them",
    "rng_state": "a rank's random state",
    "trainer_state.json": "the trainer's step and log",
    "training_args.bin": "the trainer's arguments",
    "scheduler.pt": "the learning-rate schedule",
    "preprocessor_config.json": "how images become tensors",
    "processor": "the processor of a multimodal model",
    "tokenizer": "the tokenizer",
    "base_model.json": "the weights that an adapter was trained on",
    "config.json": "the configuration of the model or of its text generation",
    "zero_to_fp32.py": "DeepSpeed's script that gathers fp32 weights from the shards",
    "latest": "the name of the folder of shards",
}


@dataclass(frozen=True)
class Sizes:
    """The size of a checkpoint, shown as a table.

    Attributes:
        bytes: Size of its files.
        bytes_per_trained_parameter: The same per trained parameter.
        storage_ratio: Bytes of its folder on the storage, divided by ``bytes``.
        ranks_with_shards: The ranks whose ZeRO shard is in it.
    """

    bytes: int
    bytes_per_trained_parameter: float
    storage_ratio: float
    ranks_with_shards: list[int]

    def _repr_html_(self) -> str:
        rows = [
            ("files, MB", f"{self.bytes / 1e6:,.1f}"),
            ("bytes per trained parameter", f"{self.bytes_per_trained_parameter:.1f}"),
            ("size on the storage, in multiples of the files", f"{self.storage_ratio:.3f}"),
            ("ranks with a shard", ", ".join(map(str, self.ranks_with_shards))),
        ]
        return display.table(rows)._repr_html_()  # type: ignore[operator]  # missing in the stubs


def table(checkpoints: Iterable[Checkpoint], held_out: Iterable[str] = ()) -> DataFrame:
    """Checkpoints with their state and held-out losses, a row each.

    Args:
        checkpoints: As :func:`cpt_helpers.checkpoints.listing` returns them.
        held_out: The datasets whose losses are shown.
    """
    return display.table(
        {
            "step": c.step,
            "folder": "/".join(c.path.parts[-2:]),
            "MB": round(c.bytes / 1e6, 1),
            "ranks": c.world_size,
            "state": c.broken or "whole",
        }
        | {f"loss, {name}": _loss(c, name) for name in held_out}
        for c in checkpoints
    )


def _loss(checkpoint: Checkpoint, held_out: str) -> str:
    loss = checkpoint.losses.get(held_out)
    return "not measured" if loss is None else f"{loss:.4f}"


def files(checkpoint: Checkpoint) -> DataFrame:
    """The files of a checkpoint, largest first: name, size and content."""
    sizes = {p: p.stat().st_size for p in checkpoint.model.rglob("*") if p.is_file()}
    return display.table(
        {
            "file": str(path.relative_to(checkpoint.model)),
            "MB": round(sizes[path] / 1e6, 2),
            "content": next((text for part, text in _CONTENTS.items() if part in path.name), ""),
        }
        for path in sorted(sizes, key=lambda path: -sizes[path])
    )


def ranks_with_shards(checkpoint: Checkpoint) -> list[int]:
    """The ranks whose ZeRO shard is in a checkpoint."""
    return sorted({owner(path.name) for path in checkpoint.model.rglob("*_optim_states.pt")})


def sizes(checkpoint: Checkpoint, trained_parameters: int) -> Sizes:
    """Measures a checkpoint; ``trained_parameters`` are in the training's summary."""
    stored = sum(path.stat().st_size for path in checkpoint.path.rglob("*") if path.is_file())
    return Sizes(
        checkpoint.bytes,
        round(checkpoint.bytes / trained_parameters, 2),
        round(stored / checkpoint.bytes, 4),
        ranks_with_shards(checkpoint),
    )
