"""Documents that repeat another one of the corpus, word for word or nearly, and which one it is.

Near duplicates share a band of their MinHash signatures; that makes a bucket. One band at a time is
read from disk and sorted: 20 bytes a document are in memory, and what is found of duplicates.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from .cleaning import BANDS, Cleaning, Part, shingles

_COMPARED = 64  # documents of its half and bucket that another is compared with at most
_INDEXED = 1000  # held-out documents of a bucket whose shingles are in memory at once


def find(parts: list[Part], cleaning: Cleaning) -> dict[int, tuple[str, int]]:
    """Which documents are dropped because of another one.

    Args:
        parts: All parts of the corpus, in order; documents are numbered through.
        cleaning: Which duplicates to look for.

    Returns:
        By document: the reason, and the document it is like.
    """
    import numpy as np

    counts = [part.documents for part in parts]
    held_out = np.concatenate(
        [np.fromfile(f"{p.path}.held-out", dtype=np.uint8) for p in parts] or [np.zeros(0, "u1")]
    )
    found: dict[int, tuple[str, int]] = {}
    if cleaning.exact:  # one text has one hash, so that it is never in both halves
        for bucket in _buckets(_column(parts, 0)):
            _repeated(bucket, found, "the same text again")
    if not (cleaning.near or cleaning.contamination):
        return found
    threshold = cleaning.near or Cleaning.near
    starts = np.cumsum([0, *counts])

    @lru_cache(maxsize=512)
    def shingled(document: int) -> frozenset[str]:
        return frozenset(shingles(_document(parts, starts, document)))

    seen: set[tuple[int, int]] = set()

    def alike(one: int, other: int) -> bool:
        if (one, other) in seen:
            return False
        seen.add((one, other))
        a, b = shingled(one), shingled(other)
        return len(a & b) >= threshold * len(a | b)

    for band in range(1, BANDS + 1):
        for bucket in _buckets(_column(parts, band)):
            held = [document for document in bucket if held_out[document]]
            trained = [document for document in bucket if not held_out[document]]
            if cleaning.near:
                _repeated(held, found, "nearly the same text again", alike)
            if cleaning.contamination:
                _contaminated(trained, held, found, shingled, threshold)
            if cleaning.near:
                _repeated(trained, found, "nearly the same text again", alike)
    return found


def _repeated(
    bucket: list[int],
    found: dict[int, tuple[str, int]],
    reason: str,
    alike: Callable[[int, int], bool] | None = None,
) -> None:
    """Drops those of a bucket that are like one of the last few before them.

    Args:
        bucket: Documents of one half with one key.
        found: What is dropped so far; added to.
        reason: Why they are.
        alike: Decides; without it one key means one text.
    """
    stay: list[int] = []
    for document in bucket:
        if document in found:
            continue
        for other in stay[-_COMPARED:]:
            if alike is None or alike(other, document):
                found[document] = (reason, other)
                break
        else:
            stay.append(document)


def _contaminated(
    trained: list[int],
    held: list[int],
    found: dict[int, tuple[str, int]],
    shingled: Callable[[int], frozenset[str]],
    threshold: float,
) -> None:
    """Drops the training documents of a bucket that are like any held-out one of it.

    Every pair counts here, so that the shared shingles of a document with a thousand others are
    counted at once, by an index: a millisecond, where a comparison of each pair takes fifty.

    Args:
        trained: Training documents with one key.
        held: Held-out documents with the same key.
        found: What is dropped so far; added to.
        shingled: Gives a document's shingles.
        threshold: Jaccard similarity from which two are alike.
    """
    import numpy as np

    held = [document for document in held if document not in found]
    for begin in range(0, len(held), _INDEXED):
        some = held[begin : begin + _INDEXED]
        left = [document for document in trained if document not in found]
        if not left:
            return
        positions: dict[str, list[int]] = {}
        for position, document in enumerate(some):
            for shingle in shingled(document):
                positions.setdefault(shingle, []).append(position)
        index = {shingle: np.array(where) for shingle, where in positions.items()}
        sizes = np.array([len(shingled(document)) for document in some])
        for document in left:
            own = shingled(document)
            hits = [index[shingle] for shingle in own if shingle in index]
            if not hits:
                continue
            shared = np.bincount(np.concatenate(hits), minlength=len(some))
            like = shared >= threshold * (sizes + len(own) - shared)
            if like.any():
                found[document] = ("nearly the same text is held out", some[int(like.argmax())])


def _column(parts: list[Part], band: int) -> Any:
    """One key of every document: 0 its digest, 1 … its bands; 0 where it has no such."""
    import numpy as np

    columns = []
    for part in parts:
        with Path(f"{part.path}.keys").open("rb") as file:
            file.seek(8 * band * part.documents)
            columns.append(np.fromfile(file, dtype=np.uint64, count=part.documents))
    return np.concatenate(columns) if columns else np.zeros(0, np.uint64)


def _buckets(keys: Any) -> Iterator[list[int]]:
    """Documents that share a key, where more than one does."""
    import numpy as np

    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    edges = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    begins, ends = np.concatenate([[0], edges]), np.concatenate([edges, [len(keys)]])
    for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
        if end - begin > 1 and ordered[begin]:
            yield order[begin:end].tolist()


def _document(parts: list[Part], starts: Any, number: int) -> str:
    import numpy as np

    index = int(np.searchsorted(starts, number, side="right")) - 1
    part, row = parts[index], number - int(starts[index])
    with Path(f"{part.path}.offsets").open("rb") as offsets, Path(part.path).open("rb") as file:
        offsets.seek(8 * row)
        file.seek(int(np.fromfile(offsets, dtype=np.uint64, count=1)[0]))
        return json.loads(file.readline())["text"]
