"""A run's checkpoints: written once, with a manifest; listed, verified, picked and pruned.

Ray's layout: ``TorchTrainer_<id>/checkpoint_<number>/checkpoint/`` holds the Hugging Face
checkpoint with DeepSpeed's shards. ``manifest.json`` beside it names every file with its size and
sha256 and is written last: without it a checkpoint was never finished.
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..run import Run, write_json
from ..setup.assets import sha256

MANIFEST = "manifest.json"
_CHUNK = 2**20  # bytes read at once while a file is copied
_KINDS = (
    ("_optim_states.pt", "a rank's ZeRO shard: fp32 weights and the optimizer's two moments"),
    ("_model_states.pt", "a rank's engine state: counters, scheduler, shapes"),
    (".safetensors", "the model's weights, gathered, as transformers loads them"),
    ("rng_state", "a rank's random state"),
    ("trainer_state.json", "the trainer's step and log"),
    ("training_args.bin", "the trainer's arguments"),
    ("scheduler.pt", "the learning-rate schedule"),
    ("preprocessor_config.json", "how images become tensors"),
    ("processor", "the processor of a multimodal model"),
    ("tokenizer", "the tokenizer"),
    ("base_model.json", "which weights an adapter was trained on"),
    ("config.json", "the model's or its generation's configuration"),
    ("zero_to_fp32.py", "DeepSpeed's script that gathers fp32 weights from the shards"),
    ("latest", "the name of the folder of shards"),
)


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint as Ray keeps it.

    Attributes:
        step: The optimizer step it was written after; 0 where nothing in it says.
        path: ``TorchTrainer_*/checkpoint_<number>``; the Hugging Face checkpoint is inside.
        bytes: Size of all its files, the manifest apart.
        losses: Held-out losses measured at that step, by dataset.
        world_size: Ranks that wrote it.
        broken: Why it cannot be used; empty where it is whole.
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
        """What a worker has to know to take it up, in plain values."""
        return {"path": str(self.path), "step": self.step, "world_size": self.world_size}

    def files(self) -> list[dict[str, Any]]:
        """Its files, largest first: name, size, and what each is."""
        files = [p for p in self.model.rglob("*") if p.is_file()]
        return [
            {
                "file": str(p.relative_to(self.model)),
                "MB": round(p.stat().st_size / 1e6, 2),
                "what": next((what for mark, what in _KINDS if mark in p.name), ""),
            }
            for p in sorted(files, key=lambda p: -p.stat().st_size)
        ]


def listing(run: Run, *, deep: bool = True) -> list[Checkpoint]:
    """Every checkpoint of a run, whole or broken, in the order of their steps.

    Args:
        run: Whose.
        deep: Compare each file's sha256 as well, not only its size. Files are streamed, not loaded.
    """
    paths = sorted(run.folder.glob("TorchTrainer_*/checkpoint_*"), key=_age)
    return sorted((_read(path, deep=deep) for path in paths), key=lambda c: c.step)


def latest(run: Run, say: Callable[[str], Any] = print) -> Checkpoint | None:
    """The newest whole checkpoint, every byte of it compared with its manifest.

    Args:
        run: Whose.
        say: Is told which newer ones were passed over, and why.

    Returns:
        ``None`` where no checkpoint was ever finished.

    Raises:
        CheckpointError: Some were finished, and none of them is whole any more.
    """
    found = listing(run, deep=False)
    passed: list[Checkpoint] = []
    for checkpoint in reversed(found):
        checked = _read(checkpoint.path, deep=True) if checkpoint.whole else checkpoint
        if checked.whole:
            for other in reversed(passed):
                say(f"passed over {_name(run, other)}, step {other.step or '?'}: {other.broken}")
            return checked
        passed.append(checked)
    finished = any(event["event"] == "save" for event in run.events())
    if passed and (finished or any((c.path / MANIFEST).is_file() for c in passed)):
        raise CheckpointError(
            f"none of the checkpoints of the run '{run.name}' is whole",
            where="\n".join(f"{_name(run, c)}: {c.broken}" for c in reversed(passed)),
            expected="one whose files are what its manifest says",
            do="bring the files back from a copy, or train anew under another RUN_NAME; "
            "nothing was deleted",
        )
    for other in reversed(passed):
        say(f"passed over {_name(run, other)}: {other.broken}")
    return None


def pick(run: Run, which: str, held_out: str | None) -> Checkpoint:
    """The last whole checkpoint, or the best by held-out loss.

    Args:
        run: Whose.
        which: ``"last"`` or ``"best"``.
        held_out: The dataset whose loss decides.

    Raises:
        CheckpointError: There is none.
    """
    if which not in ("last", "best"):
        raise CheckpointError(f"checkpoint {which!r}", expected="'last' or 'best'")
    found = [c for c in listing(run, deep=False) if c.whole]
    measured = [c for c in found if held_out in c.losses]
    if which == "best" and measured:
        found = [min(measured, key=lambda c: c.losses[held_out])]
    if not found:
        raise CheckpointError(
            f"the run '{run.name}' has no whole checkpoint",
            where=run.folder / "TorchTrainer_*",
            do="run notebook 04_train for it",
        )
    picked = _read(found[-1].path, deep=True)
    if picked.broken:
        raise CheckpointError(
            f"the {which} checkpoint is broken: {picked.broken}",
            where=picked.path,
            expected="files that are what its manifest says",
            do="bring the file back, or take the other of 'last' and 'best'",
        )
    return picked


def ranks_with_shards(checkpoint: Checkpoint) -> list[int]:
    """The ranks whose ZeRO shard is in a checkpoint."""
    names = (p.name for p in checkpoint.model.rglob("*_optim_states.pt"))
    return sorted({_owner(name) for name in names})


def move_own(written: Path, target: Path, rank: int) -> dict[str, dict[str, Any]]:
    """Moves one rank's files of a checkpoint to the storage, each of them once.

    A rank's own are its ZeRO shards and its random state; all the rest is rank 0's. On the same
    file system nothing is copied; from a node's own disk it is, and the source goes afterwards.

    Args:
        written: ``output/checkpoint-<step>``, as the trainer wrote it; shared or the node's own.
        target: ``…/checkpoint_<number>/checkpoint`` on the storage.
        rank: The global rank.

    Returns:
        Each file's ``bytes`` and ``sha256`` by its path inside the checkpoint's folder.
    """
    own = [p for p in written.rglob("*") if p.is_file() and _owner(p.name) == rank]
    names = [path.relative_to(written) for path in own]

    def move(source: Path, name: Path) -> dict[str, Any]:
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            source.replace(place)
            digest = sha256(place)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            digest = _copied(source, place)
            source.unlink()
        return {"bytes": place.stat().st_size, "sha256": digest}

    with ThreadPoolExecutor(4) as pool:  # hashing leaves Python's lock free
        files = list(pool.map(move, own, names))
    return {f"{target.name}/{name}": file for name, file in zip(names, files, strict=True)}


def write_manifest(
    path: Path,
    step: int,
    world_size: int,
    files: dict[str, dict[str, Any]],
    losses: dict[str, float],
) -> int:
    """Declares a checkpoint finished.

    Returns:
        Bytes of its files.
    """
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
    """Removes all but the last checkpoints and the best, and what crashes left half-written.

    Must not run while a checkpoint is being written.

    Args:
        run: Whose.
        keep: How many of the last; ``None`` keeps all.
        held_out: The best has the lowest loss on this dataset.
        newest: The checkpoint just written. Those of later steps are of a time before the run went
            back, passed over for what was wrong with them: they neither count nor stay.

    Returns:
        The steps whose checkpoints went.
    """
    found = listing(run, deep=False)
    finished = [c for c in found if (c.path / MANIFEST).is_file()]
    unfinished = [c for c in found if c not in finished]
    gone = []
    if finished:
        for checkpoint in unfinished:
            remove(checkpoint.path)
    if keep:
        last = next((c.step for c in finished if c.path == newest), None)
        counted = [c for c in finished if last is None or c.step <= last]
        counted.sort(key=lambda c: (c.step, c.path == newest))
        measured = [c for c in counted if c.whole and held_out in c.losses]
        best = min(measured, key=lambda c: c.losses[held_out], default=None)
        for checkpoint in finished:
            if checkpoint not in counted[-keep:] and checkpoint != best:
                remove(checkpoint.path)
                gone.append(checkpoint.step)
    return gone


def unfinished_bytes(run: Run) -> int:
    """What crashes left half-written: room that a restart makes free."""
    left = [c.path for c in listing(run, deep=False) if not (c.path / MANIFEST).is_file()]
    left += run.output.glob("checkpoint-*")
    return sum(f.stat().st_size for p in left for f in p.rglob("*") if f.is_file())


def remove(path: Path) -> None:
    """Removes a checkpoint, its manifest first: cut short, it counts as unfinished."""
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def clear(path: Path) -> None:
    """Makes room for a checkpoint where a crash left one that was never finished.

    Raises:
        CheckpointError: A finished one is there.
    """
    if (path / MANIFEST).exists():
        raise CheckpointError(
            "a checkpoint would be written over a finished one",
            where=path,
            do="report this: Ray counts its checkpoints otherwise than it used to",
        )
    shutil.rmtree(path, ignore_errors=True)


def _read(path: Path, *, deep: bool) -> Checkpoint:
    try:
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
        files, step = manifest["files"], int(manifest["step"])
        losses, world_size = manifest["losses"], int(manifest["world_size"])
    except FileNotFoundError:
        reason = "it has no manifest: it was never finished, or that file was removed"
        return _unreadable(path, reason)
    except (ValueError, KeyError, TypeError, UnicodeDecodeError, OSError) as error:
        return _unreadable(path, f"its manifest cannot be read: {error}")
    size = sum(file["bytes"] for file in files.values())
    return Checkpoint(step, path, size, losses, world_size, _fault(path, files, deep=deep))


def _fault(path: Path, files: dict[str, dict[str, Any]], *, deep: bool) -> str:
    """What is wrong with a checkpoint's files: missing ones first, then sizes, then contents."""
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
            return f"{name} is not what was written: its sha256 differs"
    return ""


def _unreadable(path: Path, reason: str) -> Checkpoint:
    step = 0
    with contextlib.suppress(OSError, ValueError, KeyError):
        state = (path / "checkpoint" / "trainer_state.json").read_text("utf-8")
        step = int(json.loads(state)["global_step"])
    if not step:
        for shards in path.glob("checkpoint/global_step*"):
            step = int(re.sub(r"\D", "", shards.name) or 0)
    size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file() and p.name != MANIFEST)
    return Checkpoint(step, path, size, {}, 0, reason)


def _owner(name: str) -> int:
    """The rank that hands a file over: its number where the name has one, else rank 0."""
    named = re.match(r"rng_state_(\d+)\.pth$", name) or re.search(r"pp_rank_(\d+)_", name)
    return int(named[1]) if named else 0


def _copied(source: Path, place: Path) -> str:
    """Copies a file to another file system, to the disk itself; its sha256, read once for both."""
    digest = hashlib.sha256()
    with source.open("rb", buffering=0) as read, place.open("wb") as written:
        while chunk := read.read(_CHUNK):
            digest.update(chunk)
            written.write(chunk)
        written.flush()
        os.fsync(written.fileno())
    return digest.hexdigest()


def _age(path: Path) -> tuple[str, str]:
    """Older attempts first: each has a folder of its own, named by its start, and counts from 0."""
    return path.parent.name[-19:], path.name


def _name(run: Run, checkpoint: Checkpoint) -> str:
    return str(checkpoint.path.relative_to(run.folder))
