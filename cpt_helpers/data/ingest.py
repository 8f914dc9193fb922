"""A shard checked, filtered and fingerprinted, by as many processes as there are cores."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError
from . import cleaning
from .cleaning import Part, Tally
from .files import Shard
from .formats import Record

_CHUNK, _RECORDS = 4_000_000, 10_000  # characters, and records, a process takes at once


def read(
    shard: Shard, place: Path, how: tuple, *, strict: bool, most: int | None = None
) -> list[Part]:
    """One shard in chunks, by as many processes as there are cores; in order.

    Raises:
        DataError: Where ``strict``, for the first chunk with a record that is no document.
    """
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    parts = []
    jobs = (
        (chunk, str(place / f"{number:06d}.jsonl"), *how)
        for number, chunk in enumerate(_chunks(itertools.islice(shard.read(), most)))
    )
    for part in _mapped(cleaning.work, jobs):
        parts.append(part)
        if strict and part.rejects.total:
            raise _bad(shard, part)
    return parts


def _chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    chunk, size = [], 0
    for record in records:
        if record.damaged:
            raise DataError(
                record.problem,
                where=record.where,
                expected="a file that can be read to its end",
                do="fetch it again, or take it out; what was read of other files is kept",
            )
        chunk.append(record)
        size += len(record.line or record.text or "")
        if size >= _CHUNK or len(chunk) >= _RECORDS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _mapped(work: Callable[..., Part], jobs: Iterator[tuple]) -> Iterator[Part]:
    """Results in the order of the jobs, with a few in flight: here, in processes, or on Ray."""
    first = list(itertools.islice(jobs, 2))
    if len(first) < 2:  # small: not worth a process
        yield from (work(*job) for job in first)
        return
    jobs = itertools.chain(first, jobs)
    with _pool() as (submit, width):
        waiting = []
        for job in jobs:
            waiting.append(submit(work, *job))
            if len(waiting) > width:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()


@contextlib.contextmanager
def _pool() -> Iterator[tuple[Callable[..., Any], int]]:
    """How to have work done elsewhere, and by how many at once."""
    import multiprocessing
    import sys
    from concurrent.futures import ProcessPoolExecutor

    ray = sys.modules.get("ray")
    if ray and ray.is_initialized():
        remote = {}

        def submit(work: Callable, *args: Any) -> Any:
            task = remote.setdefault(work, ray.remote(num_cpus=1)(work))
            return task.remote(*args).future()

        yield submit, max(int(ray.cluster_resources().get("CPU", 1)), 1) + 1
        return
    cores = cleaning.available_cores()
    # Forking a process with threads (a notebook's kernel) may hang; these begin afresh.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cores, mp_context=context) as executor:
        yield executor.submit, cores + 1


def done(place: Path) -> list[Part] | None:
    """A shard's parts from an earlier time; ``None`` where it was not finished."""
    try:
        read = json.loads((place / "done.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return [
        Part(
            **part
            | {k: _tally(part[k]) for k in ("rejects", "filtered")}
            | {"path": str(place / Path(part["path"]).name)}  # the storage may have been moved
        )
        for part in read
    ]


def _tally(values: dict) -> Tally:
    tally = Tally()
    tally.counts.update(values["counts"])
    tally.examples = {reason: [tuple(e) for e in es] for reason, es in values["examples"].items()}
    return tally


def _bad(shard: Shard, part: Part, most: int = 5) -> DataError:
    """The first records that are no documents, by where they are."""
    lines = []
    with Path(f"{part.path}.rejects").open(encoding="utf-8") as file:
        for line in itertools.islice(file, most):
            reject = json.loads(line)
            lines.append(f"{reject['where']}: {reject['reason']}")
    more = part.rejects.total - len(lines)
    return DataError(
        f"{part.rejects.total} of {part.records} records are no documents",
        where="\n".join(lines) + (f"\nand {more} more" if more else "") + f"\nin {shard.name}",
        expected='UTF-8 text; in JSON Lines one object a line: {"text": "…"}',
        do="fix them, or allow a share of them: TOLERATE = 0.01; nothing was written",
    )
