"""Where text comes from: files of many forms, folders, URLs, object storage, hubs, packages.

Everything is read as a stream of :class:`Record`; nothing here holds a whole file. Paths and URLs
go through ``fsspec``: ``s3://`` and ``gs://`` work where ``s3fs`` or ``gcsfs`` is installed.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import DataError, nearest
from ..redact import SECRET
from ..setup import assets
from . import formats
from .files import COMPRESSED, FORMS, Shard, first_line, require_regular, shards_of
from .formats import Record

C4_URL = (  # the file of the guide "Continued Pre-Training (CPT) at scale with DeepSpeed"
    "https://anyscale-public-materials.s3.us-west-2.amazonaws.com/"
    "llm-finetuning/llama-factory/datasets/alpaca/c4.jsonl"
)


@dataclass(frozen=True)
class Source:
    """A corpus to be read.

    Attributes:
        name: Its name in the registry.
        given: As the reader wrote it.
        shards: Its parts, in order.
        fraction: Share of its documents to hold out, by default.
        column: The field that holds the text, where it is known.
    """

    name: str
    given: str
    shards: list[Shard]
    fraction: float
    column: str | None = None


@dataclass(frozen=True)
class Builtin:
    """A corpus known by name."""

    description: str
    shards: Callable[[], list[Shard]]
    fraction: float


BUILTIN = {
    "ray_docs": Builtin(
        "docstrings of the installed ray package", lambda: [_package("ray")], 0.005
    ),
    "news": Builtin(
        "Lee news corpus, 299 articles", lambda: [_texts("news", "4.3.3", assets.news)], 0.06
    ),
    "my_cpt_c4": Builtin("the guide's 100 documents of C4", lambda: shards_of(C4_URL, "text"), 0.1),
}


def find(corpus: str, column: str = "text", max_samples: int | None = None) -> Source:
    """What a corpus's name means.

    Args:
        corpus: A name of :data:`BUILTIN`; ``package:<name>[,<name>]`` (docstrings of installed
            packages); ``hf:<dataset>[:<config>[:<split>]]``, streamed; or a path, glob, folder or
            URL (``http(s)://``, ``s3://``, ``gs://``) of JSON Lines, JSON, Parquet, CSV, text or
            Markdown, plain or compressed with gzip, zstd, bz2 or xz.
        column: The field that holds the text.
        max_samples: Documents at most of a Hugging Face dataset.

    Raises:
        DataError: Nothing is known or found by that name, or it holds credentials.
    """
    if SECRET.search(corpus):  # it would be recorded with the corpus
        raise DataError(
            "the corpus's URL holds credentials",
            where=corpus,
            expected="credentials in the environment, such as AWS_ACCESS_KEY_ID or HF_TOKEN",
            do="take the user and the password out of the URL, or download the file first",
        )
    if corpus in BUILTIN:
        builtin = BUILTIN[corpus]
        return Source(corpus, corpus, builtin.shards(), builtin.fraction, column="text")
    if corpus.startswith("package:"):
        packages = [p.strip() for p in corpus.removeprefix("package:").split(",") if p.strip()]
        name = assets.slug("_".join(packages)) + "_docs"
        name = f"package_{name}" if name in BUILTIN else name
        return Source(name, corpus, [_package(p) for p in packages], 0.02)
    if corpus.startswith("hf:"):
        return _hub(corpus, column, max_samples)
    if not corpus or not _like_a_path(corpus):
        raise DataError(
            f"unknown corpus '{corpus}'",
            expected=f"a built-in name ({nearest(corpus, BUILTIN)}), package:<name>, hf:<dataset>, "
            "a path or URL",
            do="correct the name, or give the path of a file, a folder or a glob",
        )
    name = _name_of(corpus)
    if name in BUILTIN:
        raise DataError(
            f"{PurePosixPath(corpus).name} would take the name of the built-in corpus '{name}'",
            where=corpus,
            do="rename it",
        )
    return Source(
        name, corpus.split("?")[0] if "://" in corpus else corpus, shards_of(corpus, column), 0.05
    )


def _like_a_path(corpus: str) -> bool:
    if "/" in corpus:
        return True
    with contextlib.suppress(RuntimeError):  # the home of nobody
        path = Path(corpus).expanduser()
        return bool(path.suffix) or path.exists()
    return False


def _name_of(corpus: str) -> str:
    path = corpus.split("?")[0].rstrip("/")
    parts = [part for part in path.split("/") if part and not any(c in part for c in "*?[")]
    stem = parts[-1] if parts else ""
    for suffix in (*COMPRESSED, *FORMS):
        stem = stem.removesuffix(suffix)
    return assets.slug(stem) or "corpus"


def _texts(name: str, mark: str, read: Callable[[], Iterable[str]]) -> Shard:
    def records() -> Iterator[Record]:
        for number, text in enumerate(read(), 1):
            yield Record(f"{name}:{number}", text=text)

    return Shard(name, mark, records)


def _package(package: str) -> Shard:
    import importlib.metadata

    names = importlib.metadata.packages_distributions().get(package.split(".")[0], [])
    release = importlib.metadata.version(names[0]) if names else ""
    return _texts(package, release, lambda: assets.docstrings(package))


def _hub(corpus: str, column: str, max_samples: int | None) -> Source:
    name, *rest = corpus.removeprefix("hf:").split(":")
    splits = [part for part in rest if part in ("train", "validation", "test")]
    split = rest[1] if len(rest) > 1 else (splits or ["train"])[0]
    config = rest[0] if len(rest) > 1 or (rest and not splits) else None
    if Path(name).is_dir():  # of this machine, not of the hub
        require_regular((str(p) for p in Path(name).rglob("*") if not p.is_dir()), corpus)

    def records() -> Iterator[Record]:
        from datasets import load_dataset

        try:
            rows = load_dataset(name, config, split=split, streaming=True)
            for number, row in enumerate(rows.take(max_samples) if max_samples else rows, 1):
                yield formats.of_row(row, column, f"{name}:{number}")
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"the dataset '{name}' cannot be read: {first_line(error)}",
                where=corpus,
                expected="hf:<dataset>[:<config>[:<split>]] that the hub, or a local folder, has",
                do="correct the name; for a gated one accept its licence and export HF_TOKEN",
            ) from None

    shard = Shard(f"{name} {config or ''} {split}", "", records)
    parts = [name.rstrip("/").split("/")[-1], config or "", "" if split == "train" else split]
    own = assets.slug("_".join(part for part in parts if part))
    return Source(f"hf_{own}" if own in BUILTIN else own, corpus, [shard], 0.05)


def mark_of(source: Source) -> str:
    """A digest of all its shards' names and marks; empty where one of them has no mark."""
    if not all(shard.mark for shard in source.shards):
        return ""
    text = "\n".join(f"{shard.name} {shard.mark}" for shard in source.shards)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
