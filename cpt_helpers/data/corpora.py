"""Corpora on the storage: read, cleaned, split into a training and a held-out half, registered.

A corpus is a set of documents; a document is one text. ``dataset_info.json`` is LLaMA-Factory's
registry of datasets: each half of a corpus is a dataset in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DataError
from ..recipes import HELD_OUT
from ..run import write_json
from . import duplicates, ingest, sources
from .cleaning import Cleaning, Part, Tally, is_held_out, write_line
from .ingest import Settings
from .sources import Source

if TYPE_CHECKING:
    from pandas import DataFrame

REGISTRY = "dataset_info.json"


@dataclass(frozen=True)
class Corpus:
    """A corpus in its two halves on the storage.

    Its folder holds ``train.jsonl``, ``heldout.jsonl``, ``rejects.jsonl`` and ``dropped.jsonl``.
    """

    name: str  # in the registry; the held-out half is ``<name>_heldout``
    source: str
    folder: Path
    documents: int  # in the training half
    heldout_documents: int
    characters: int  # in both halves
    records: int  # read, valid or not
    rejected: dict[str, int]  # invalid records by reason
    dropped: dict[str, int]  # documents by reason
    examples: dict[str, list[list[str]]] = field(repr=False)  # the first of each reason
    fraction: float  # of documents to hold out
    sha256: str  # of all documents kept
    key: str  # digest of the source's marks and the settings; empty without marks

    def as_dict(self) -> dict[str, object]:
        """What a run's results keep of it."""
        kept = ("source", "documents", "heldout_documents", "records", "rejected", "dropped")
        return {"corpus": self.name, **{key: getattr(self, key) for key in (*kept, "sha256")}}

    @property
    def train(self) -> Path:
        return self.folder / "train.jsonl"

    @property
    def heldout(self) -> Path:
        return self.folder / "heldout.jsonl"

    def sample(self, documents: int) -> list[str]:
        """Training documents, spread over the first 2,000 of the corpus."""
        first = list(itertools.islice(texts_of(self.train), 2000))
        return first[:: max(len(first) // documents, 1)][:documents]

    def halves(self) -> DataFrame:
        """Documents of each half, their share, and how many are in both halves."""
        import pandas as pd

        held_out = set(texts_of(self.heldout))
        in_both = sum(text in held_out for text in texts_of(self.train))
        counts = {"training": self.documents, "held out": self.heldout_documents}
        total = self.documents + self.heldout_documents
        return pd.DataFrame(
            {
                "documents": counts,
                "share": {half: f"{count / total:.1%}" for half, count in counts.items()},
                "share asked for": {
                    "training": f"{1 - self.fraction:.1%}",
                    "held out": f"{self.fraction:.1%}",
                },
                "in both halves": in_both,
            }
        )


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
    """Reads and cleans a corpus, holds documents out, and registers both halves.

    A corpus that is on the storage with the same content and settings is not read again. Memory
    grows by some 20 bytes per document. Large corpora are read on all cores, or on a Ray cluster
    where one is initialised.

    Args:
        corpus: Any source that :func:`sources.find` knows.
        storage: The corpus is kept in its folder ``corpora/<name>``.
        column: The field that holds the text.
        max_samples: The largest number of records, over all shards.
        fraction: Share of documents to hold out; the source has a default.
        tolerate: Share of records that may be invalid; they are kept in ``rejects.jsonl``.
        cleaning: Which documents are dropped.

    Raises:
        DataError: The corpus cannot be read, has too many invalid records, is empty, or its name is
            taken. What was read of other shards is kept for the next attempt.
    """
    source = sources.find(corpus, column, max_samples)
    settings = Settings(
        source.column or column,
        source.fraction if fraction is None else fraction,
        tolerate,
        max_samples,
        cleaning or Cleaning(),
    )
    work = storage / "corpora" / f".{source.name}.work"
    work.parent.mkdir(parents=True, exist_ok=True)
    with _locked(work.with_name(f"{work.name}.lock")):  # one process reads it, others wait
        prepared = _prepared(source, storage, settings) or _read(source, storage, work, settings)
    register(storage / REGISTRY, entries_of(source.name))
    return prepared


def _prepared(source: Source, storage: Path, settings: Settings) -> Corpus | None:
    """The corpus on the storage, if it has the same content and settings."""
    key = settings.key(source.mark)
    if not key or not (storage / "corpora" / source.name).exists():
        return None
    corpus = load(source.name, storage)
    return corpus if corpus.key == key else None


def _read(source: Source, storage: Path, work: Path, settings: Settings) -> Corpus:
    """Reads a source, drops duplicates, and moves the whole folder to its place."""
    work.mkdir(exist_ok=True)
    parts, rejects, records = ingest.read_source(source, work, settings)
    copies = duplicates.find(parts, settings.cleaning)
    new = Path(tempfile.mkdtemp(dir=work, prefix="new."))
    try:
        dropped, counts, characters, sha256 = _write_halves(new, parts, copies, settings.fraction)
        if not all(counts):
            raise DataError(
                f"'{source.given}' has {sum(counts)} documents: too few to hold out "
                f"{settings.fraction:.0%}",
                expected="at least one document to train on and one to measure with",
                do="give more documents, or hold out a larger fraction",
            )
        corpus = Corpus(
            name=source.name,
            source=source.given,
            folder=storage / "corpora" / source.name,
            documents=counts[False],
            heldout_documents=counts[True],
            characters=characters,
            records=records,
            rejected=rejects.counts,
            dropped=dropped.counts,
            examples={
                reason: [list(example) for example in examples]
                for reason, examples in (rejects.examples | dropped.examples).items()
            },
            fraction=settings.fraction,
            sha256=sha256,
            key=settings.key(source.mark),
        )
        write_json(new / "corpus.json", asdict(corpus) | {"folder": ""})
        _install(corpus, new)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(work, ignore_errors=True)
    return corpus


def _write_halves(
    new: Path, parts: list[Part], copies: dict[int, tuple[str, int]], fraction: float
) -> tuple[Tally, list[int], int, str]:
    """Streams the parts into the files of a corpus.

    Returns:
        The documents dropped; the documents of each half; their characters; their sha256.
    """
    dropped, counts, characters, digest = Tally(), [0, 0], 0, hashlib.sha256()
    numbers = itertools.count()  # documents are numbered through, as in ``copies``
    with (
        (new / "train.jsonl").open("w", encoding="utf-8") as train,
        (new / "heldout.jsonl").open("w", encoding="utf-8") as heldout,
        (new / "dropped.jsonl").open("w", encoding="utf-8") as dropped_file,
        (new / "rejects.jsonl").open("wb") as rejects,
    ):
        for part in parts:
            dropped.merge(part.filtered)
            dropped_file.write(Path(f"{part.path}.dropped").read_text("utf-8"))
            rejects.write(Path(f"{part.path}.rejects").read_bytes())
            for document, number in zip(_documents(part), numbers, strict=False):
                text = document["text"]
                if number in copies:
                    reason, like = copies[number]
                    dropped.add(reason, document["where"], text)
                    write_line(dropped_file, **document, reason=reason, like=like)
                    continue
                held_out = is_held_out(text, fraction)
                counts[held_out] += 1
                characters += len(text)
                digest.update(text.encode("utf-8") + b"\0")
                write_line(heldout if held_out else train, text=text)
    return dropped, counts, characters, digest.hexdigest()


def _documents(part: Part) -> Iterator[dict[str, str]]:
    with Path(part.path).open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _install(corpus: Corpus, new: Path) -> None:
    """Moves a new corpus to its place; an equal one keeps its halves, another one is an error."""
    if not corpus.folder.exists():
        new.chmod(0o755)
        new.rename(corpus.folder)
        return
    old = load(corpus.name, corpus.folder.parent.parent)
    if (old.sha256, old.fraction) != (corpus.sha256, corpus.fraction):
        raise DataError(
            f"the corpus name '{corpus.name}' is taken by other documents",
            where=f"{corpus.folder}: {old.documents + old.heldout_documents} documents from "
            f"{old.source}, {old.fraction:.1%} held out, sha256 {old.sha256[:12]}",
            expected=f"{corpus.documents + corpus.heldout_documents} documents, "
            f"{corpus.fraction:.1%} held out, sha256 {corpus.sha256[:12]}",
            do="rename the source, or move that folder away if no run needs it; "
            "nothing was changed",
        )
    for name in ("rejects.jsonl", "dropped.jsonl", "corpus.json"):
        (new / name).replace(corpus.folder / name)


def load(name: str, storage: Path) -> Corpus:
    """A corpus that is on the storage.

    Raises:
        DataError: It is not.
    """
    path = storage / "corpora" / name / "corpus.json"
    try:
        return Corpus(**json.loads(path.read_text("utf-8")) | {"folder": path.parent})
    except (OSError, TypeError, ValueError):
        raise DataError(
            f"the corpus '{name}' is not on the storage",
            where=path,
            do="run notebook 02_data with it; you can move away a folder of an older release",
        ) from None


def texts_of(path: Path) -> Iterator[str]:
    """The documents of a half."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def entries_of(name: str) -> dict[str, dict]:
    """The two datasets of a corpus, as the registry names them."""
    return {
        dataset: {"file_name": f"corpora/{name}/{half}.jsonl", "columns": {"prompt": "text"}}
        for dataset, half in ((name, "train"), (name + HELD_OUT, "heldout"))
    }


def register(registry: Path, entries: dict[str, dict]) -> None:
    """Adds datasets to a ``dataset_info.json`` and keeps the others; safe for several processes.

    Raises:
        DataError: The registry is not JSON, or a name stands for another dataset in it.
    """
    registry.parent.mkdir(parents=True, exist_ok=True)
    with _locked(registry.with_name(f".{registry.name}.lock")):
        known = read_registry(registry) if registry.exists() else {}
        for name, entry in entries.items():
            if known.get(name, entry) != entry:
                raise DataError(
                    f"the dataset name '{name}' is taken",
                    where=f"{registry}: {json.dumps(known[name])}",
                    expected=json.dumps(entry),
                    do="rename the corpus file, or remove that entry if nothing needs it",
                )
        if any(name not in known for name in entries):
            write_json(registry, known | entries)


def read_registry(registry: Path) -> dict[str, dict]:
    """The datasets that a ``dataset_info.json`` names.

    Raises:
        DataError: It is missing or not JSON.
    """
    try:
        known = json.loads(registry.read_text("utf-8"))
        if not isinstance(known, dict):
            raise ValueError("it is not a mapping of names")
        return known
    except (OSError, ValueError) as error:
        raise DataError(
            f"the dataset registry cannot be read: {error}",
            where=registry,
            do="run notebook 02_data, which writes it, or fix it by hand",
        ) from None


def registered_datasets(storage: Path) -> DataFrame:
    """The registry of a storage as a table."""
    import pandas as pd

    rows = [
        (name, entry.get("file_name"), (entry.get("columns") or {}).get("prompt"))
        for name, entry in read_registry(storage / REGISTRY).items()
    ]
    return pd.DataFrame(rows, columns=["dataset", "file", "text column"]).set_index("dataset")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
