"""Duplicates: finds exact and near duplicates within a corpus, and across its two halves.

Near duplicates share a band of their MinHash signatures; the documents with the same band are a
bucket. One band at a time is read from disk and sorted. Memory is 20 bytes per document, and the
duplicates found.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from .cleaning import BANDS, Cleaning, Part, shingles

_COMPARED = 64  # the last documents of a bucket and half that the next one is compared with
_INDEXED = 1000  # held-out documents of a bucket whose shingles are in memory at once

Dropped = dict[int, tuple[str, int]]  # by document: the reason, and the document it repeats


def find(parts: list[Part], cleaning: Cleaning) -> Dropped:
    """Finds the documents to drop; they are numbered across all parts, in order."""
    import numpy as np

    dropped: Dropped = {}
    if cleaning.exact:  # equal texts have equal hashes, and are in the same half
        for bucket in _buckets(_keys(parts, 0)):
            _drop_repeated(bucket, dropped, "an exact duplicate")
    if not (cleaning.near or cleaning.contamination):
        return dropped
    threshold = cleaning.near or Cleaning.near
    flags = [np.fromfile(f"{part.path}.held-out", dtype=np.uint8) for part in parts]
    held_out = np.concatenate(flags) if flags else np.zeros(0, np.uint8)
    starts = np.cumsum([0, *(part.documents for part in parts)])

    @lru_cache(maxsize=512)
    def shingles_of(document: int) -> frozenset[str]:
        return frozenset(shingles(_read_document(parts, starts, document)))

    compared: set[tuple[int, int]] = set()

    def similar(one: int, other: int) -> bool:
        if (one, other) in compared:
            return False
        compared.add((one, other))
        a, b = shingles_of(one), shingles_of(other)
        return len(a & b) >= threshold * len(a | b)

    for band in range(1, BANDS + 1):
        for bucket in _buckets(_keys(parts, band)):
            held = [document for document in bucket if held_out[document]]
            trained = [document for document in bucket if not held_out[document]]
            if cleaning.near:
                _drop_repeated(held, dropped, "a near duplicate", similar)
            if cleaning.contamination:
                _drop_contaminated(trained, held, dropped, shingles_of, threshold)
            if cleaning.near:
                _drop_repeated(trained, dropped, "a near duplicate", similar)
    return dropped


def _drop_repeated(
    bucket: list[int],
    dropped: Dropped,
    reason: str,
    similar: Callable[[int, int], bool] | None = None,
) -> None:
    """Drops the documents of a bucket that repeat an earlier one of it.

    All are of one half. Without ``similar``, the same key means the same text.
    """
    kept: list[int] = []
    for document in bucket:
        if document in dropped:
            continue
        for other in kept[-_COMPARED:]:
            if similar is None or similar(other, document):
                dropped[document] = (reason, other)
                break
        else:
            kept.append(document)


def _drop_contaminated(
    trained: list[int],
    held: list[int],
    dropped: Dropped,
    shingles_of: Callable[[int], frozenset[str]],
    threshold: float,
) -> None:
    """Drops the training documents of a bucket that are similar to a held-out document of it.

    Every pair is compared. An index counts the shingles that a document shares with a thousand
    others at once, in a millisecond; a comparison of each pair takes 50.
    """
    import numpy as np

    held = [document for document in held if document not in dropped]
    for begin in range(0, len(held), _INDEXED):
        indexed = held[begin : begin + _INDEXED]
        remaining = [document for document in trained if document not in dropped]
        if not remaining:
            return
        positions: dict[str, list[int]] = {}
        for position, document in enumerate(indexed):
            for shingle in shingles_of(document):
                positions.setdefault(shingle, []).append(position)
        index = {shingle: np.array(where) for shingle, where in positions.items()}
        sizes = np.array([len(shingles_of(document)) for document in indexed])
        for document in remaining:
            document_shingles = shingles_of(document)
            hits = [index[shingle] for shingle in document_shingles if shingle in index]
            if not hits:
                continue
            shared = np.bincount(np.concatenate(hits), minlength=len(indexed))
            similar = shared >= threshold * (sizes + len(document_shingles) - shared)
            if similar.any():
                other = indexed[int(similar.argmax())]
                dropped[document] = ("a near duplicate of a held-out document", other)


def _keys(parts: list[Part], column: int) -> Any:
    """One key of every document: column 0 is the text's digest, 1 to ``BANDS`` are the bands."""
    import numpy as np

    columns = [
        np.fromfile(f"{p.path}.keys", np.uint64, p.documents, offset=8 * column * p.documents)
        for p in parts
    ]
    return np.concatenate(columns) if columns else np.zeros(0, np.uint64)


def _buckets(keys: Any) -> Iterator[list[int]]:
    """The documents of each key that more than one document has; key 0 means none."""
    import numpy as np

    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    edges = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    begins, ends = np.concatenate([[0], edges]), np.concatenate([edges, [len(keys)]])
    for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
        if end - begin > 1 and ordered[begin]:
            yield order[begin:end].tolist()


def _read_document(parts: list[Part], starts: Any, number: int) -> str:
    import numpy as np

    index = int(np.searchsorted(starts, number, side="right")) - 1
    part, row = parts[index], number - int(starts[index])
    offset = np.fromfile(f"{part.path}.offsets", dtype=np.uint64, count=1, offset=8 * row)
    with Path(part.path).open("rb") as file:
        file.seek(int(offset[0]))
        return json.loads(file.readline())["text"]
