"""A run's checkpoints and their manifests: written, listed, verified, picked and pruned.

Ray's layout: ``TorchTrainer_<id>/checkpoint_<number>/checkpoint/`` holds the Hugging Face
checkpoint with DeepSpeed's shards. ``manifest.json`` next to it lists the size and sha256 of every
file. It is written last: a checkpoint without it was never finished.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..run import Run, write_json
from ..setup.assets import sha256

MANIFEST = "manifest.json"
_CHUNK = 2**20  # bytes read at once while a file is copied


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint in Ray's layout.

    Attributes:
        step: The optimizer step it was written after; 0 if unknown.
        path: ``TorchTrainer_*/checkpoint_<number>``; the Hugging Face checkpoint is inside.
        bytes: Size of all its files except the manifest.
        losses: Held-out losses at that step, by dataset.
        world_size: Number of ranks that wrote it.
        broken: Why it cannot be used; empty if it is whole.
    """

    step: int
    path: Path
    bytes: int
    losses: dict[str, float]
    world_size: int
    broken: str = ""

    @property
    def whole(self) -> bool:
        return not self.broken

    @property
    def model(self) -> Path:
        """The Hugging Face checkpoint: weights, tokenizer, trainer state, ZeRO shards."""
        return self.path / "checkpoint"

    def handle(self) -> dict[str, Any]:
        """A worker's information about the checkpoint that it resumes from, in plain values."""
        return {"path": str(self.path), "step": self.step, "world_size": self.world_size}


def listing(run: Run, *, deep: bool = True) -> list[Checkpoint]:
    """Every checkpoint of a run, whole or broken, in the order of their steps.

    Args:
        run: The run.
        deep: Also compare each file's sha256, not only its size. Files are streamed.
    """
    paths = sorted(run.folder.glob("TorchTrainer_*/checkpoint_*"), key=_age)
    return sorted((_read(path, deep=deep) for path in paths), key=lambda c: c.step)


def latest(run: Run, say: Callable[[str], Any] = print) -> Checkpoint | None:
    """The newest whole checkpoint. Every byte of it is compared with its manifest.

    Args:
        run: The run.
        say: Called with a message for each newer checkpoint that is skipped, with the reason.

    Returns:
        ``None`` if no checkpoint was ever finished.

    Raises:
        CheckpointError: Some were finished, and none of them is whole any more.
    """
    skipped: list[Checkpoint] = []
    whole = None
    for checkpoint in reversed(listing(run, deep=False)):
        checked = _read(checkpoint.path, deep=True) if checkpoint.whole else checkpoint
        if checked.whole:
            whole = checked
            break
        skipped.insert(0, checked)
    reasons = [
        f"{c.path.relative_to(run.folder)}, step {c.step or '?'}: {c.broken}" for c in skipped
    ]
    saved = any(event["event"] == "save" for event in run.events())
    if skipped and not whole and (saved or any((c.path / MANIFEST).is_file() for c in skipped)):
        raise CheckpointError(
            f"none of the checkpoints of the run '{run.name}' is whole",
            where="\n".join(reasons),
            expected="one whose files match its manifest",
            do="restore the files from a copy, or train again under another RUN_NAME; "
            "nothing was deleted",
        )
    for reason in reasons:
        say(f"skipped {reason}")
    return whole


def pick(run: Run, which: str, held_out: str | None) -> Checkpoint:
    """The last whole checkpoint, or the best by held-out loss.

    Args:
        run: The run.
        which: ``"last"`` or ``"best"``.
        held_out: The dataset whose loss decides.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    if which not in ("last", "best"):
        raise CheckpointError(f"checkpoint {which!r}", expected="'last' or 'best'")
    candidates = [c for c in listing(run, deep=False) if c.whole]
    if not candidates:
        raise CheckpointError(
            f"the run '{run.name}' has no whole checkpoint",
            where=run.folder / "TorchTrainer_*",
            do="run notebook 04_train for it",
        )
    chosen = candidates[-1]
    if which == "best":
        chosen = _best(candidates, held_out) or chosen
    picked = _read(chosen.path, deep=True)
    if picked.broken:
        raise CheckpointError(
            f"the {which} checkpoint is broken: {picked.broken}",
            where=picked.path,
            expected="files that match its manifest",
            do="restore the file from a copy, or take the other of 'last' and 'best'",
        )
    return picked


def _best(checkpoints: Iterable[Checkpoint], held_out: str | None) -> Checkpoint | None:
    """The first whole checkpoint with the lowest loss on a dataset."""
    measured = [c for c in checkpoints if c.whole and held_out in c.losses]
    return min(measured, key=lambda c: c.losses[held_out or ""], default=None)


def move_own(written: Path, target: Path, rank: int) -> dict[str, dict[str, Any]]:
    """Moves one rank's files of a checkpoint to the storage.

    A rank moves its ZeRO shards and its random state; rank 0 moves all other files. Files on
    another file system, such as a node's own disk, are copied and then removed.

    Args:
        written: ``output/checkpoint-<step>``, as the trainer wrote it; shared or on the node.
        target: ``…/checkpoint_<number>/checkpoint`` on the storage.
        rank: The global rank.

    Returns:
        Each file's ``bytes`` and ``sha256`` by its path inside the checkpoint's folder.
    """
    sources = [p for p in written.rglob("*") if p.is_file() and owner(p.name) == rank]

    def move(source: Path) -> dict[str, Any]:
        path = target / source.relative_to(written)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            source.replace(path)
            digest = sha256(path)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            digest = _copy(source, path)
            source.unlink()
        return {"bytes": path.stat().st_size, "sha256": digest}

    names = [f"{target.name}/{path.relative_to(written)}" for path in sources]
    with ThreadPoolExecutor(4) as pool:  # hashing releases Python's lock
        return dict(zip(names, pool.map(move, sources), strict=True))


def write_manifest(
    path: Path,
    step: int,
    world_size: int,
    files: dict[str, dict[str, Any]],
    losses: dict[str, float],
) -> int:
    """Marks a checkpoint as finished; returns the bytes of its files."""
    import importlib.metadata

    from ..setup.machine import CORE_PACKAGES

    manifest = {
        "step": step,
        "world_size": world_size,
        "losses": losses,
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {name: importlib.metadata.version(name) for name in CORE_PACKAGES},
        "files": dict(sorted(files.items())),
    }
    write_json(path / MANIFEST, manifest)
    return sum(file["bytes"] for file in files.values())


def prune(
    run: Run, keep: int | None, held_out: str | None, newest: Path | None = None
) -> list[int]:
    """Removes all but the last checkpoints and the best, and unfinished ones of crashes.

    Must not run while a checkpoint is being written.

    Args:
        run: The run.
        keep: How many of the last to keep; ``None`` keeps all.
        held_out: The best has the lowest loss on this dataset.
        newest: The checkpoint just written. Those of later steps were skipped as damaged when the
            run resumed: they do not count and are removed.

    Returns:
        The steps of the removed checkpoints.
    """
    checkpoints = listing(run, deep=False)
    finished = [c for c in checkpoints if (c.path / MANIFEST).is_file()]
    if finished:
        for checkpoint in checkpoints:
            if checkpoint not in finished:
                remove(checkpoint.path)
    if not keep:
        return []
    last = next((c.step for c in finished if c.path == newest), None)
    counted = [c for c in finished if last is None or c.step <= last]
    counted.sort(key=lambda c: (c.step, c.path == newest))
    kept = [*counted[-keep:], _best(counted, held_out)]
    removed = [c for c in finished if c not in kept]
    for checkpoint in removed:
        remove(checkpoint.path)
    return [c.step for c in removed]


def unfinished_bytes(run: Run) -> int:
    """Bytes of unfinished checkpoints of crashes, which a restart removes."""
    paths = [c.path for c in listing(run, deep=False) if not (c.path / MANIFEST).is_file()]
    paths += run.output.glob("checkpoint-*")
    return sum(f.stat().st_size for p in paths for f in p.rglob("*") if f.is_file())


def remove(path: Path) -> None:
    """Removes a checkpoint, its manifest first: if interrupted, it counts as unfinished."""
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def clear(path: Path) -> None:
    """Removes an unfinished checkpoint of a crash, where the next one will be written.

    Raises:
        CheckpointError: A finished checkpoint has this path.
    """
    if (path / MANIFEST).exists():
        raise CheckpointError(
            "a checkpoint would be written over a finished one",
            where=path,
            do="report this as an error: Ray numbers its checkpoints in another way than expected",
        )
    shutil.rmtree(path, ignore_errors=True)


def _read(path: Path, *, deep: bool) -> Checkpoint:
    try:
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
        files, step = manifest["files"], int(manifest["step"])
        losses, world_size = manifest["losses"], int(manifest["world_size"])
    except FileNotFoundError:
        reason = "it has no manifest: it was never finished, or the file was removed"
        return _without_manifest(path, reason)
    except (ValueError, KeyError, TypeError, UnicodeDecodeError, OSError) as error:
        return _without_manifest(path, f"its manifest cannot be read: {error}")
    size = sum(file["bytes"] for file in files.values())
    return Checkpoint(step, path, size, losses, world_size, _damage(path, files, deep=deep))


def _damage(path: Path, files: dict[str, dict[str, Any]], *, deep: bool) -> str:
    """The damage of a checkpoint's files: missing ones first, then sizes, then contents."""
    for name, file in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        size = (path / name).stat().st_size
        if size != file["bytes"]:
            return f"{name} has {size:,} bytes, not the {file['bytes']:,} that were written"
    for name, file in files.items() if deep else ():
        try:
            same = sha256(path / name) == file["sha256"]
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if not same:
            return f"{name} was changed: its sha256 differs"
    return ""


def _without_manifest(path: Path, reason: str) -> Checkpoint:
    step = 0
    with contextlib.suppress(OSError, ValueError, KeyError):
        state = (path / "checkpoint" / "trainer_state.json").read_text("utf-8")
        step = int(json.loads(state)["global_step"])
    if not step:
        for shards in path.glob("checkpoint/global_step*"):
            step = int(re.sub(r"\D", "", shards.name) or 0)
    size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file() and p.name != MANIFEST)
    return Checkpoint(step, path, size, {}, 0, reason)


def owner(name: str) -> int:
    """The rank that moves a file: the number in its name, else rank 0."""
    match = re.match(r"rng_state_(\d+)\.pth$", name) or re.search(r"pp_rank_(\d+)_", name)
    return int(match[1]) if match else 0


def _copy(source: Path, target: Path) -> str:
    """Copies a file to another file system and flushes it; returns its sha256."""
    digest = hashlib.sha256()
    with source.open("rb", buffering=0) as read, target.open("wb") as written:
        while chunk := read.read(_CHUNK):
            digest.update(chunk)
            written.write(chunk)
        written.flush()
        os.fsync(written.fileno())
    return digest.hexdigest()


def _age(path: Path) -> tuple[str, str]:
    """Sorts older attempts first: each has a folder named by its start, and counts from 0."""
    return path.parent.name[-19:], path.name
