"""Ingestion: reads the shards of a source, validates and filters them on all cores."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..run import write_json
from .cleaning import Cleaning, Part, Tally, clean_chunk
from .formats import Record
from .sources import Shard, Source

_FORMAT = 1  # of a corpus on the storage; a corpus of another format is read again
_CHUNK, _RECORDS = 4_000_000, 10_000  # characters, and records, that a process takes at once


@dataclass(frozen=True)
class Settings:
    """How a source is read."""

    column: str  # the field that holds the text
    fraction: float  # of documents to hold out
    tolerate: float  # the share of records that may be invalid
    max_samples: int | None  # the largest number of records, over all shards
    cleaning: Cleaning

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            problem, expected = f"held-out fraction {self.fraction}", "between 0 and 1"
        elif not 0 <= self.tolerate < 1:
            problem, expected = f"tolerated share {self.tolerate}", "from 0 to below 1"
        elif self.max_samples is not None and self.max_samples < 1:
            problem, expected = f"max_samples {self.max_samples}", "1 or more"
        else:
            return
        raise DataError(problem, expected=f"a number, {expected}", do="correct the value")

    @property
    def for_shards(self) -> str:
        """The settings that decide what is made of a shard, as text."""
        return json.dumps([_FORMAT, self.column, self.fraction, asdict(self.cleaning)])

    def key(self, mark: str) -> str:
        """A digest of all settings and the source's mark; empty if the source has no mark."""
        text = f"{self.for_shards}\n{self.tolerate}\n{self.max_samples}\n{mark}"
        return hashlib.sha256(text.encode()).hexdigest() if mark else ""


def read_source(source: Source, work: Path, settings: Settings) -> tuple[list[Part], Tally, int]:
    """Reads every shard of a source that an earlier, failed attempt has not read.

    Returns:
        The parts in order, the invalid records, and the number of records.

    Raises:
        DataError: The source is empty, or has more invalid records than the settings tolerate.
    """
    parts: list[Part] = []
    rejects, empty, left = Tally(), Tally(), settings.max_samples
    for shard in source.shards:
        key = f"{settings.for_shards}\n{left}\n{shard.name}\n{shard.mark}"
        folder = work / hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
        shard_parts = _already_read(folder) if shard.mark else None
        if shard_parts is None:
            shard_parts = read_shard(shard, folder, settings, left)
            write_json(folder / "done.json", [asdict(part) for part in shard_parts])
        for part in shard_parts:
            rejects.merge(part.rejects)
        parts += shard_parts
        records = sum(part.records for part in shard_parts)
        if not records and len(source.shards) > 1:
            empty.add("an empty file", shard.name, "")
        if left is not None and (left := left - records) <= 0:
            break
    total = sum(part.records for part in parts)
    if not total:
        raise DataError(
            "the corpus is empty",
            where=source.given,
            expected='documents, such as {"text": "…"} lines',
        )
    if rejects.total > settings.tolerate * total:
        raise _too_many_invalid(source, rejects, total, settings.tolerate)
    rejects.merge(empty)
    return parts, rejects, total


def read_shard(shard: Shard, folder: Path, settings: Settings, limit: int | None) -> list[Part]:
    """Reads at most ``limit`` records of a shard on all cores; the parts keep their order.

    Raises:
        DataError: The file is damaged, or a record is invalid and none are tolerated.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    parts = []
    how = (settings.column, settings.cleaning, settings.fraction)
    jobs = (
        (chunk, str(folder / f"{number:06d}.jsonl"), *how)
        for number, chunk in enumerate(_chunks(itertools.islice(shard.read(), limit)))
    )
    for part in _parallel(jobs):
        parts.append(part)
        if not settings.tolerate and part.rejects.total:
            raise _invalid_records(shard, part)
    return parts


def _chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    chunk: list[Record] = []
    size = 0
    for record in records:
        if record.damaged:
            raise DataError(
                record.problem,
                where=record.where,
                expected="a file that can be read to its end",
                do="download it again, or remove it; what was read of other files is kept",
            )
        chunk.append(record)
        size += len(record.line or record.text or "")
        if size >= _CHUNK or len(chunk) >= _RECORDS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _parallel(jobs: Iterator[tuple]) -> Iterator[Part]:
    """Cleans chunks and keeps their order; one runs in this process, several on all cores."""
    first = list(itertools.islice(jobs, 2))
    if len(first) < 2:
        yield from (clean_chunk(*job) for job in first)
        return
    with _pool() as (submit, width):
        waiting: list[Any] = []
        for job in itertools.chain(first, jobs):
            waiting.append(submit(*job))
            if len(waiting) > width:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


@contextlib.contextmanager
def _pool() -> Iterator[tuple[Callable[..., Any], int]]:
    """A function that submits a chunk, and the number of chunks to keep waiting.

    The jobs run on the Ray cluster where one is initialised, else in processes of this machine.
    """
    import multiprocessing
    import sys
    from concurrent.futures import ProcessPoolExecutor

    ray = sys.modules.get("ray")
    if ray and ray.is_initialized():
        task = ray.remote(num_cpus=1)(clean_chunk)
        cores = max(int(ray.cluster_resources().get("CPU", 1)), 1)
        yield lambda *job: task.remote(*job).future(), cores + 1
        return
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    # A forked process of one with threads, such as a notebook's kernel, may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cores, mp_context=context) as executor:
        yield lambda *job: executor.submit(clean_chunk, *job), cores + 1


def _already_read(folder: Path) -> list[Part] | None:
    """A shard's parts from an earlier attempt; ``None`` if it did not finish."""
    try:
        parts = json.loads((folder / "done.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return [
        Part(
            str(folder / Path(part["path"]).name),  # the storage may have been moved
            part["documents"],
            part["records"],
            Tally(**part["rejects"]),
            Tally(**part["filtered"]),
        )
        for part in parts
    ]


def _invalid_records(shard: Shard, part: Part, shown: int = 5) -> DataError:
    with Path(f"{part.path}.rejects").open(encoding="utf-8") as file:
        rejects = [json.loads(line) for line in itertools.islice(file, shown)]
    lines = [f"{reject['where']}: {reject['reason']}" for reject in rejects]
    if more := part.rejects.total - len(lines):
        lines.append(f"and {more} more")
    return DataError(
        f"{part.rejects.total} of {part.records} records are invalid",
        where="\n".join([*lines, f"in {shard.name}"]),
        expected='UTF-8 text; in JSON Lines one object per line: {"text": "…"}',
        do="fix them, or allow a share of them: TOLERATE = 0.01; nothing was written",
    )


def _too_many_invalid(source: Source, rejects: Tally, records: int, tolerate: float) -> DataError:
    most = sorted(rejects.counts.items(), key=lambda item: -item[1])[:8]
    examples = [
        f"{where}: {problem}"
        for reason in rejects.counts
        for where, problem in rejects.examples[reason][:2]
    ]
    counts = [f"{count:,} × {reason}" for reason, count in most]
    return DataError(
        f"{rejects.total:,} of {records:,} records are invalid, more than the "
        f"{tolerate:.1%} that are tolerated",
        where="\n".join([*counts, *examples[:5], f"in {source.given}"]),
        expected=f"at most {int(tolerate * records):,}",
        do="fix them, or raise TOLERATE; nothing was written",
    )
