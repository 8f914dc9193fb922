"""LLaMA-Factory's registry of datasets, ``dataset_info.json``: read, and added to."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path

from ..errors import DataError
from ..recipes import HELD_OUT
from ..run import write_json

REGISTRY = "dataset_info.json"


def register(registry: Path, entries: dict[str, dict]) -> None:
    """Adds datasets to a ``dataset_info.json``, keeping what is there; safe for several processes.

    Raises:
        DataError: The registry is not JSON, or one of the names means something else in it.
    """
    registry.parent.mkdir(parents=True, exist_ok=True)
    with locked(registry.with_name(f".{registry.name}.lock")):
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
    """The datasets a ``dataset_info.json`` names.

    Raises:
        DataError: It is missing or not JSON.
    """
    try:
        known = json.loads(registry.read_text("utf-8"))
        if not isinstance(known, dict):
            raise ValueError("it is no mapping of names")
        return known
    except (OSError, ValueError) as error:
        raise DataError(
            f"the dataset registry cannot be read: {error}",
            where=registry,
            do="run notebook 02_data, which writes it, or mend it by hand",
        ) from None


def entries_of(name: str) -> dict[str, dict]:
    """A corpus's two entries in the registry: those whose files are made, and no others."""
    return {
        dataset: {"file_name": f"corpora/{name}/{half}.jsonl", "columns": {"prompt": "text"}}
        for dataset, half in ((name, "train"), (name + HELD_OUT, "heldout"))
    }


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
