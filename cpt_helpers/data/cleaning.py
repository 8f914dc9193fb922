"""Records checked, filtered and fingerprinted; by the fingerprints ``duplicates.py`` finds copies.

MinHash (Broder 1997) by ``rensa``, which makes signatures in Rust, a hundred times faster than in
Python: ``datatrove`` does not fit beside the pins (numpy ≥ 2), and ``datasketch`` with its index in
memory would grow with the corpus.
"""

from __future__ import annotations

import hashlib
import json
import os
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
# 1910.10683, section 2.2), those that need no list of words.
_STOP = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})


@dataclass(frozen=True)
class Cleaning:
    """What is dropped from a corpus; each a switch.

    Attributes:
        exact: Documents whose text was read already.
        near: Documents at least so like an earlier one (Jaccard of 3-word shingles); 0 for none.
        contamination: Training documents that (nearly) equal a held-out one.
        min_characters: Shorter documents.
        max_characters: Longer documents; 0 for no limit.
        quality: Documents that fail Gopher's and C4's rules; meant for text from the web.
    """

    exact: bool = True
    near: float = 0.75
    contamination: bool = True
    min_characters: int = 1
    max_characters: int = 0
    quality: bool = False


def chosen(switches: dict[str, Any]) -> Cleaning:
    """The switches a reader gives, by name.

    Raises:
        ParameterError: One is unknown, or its value of another kind.
    """
    known = {f.name: type(getattr(Cleaning(), f.name)) for f in fields(Cleaning)}
    for name, value in switches.items():
        if name not in known:
            raise ParameterError(
                f"CLEAN has no switch '{name}'",
                expected=nearest(name, known),
                do="correct the name or leave it out",
            )
        wanted = known[name]
        right = isinstance(value, bool) if wanted is bool else isinstance(value, int | float)
        if not right or (name == "near" and not 0 <= value <= 1):
            raise ParameterError(
                f"CLEAN: {name} is {value!r}",
                expected="True or False" if wanted is bool else "a number (near: from 0 to 1)",
                do="correct the value",
            )
    return Cleaning(**switches)


@dataclass
class Tally:
    """Counts by reason, and the first examples of each.

    Attributes:
        counts: Documents or records by reason.
        examples: ``(where, text or problem)`` of the first ones, by reason.
    """

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def add(self, reason: str, where: str, example: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        kept = self.examples.setdefault(reason, [])
        if len(kept) < _EXAMPLES:
            kept.append((where, example[:300]))

    def merge(self, other: Tally) -> None:
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
        for reason, examples in other.examples.items():
            kept = self.examples.setdefault(reason, [])
            kept += [tuple(example) for example in examples[: _EXAMPLES - len(kept)]]

    @property
    def total(self) -> int:
        return sum(self.counts.values())


@dataclass
class Part:
    """What became of a chunk of records; its documents are in a file.

    Attributes:
        path: JSON Lines of ``where`` and ``text``; beside it ``.keys`` and ``.signatures``.
        documents: Documents in it.
        records: Records read.
        rejects: What was no document.
        filtered: Documents that failed a filter.
    """

    path: str
    documents: int
    records: int
    rejects: Tally
    filtered: Tally


def work(
    records: list[Record], path: str, column: str, cleaning: Cleaning, fraction: float
) -> Part:
    """Checks, filters and fingerprints a chunk of records; runs in whatever process.

    Writes the documents to ``path``, what was refused to ``path + ".rejects"``, what was filtered
    out to ``path + ".dropped"``.
    """
    rejects, filtered, texts = Tally(), Tally(), []
    with (
        Path(path).open("w", encoding="utf-8") as out,
        Path(path + ".rejects").open("w", encoding="utf-8", errors="backslashreplace") as refused,
        Path(path + ".dropped").open("w", encoding="utf-8") as dropped,
    ):
        for record in records:
            text, problem = _text(record, column)
            if problem:
                kind = _kind(problem)
                rejects.add(kind, record.where, problem)
                raw = (record.line or b"").decode("utf-8", "backslashreplace").rstrip("\n")
                _line(refused, where=record.where, reason=problem, raw=raw)
            elif reason := failed(text, cleaning):
                filtered.add(reason, record.where, text)
                _line(dropped, where=record.where, reason=reason, text=text)
            else:
                texts.append(text)
                _line(out, where=record.where, text=text)
    _fingerprint(texts, path, cleaning, fraction)
    return Part(path, len(texts), len(records), rejects, filtered)


def failed(text: str, cleaning: Cleaning) -> str:
    """The filter a document fails; empty where it passes."""
    if len(text) < cleaning.min_characters:
        return f"shorter than {cleaning.min_characters:,} characters"
    if cleaning.max_characters and len(text) > cleaning.max_characters:
        return f"longer than {cleaning.max_characters:,} characters"
    return _quality(text) if cleaning.quality else ""


def _quality(text: str) -> str:
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
    if len(_STOP & {word.lower() for word in words}) < 2:
        return "fewer than two of the commonest words"
    repeated = sum(len(line) * (n - 1) for line, n in Counter(lines).items())
    if repeated / len(text) > 0.2:
        return "more than 20 % of its characters are in repeated lines"
    lower = text.lower()
    if "lorem ipsum" in lower:
        return "lorem ipsum"
    return ""


def shingles(text: str) -> set[str]:
    """A document's runs of three words; of one that is shorter, the whole."""
    words = _WORD.findall(text.lower())
    if not words:  # signs only
        return {text}
    return {" ".join(words[i : i + SHINGLE]) for i in range(max(len(words) - SHINGLE + 1, 1))}


def _fingerprint(texts: list[str], path: str, cleaning: Cleaning, fraction: float) -> None:
    """Writes what duplicates are found by: each key of all documents together, then the next."""
    import numpy as np

    digests = [hashlib.sha256(text.encode("utf-8")).digest() for text in texts]
    exact = np.array([int.from_bytes(d[8:16], "big") or 1 for d in digests], dtype=np.uint64)
    held = [int.from_bytes(d[:8], "big") < fraction * 2**64 for d in digests]
    np.array(held, dtype=np.uint8).tofile(f"{path}.held-out")
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
    with Path(f"{path}.keys").open("wb") as file:
        exact.tofile(file)
        bands.tofile(file)
    offsets = np.zeros(len(texts), dtype=np.uint64)
    with Path(path).open("rb") as file:
        for number in range(len(texts)):
            offsets[number] = file.tell()
            file.readline()
    offsets.tofile(f"{path}.offsets")


def _text(record: Record, column: str) -> tuple[str, str]:
    if record.problem:
        return "", record.problem
    if record.line is not None:
        return formats.parse(record.line, column)
    return record.text or "", formats.problem_of(record.text or "", column)


def _kind(problem: str) -> str:
    """A problem without its particulars, to count by."""
    return re.sub(r" \(.*$|, not a string$|, U\+.*$| at character .*$", "", problem)


def _line(file: Any, **values: str) -> None:
    file.write(json.dumps(values, ensure_ascii=False) + "\n")


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
