"""Cleaning: validates and filters records, and computes the fingerprints that find duplicates.

MinHash (Broder 1997) is computed by ``rensa``, in Rust. ``datatrove`` needs numpy 2, which does not
fit the pinned versions. ``datasketch`` keeps its index in memory, which would grow with the corpus.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import ParameterError, nearest
from . import formats
from .formats import Record

PERMUTATIONS, BANDS, ROWS = 120, 20, 6  # found at Jaccard 0.75 with 1 - (1 - 0.75^6)^20 = 98 %
SHINGLE = 3  # words
_WORD = re.compile(r"\w+")
_SEED = 42
_EXAMPLES = 3
# Gopher's filters (Rae et al. 2021, arXiv 2112.11446, table A1) and C4's (Raffel et al. 2020, arXiv
# 1910.10683, section 2.2), without those that need a word list.
_STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})


@dataclass(frozen=True)
class Cleaning:
    """Which documents are dropped from a corpus."""

    exact: bool = True  # exact duplicates
    near: float = 0.75  # near duplicates: the smallest Jaccard similarity; 0 keeps them
    contamination: bool = True  # training documents that are near duplicates of a held-out one
    min_characters: int = 1  # shorter documents
    max_characters: int = 0  # longer documents; 0 for no limit
    quality: bool = False  # documents that fail Gopher's and C4's rules, meant for web text

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Cleaning:
        """Cleaning with the settings of the parameter ``CLEAN``.

        Raises:
            ParameterError: A setting is unknown, or its value has another type.
        """
        types = {f.name: type(f.default) for f in fields(cls)}
        for name, value in settings.items():
            if name not in types:
                raise ParameterError(
                    f"CLEAN has no setting '{name}'",
                    expected=nearest(name, types),
                    do="correct the name or remove it",
                )
            boolean = types[name] is bool
            valid = isinstance(value, bool) if boolean else isinstance(value, int | float)
            if not valid or (name == "near" and not 0 <= value <= 1):
                raise ParameterError(
                    f"CLEAN: {name} is {value!r}",
                    expected="True or False" if boolean else "a number (near: from 0 to 1)",
                    do="correct the value",
                )
        return cls(**settings)


@dataclass
class Tally:
    """Counts by reason, and the first examples of each reason as ``(where, text or problem)``."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def add(self, reason: str, where: str, example: str) -> None:
        self.merge(Tally({reason: 1}, {reason: [(where, example[:300])]}))

    def merge(self, other: Tally) -> None:
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
        for reason, examples in other.examples.items():
            kept = self.examples.setdefault(reason, [])
            kept += examples[: _EXAMPLES - len(kept)]

    @property
    def total(self) -> int:
        return sum(self.counts.values())


@dataclass
class Part:
    """A chunk of records after validation and filters.

    Its documents are in a file of JSON Lines, with ``where`` and ``text``. Next to that file are
    ``.rejects``, ``.dropped``, and the fingerprints: ``.keys``, ``.held-out`` and ``.offsets``.
    """

    path: str
    documents: int  # in the file
    records: int  # read
    rejects: Tally  # invalid records
    filtered: Tally  # documents that failed a filter


def clean_chunk(
    records: list[Record], path: str, column: str, cleaning: Cleaning, fraction: float
) -> Part:
    """Validates, filters and fingerprints a chunk of records; runs in any process."""
    rejects, filtered, texts = Tally(), Tally(), []
    with (
        Path(path).open("w", encoding="utf-8") as documents,
        Path(f"{path}.rejects").open("w", encoding="utf-8", errors="backslashreplace") as invalid,
        Path(f"{path}.dropped").open("w", encoding="utf-8") as dropped,
    ):
        for record in records:
            text, problem = text_of(record, column)
            if problem:
                rejects.add(_without_details(problem), record.where, problem)
                raw = (record.line or b"").decode("utf-8", "backslashreplace").rstrip("\n")
                write_line(invalid, where=record.where, reason=problem, raw=raw)
            elif reason := failed_filter(text, cleaning):
                filtered.add(reason, record.where, text)
                write_line(dropped, where=record.where, reason=reason, text=text)
            else:
                texts.append(text)
                write_line(documents, where=record.where, text=text)
    _fingerprint(texts, path, cleaning, fraction)
    return Part(path, len(texts), len(records), rejects, filtered)


def text_of(record: Record, column: str) -> tuple[str, str]:
    """The text of a record, and its problem; one of them is empty."""
    if record.problem:
        return "", record.problem
    if record.line is not None:
        return formats.parse_line(record.line, column)
    text = record.text or ""
    return text, formats.problem_of(text, column)


def failed_filter(text: str, cleaning: Cleaning) -> str:
    """The filter that a document fails; empty if it passes."""
    if len(text) < cleaning.min_characters:
        return f"shorter than {cleaning.min_characters:,} characters"
    if cleaning.max_characters and len(text) > cleaning.max_characters:
        return f"longer than {cleaning.max_characters:,} characters"
    return _failed_quality(text) if cleaning.quality else ""


def _failed_quality(text: str) -> str:
    words = text.split()
    if not 50 <= len(words) <= 100_000:
        return "fewer than 50 or more than 100,000 words"
    if not 3 <= sum(map(len, words)) / len(words) <= 10:
        return "words of fewer than 3 or more than 10 characters on average"
    if (text.count("#") + text.count("…") + text.count("...")) / len(words) > 0.1:
        return "more than a symbol for every 10 words"
    lines = [line for line in text.splitlines() if line.strip()]
    if sum(line.lstrip().startswith(("•", "-", "*")) for line in lines) / len(lines) > 0.9:
        return "more than 90 % of its lines are bullets"
    if sum(line.rstrip().endswith(("…", "...")) for line in lines) / len(lines) > 0.3:
        return "more than 30 % of its lines end in an ellipsis"
    if sum(any(c.isalpha() for c in word) for word in words) / len(words) < 0.8:
        return "more than 20 % of its words have no letter"
    if len(_STOP_WORDS & {word.lower() for word in words}) < 2:
        return "fewer than two of the most common words"
    repeated = sum(len(line) * (n - 1) for line, n in Counter(lines).items())
    if repeated / len(text) > 0.2:
        return "more than 20 % of its characters are in repeated lines"
    return "lorem ipsum" if "lorem ipsum" in text.lower() else ""


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document is held out: by a hash of its text alone.

    So a document stays in its half when the corpus grows, is shuffled, or is read elsewhere.
    """
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def shingles(text: str) -> set[str]:
    """The runs of three words of a document; a shorter document is one shingle."""
    words = _WORD.findall(text.lower())
    if not words:  # only punctuation
        return {text}
    return {" ".join(words[i : i + SHINGLE]) for i in range(max(len(words) - SHINGLE + 1, 1))}


def _fingerprint(texts: list[str], path: str, cleaning: Cleaning, fraction: float) -> None:
    """Writes the keys that duplicates share, column by column, and each document's offset."""
    import numpy as np

    digests = [hashlib.sha256(text.encode("utf-8")).digest() for text in texts]
    exact = np.array([int.from_bytes(d[8:16], "big") or 1 for d in digests], dtype=np.uint64)
    held_out = [is_held_out(text, fraction) for text in texts]
    np.array(held_out, dtype=np.uint8).tofile(f"{path}.held-out")
    bands = np.zeros((BANDS, len(texts)), dtype=np.uint64)
    if texts and (cleaning.near or cleaning.contamination):
        from rensa import RMinHash

        sets = [list(shingles(text)) for text in texts]
        rows = RMinHash.digest_matrix_from_token_sets(sets, PERMUTATIONS, _SEED).to_rows()
        matrix = np.array(rows, dtype=np.uint64).reshape(len(texts), BANDS, ROWS)
        factors = np.array([0x9E3779B97F4A7C15 + 2 * i for i in range(ROWS)], dtype=np.uint64)
        with np.errstate(over="ignore"):
            for row in range(ROWS):
                bands = (bands ^ matrix[:, :, row].T) * factors[row]
        bands |= np.uint64(1)
    np.vstack([exact, bands]).tofile(f"{path}.keys")
    with Path(path).open("rb") as file:
        lengths = [len(line) for line in file]
    np.cumsum([0, *lengths[:-1]], dtype=np.uint64)[: len(texts)].tofile(f"{path}.offsets")


def _without_details(problem: str) -> str:
    """A problem without the values that differ from record to record, for counting."""
    return re.sub(r" \(.*$|, not a string$|, U\+.*$| at character .*$", "", problem)


def write_line(file: Any, **values: Any) -> None:
    file.write(json.dumps(values, ensure_ascii=False) + "\n")
