"""A corpus on the storage: read, checked, cleaned, split by a stable hash, registered.

A corpus is documents; a document is one text. What training sees is neither: see ``packing.py``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..errors import DataError
from ..run import write_json
from . import duplicates, ingest, sources
from .cleaning import Cleaning, Part, Tally
from .registry import REGISTRY, entries_of, locked, register
from .sources import Source

_FORM = 1  # of what is kept on the storage; another one is made anew


@dataclass(frozen=True)
class Corpus:
    """A corpus in its two halves, as it lies on the storage.

    Attributes:
        name: Its name in the registry; the held-out half is ``<name>_heldout``.
        source: Where its documents came from.
        folder: Holds ``train.jsonl``, ``heldout.jsonl``, ``rejects.jsonl`` and ``dropped.jsonl``.
        documents: Documents in the training half.
        heldout_documents: Documents in the held-out half.
        characters: Characters in both.
        records: Records read: documents, and what was in place of some.
        rejected: Records that were no documents, by reason.
        dropped: Documents that were dropped, by reason.
        examples: The first of each reason: where, and what it says.
        fraction: The share of documents meant to be held out.
        sha256: Digest of all documents kept.
        key: Digest of what was read and by which settings; empty where the source tells no marks.
    """

    name: str
    source: str
    folder: Path
    documents: int
    heldout_documents: int
    characters: int
    records: int
    rejected: dict[str, int]
    dropped: dict[str, int]
    examples: dict[str, list[list[str]]] = field(repr=False)
    fraction: float
    sha256: str
    key: str

    def as_dict(self) -> dict[str, object]:
        """What to keep of it in a run's results."""
        kept = ("source", "documents", "heldout_documents", "records", "rejected", "dropped")
        return {"corpus": self.name, **{key: getattr(self, key) for key in (*kept, "sha256")}}

    @property
    def train(self) -> Path:
        return self.folder / "train.jsonl"

    @property
    def heldout(self) -> Path:
        return self.folder / "heldout.jsonl"

    def half(self, *, held_out: bool) -> Path:
        return self.heldout if held_out else self.train


def prepare(
    corpus: str,
    storage: Path,
    *,
    column: str = "text",
    max_samples: int | None = None,
    fraction: float | None = None,
    tolerate: float = 0.0,
    cleaning: Cleaning | None = None,
) -> Corpus:
    """Reads a corpus, drops what is no good, holds documents out, registers both halves.

    Once per content and settings. Memory does not grow with the corpus but by some 20 bytes a
    document; large ones are read by all cores, or by a Ray cluster where one is initialised.

    Args:
        corpus: Anything :func:`sources.find` knows.
        storage: Where it is kept, in ``corpora/<name>``.
        column: The field that holds the text.
        max_samples: Records at most, of all shards together.
        fraction: Share of documents to hold out; default 0.5 % to 10 % by corpus, 5 % for your own.
        tolerate: Share of records that may be no documents; they are then kept beside the corpus
            in ``rejects.jsonl``. By default none may.
        cleaning: What is dropped; default duplicates, near duplicates and contamination.

    Raises:
        DataError: The corpus cannot be read, has too many bad records, is empty, or its name is
            taken. What had been read of other shards is kept for the next time.
    """
    cleaning = cleaning or Cleaning()
    source = sources.find(corpus, column, max_samples)
    fraction = source.fraction if fraction is None else fraction
    if not 0 < fraction < 1:
        raise DataError(f"held-out fraction {fraction}", expected="a number between 0 and 1")
    if not 0 <= tolerate < 1:
        raise DataError(f"tolerated rate {tolerate}", expected="a number from 0 to below 1")
    if max_samples is not None and max_samples < 1:
        raise DataError(f"max_samples {max_samples}", expected="a whole number, 1 or more")
    column = source.column or column
    settings = json.dumps([_FORM, column, fraction, asdict(cleaning)])
    mark = sources.mark_of(source)
    every = f"{settings}\n{tolerate}\n{max_samples}\n{mark}"
    key = hashlib.sha256(every.encode()).hexdigest() if mark else ""
    folder = storage / "corpora" / source.name
    if key and folder.exists() and (there := load(source.name, storage)).key == key:
        register(storage / REGISTRY, entries_of(source.name))
        return there
    work = storage / "corpora" / f".{source.name}.work"
    with _alone(work):
        if key and folder.exists() and (there := load(source.name, storage)).key == key:
            return there  # another process has just made it
        how = (column, cleaning, fraction)
        found = _make(source, work, folder, how, tolerate, max_samples, settings, key)
    register(storage / REGISTRY, entries_of(source.name))
    return found


def load(name: str, storage: Path) -> Corpus:
    """A corpus that has been prepared.

    Raises:
        DataError: It has not.
    """
    path = storage / "corpora" / name / "corpus.json"
    try:
        return Corpus(**json.loads(path.read_text("utf-8")) | {"folder": path.parent})
    except (OSError, TypeError, ValueError):
        raise DataError(
            f"the corpus '{name}' is not on the storage",
            where=path,
            do="run notebook 02_data with it; a folder of an older release may be moved away",
        ) from None


def texts_of(path: Path) -> Iterator[str]:
    """The documents of a half that :func:`prepare` wrote."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document is held out: by a hash of its text alone.

    A document so stays on its side when the corpus grows, is shuffled, or is read elsewhere.
    """
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _make(
    source: Source,
    work: Path,
    folder: Path,
    how: tuple[str, Cleaning, float],
    tolerate: float,
    max_samples: int | None,
    settings: str,
    key: str,
) -> Corpus:
    """Reads every shard into parts, finds duplicates among them, and writes the two halves."""
    parts: list[Part] = []
    rejects, empty = Tally(), Tally()
    left = max_samples
    for shard in source.shards:
        what = f"{settings}\n{left}\n{shard.name}\n{shard.mark}"
        place = work / hashlib.sha256(what.encode("utf-8", "surrogateescape")).hexdigest()
        done = ingest.done(place) if shard.mark else None
        if done is None:
            done = ingest.read(shard, place, how, strict=not tolerate, most=left)
            write_json(place / "done.json", [asdict(part) for part in done])
        for part in done:
            rejects.merge(part.rejects)
        parts += done
        if not sum(part.records for part in done) and len(source.shards) > 1:
            empty.add("an empty file", shard.name, "")
        if left is not None and (left := left - sum(part.records for part in done)) <= 0:
            break
    records = sum(part.records for part in parts)
    if not records:
        raise DataError(
            "the corpus is empty",
            where=source.given,
            expected='documents, such as {"text": "…"} lines',
        )
    if rejects.total > tolerate * records:
        raise _too_many(source, rejects, records, tolerate)
    rejects.merge(empty)
    dropped = duplicates.find(parts, how[1])
    return _write(source, folder, parts, dropped, rejects, records, how[2], key, work)


def _write(
    source: Source,
    folder: Path,
    parts: list[Part],
    copies: dict[int, tuple[str, int]],
    rejects: Tally,
    records: int,
    fraction: float,
    key: str,
    work: Path,
) -> Corpus:
    """Streams the parts into the two halves, in one piece: all of the folder or none of it."""
    dropped, counts, characters = Tally(), [0, 0], 0
    digest = hashlib.sha256()
    new = Path(tempfile.mkdtemp(dir=work, prefix="new."))
    names = {"train": "train.jsonl", "heldout": "heldout.jsonl", "dropped": "dropped.jsonl"}
    with contextlib.ExitStack() as stack:
        out = {
            kind: stack.enter_context((new / name).open("w", encoding="utf-8"))
            for kind, name in names.items()
        }
        number = 0
        for part in parts:
            dropped.merge(part.filtered)
            out["dropped"].write(Path(f"{part.path}.dropped").read_text("utf-8"))
            for document in _documents(part):
                text = document["text"]
                if number in copies:
                    reason, like = copies[number]
                    dropped.add(reason, document["where"], text)
                    entry = document | {"reason": reason, "like": like}
                    out["dropped"].write(json.dumps(entry, ensure_ascii=False) + "\n")
                else:
                    held_out = is_held_out(text, fraction)
                    counts[held_out] += 1
                    characters += len(text)
                    digest.update(text.encode("utf-8") + b"\0")
                    line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
                    out["heldout" if held_out else "train"].write(line)
                number += 1
    with (new / "rejects.jsonl").open("wb") as file:
        for part in parts:
            with Path(f"{part.path}.rejects").open("rb") as rejected:
                shutil.copyfileobj(rejected, file)
    found = Corpus(
        name=source.name,
        source=source.given,
        folder=folder,
        documents=counts[False],
        heldout_documents=counts[True],
        characters=characters,
        records=records,
        rejected=dict(rejects.counts),
        dropped=dict(dropped.counts),
        examples={
            reason: [list(example) for example in examples]
            for reason, examples in (rejects.examples | dropped.examples).items()
        },
        fraction=fraction,
        sha256=digest.hexdigest(),
        key=key,
    )
    if not all(counts):
        shutil.rmtree(new, ignore_errors=True)
        raise DataError(
            f"'{source.given}' has {sum(counts)} documents: too few to hold out {fraction:.0%}",
            expected="at least one document to train on and one to measure with",
            do="give more documents, or hold out a larger fraction",
        )
    write_json(new / "corpus.json", asdict(found) | {"folder": ""})
    return _put(found, new, work)


def _documents(part: Part) -> Iterator[dict[str, str]]:
    with Path(part.path).open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _put(corpus: Corpus, new: Path, work: Path) -> Corpus:
    """Puts a corpus in its place; leaves an equal one alone and refuses another."""
    if not corpus.folder.exists():
        new.chmod(0o755)
        new.rename(corpus.folder)
        shutil.rmtree(work, ignore_errors=True)
        return corpus
    there = load(corpus.name, corpus.folder.parent.parent)
    if (there.sha256, there.fraction) == (corpus.sha256, corpus.fraction):
        for name in ("rejects.jsonl", "dropped.jsonl", "corpus.json"):  # the same documents
            (new / name).replace(corpus.folder / name)
        shutil.rmtree(work, ignore_errors=True)
        return corpus
    shutil.rmtree(new, ignore_errors=True)
    raise DataError(
        f"the corpus name '{corpus.name}' is taken by other documents",
        where=f"{corpus.folder}: {there.documents + there.heldout_documents} documents from "
        f"{there.source}, {there.fraction:.1%} held out, sha256 {there.sha256[:12]}",
        expected=f"{corpus.documents + corpus.heldout_documents} documents, "
        f"{corpus.fraction:.1%} held out, sha256 {corpus.sha256[:12]}",
        do="rename the source, or move that folder away if no run needs it; nothing was changed",
    )


def _too_many(source: Source, rejects: Tally, records: int, tolerate: float) -> DataError:
    counts = [
        f"{count:,} × {reason}"
        for reason, count in sorted(rejects.counts.items(), key=lambda item: -item[1])[:8]
    ]
    examples = [
        f"{where}: {problem}"
        for reason in rejects.counts
        for where, problem in rejects.examples[reason][:2]
    ]
    return DataError(
        f"{rejects.total:,} of {records:,} records are no documents, more than the "
        f"{tolerate:.1%} that are tolerated",
        where="\n".join([*counts, *examples[:5], f"in {source.given}"]),
        expected=f"at most {int(tolerate * records):,}",
        do="fix them, or raise TOLERATE; nothing was written",
    )


@contextlib.contextmanager
def _alone(work: Path) -> Iterator[None]:
    """One process at a time makes a corpus; another waits and finds it made."""
    work.parent.mkdir(parents=True, exist_ok=True)
    with locked(work.with_name(f"{work.name}.lock")):
        work.mkdir(exist_ok=True)
        yield
    with contextlib.suppress(OSError):
        work.rmdir()
