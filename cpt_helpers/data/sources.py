"""Sources of text: files, folders, globs, URLs, object storage, Hugging Face datasets, packages.

:func:`find` turns the value of ``CORPUS`` into a :class:`Source`. Each of its shards is read as a
stream of records. To add a built-in corpus, add it to :data:`BUILTIN` and to
``dataset-configs/dataset_info.json``. Paths and URLs are opened through ``fsspec``: ``s3://`` needs
``s3fs``, ``gs://`` needs ``gcsfs``.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import DataError, nearest
from ..redact import SECRET
from ..setup import assets
from . import formats
from .formats import COMPRESSED, FORMATS, Record

C4_URL = (  # the file of the guide "Continued Pre-Training (CPT) at scale with DeepSpeed"
    "https://anyscale-public-materials.s3.us-west-2.amazonaws.com/"
    "llm-finetuning/llama-factory/datasets/alpaca/c4.jsonl"
)


@dataclass(frozen=True)
class Shard:
    """One part of a source. It is read by itself, and only again when its mark changes."""

    name: str  # in messages
    mark: str  # such as a file's size and time, or a package's release; empty if there is none
    read: Callable[[], Iterable[Record]]


@dataclass(frozen=True)
class Source:
    """A corpus to read."""

    name: str  # in the registry
    given: str  # as the user wrote it
    shards: list[Shard]
    fraction: float  # the default share of documents to hold out
    column: str | None = None  # the field that holds the text, where it is known

    @property
    def mark(self) -> str:
        """A digest of the shards' names and marks; empty where a shard has no mark."""
        if not all(shard.mark for shard in self.shards):
            return ""
        lines = "\n".join(f"{shard.name} {shard.mark}" for shard in self.shards)
        return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


# The shards of the corpora that are known by name, and the share of documents to hold out.
BUILTIN: dict[str, tuple[Callable[[], list[Shard]], float]] = {
    "ray_docs": (lambda: [_package("ray")], 0.005),  # docstrings of the installed ray package
    "news": (lambda: [_shard("news", "4.3.3", assets.news)], 0.06),  # Lee corpus, 299 articles
    "my_cpt_c4": (lambda: _files(C4_URL, "text"), 0.1),  # the guide's 100 documents of C4
}


def find(corpus: str, column: str = "text", max_samples: int | None = None) -> Source:
    """Finds the source that a value of ``CORPUS`` names.

    Args:
        corpus: A name of :data:`BUILTIN`; ``package:<name>[,<name>]`` (docstrings of installed
            packages); ``hf:<dataset>[:<config>[:<split>]]``, read as a stream; or a path, glob,
            folder or URL (``http(s)://``, ``s3://``, ``gs://``) of JSON Lines, JSON, Parquet, CSV,
            text or Markdown, plain or compressed with gzip, zstd, bz2 or xz.
        column: The field that holds the text.
        max_samples: The largest number of documents to take from a Hugging Face dataset.

    Raises:
        DataError: The name is unknown, there is no file, or the URL holds credentials.
    """
    if SECRET.search(corpus):  # it would be recorded with the corpus
        raise DataError(
            "the corpus's URL holds credentials",
            where=corpus,
            expected="credentials in the environment, such as AWS_ACCESS_KEY_ID or HF_TOKEN",
            do="remove the user and the password from the URL, or download the file first",
        )
    if corpus in BUILTIN:
        shards, fraction = BUILTIN[corpus]
        return Source(corpus, corpus, shards(), fraction, column="text")
    if corpus.startswith("package:"):
        packages = [p.strip() for p in corpus.removeprefix("package:").split(",") if p.strip()]
        name = assets.slug("_".join(packages)) + "_docs"
        name = f"package_{name}" if name in BUILTIN else name
        return Source(name, corpus, [_package(p) for p in packages], 0.02)
    if corpus.startswith("hf:"):
        return _hugging_face(corpus, column, max_samples)
    if not corpus or not _is_path(corpus):
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
    given = corpus.split("?")[0] if "://" in corpus else corpus
    return Source(name, given, _files(corpus, column), 0.05)


def _is_path(corpus: str) -> bool:
    if "/" in corpus:
        return True
    with contextlib.suppress(RuntimeError):  # the home of an unknown user
        path = Path(corpus).expanduser()
        return bool(path.suffix) or path.exists()
    return False


def _name_of(corpus: str) -> str:
    path = corpus.split("?")[0].rstrip("/")
    parts = [part for part in path.split("/") if part and not any(c in part for c in "*?[")]
    stem = parts[-1] if parts else ""
    for suffix in (*COMPRESSED, *FORMATS):
        stem = stem.removesuffix(suffix)
    return assets.slug(stem) or "corpus"


def _shard(name: str, mark: str, texts: Callable[[], Iterable[str]]) -> Shard:
    def records() -> Iterator[Record]:
        for number, text in enumerate(texts(), 1):
            yield Record(f"{name}:{number}", text=text)

    return Shard(name, mark, records)


def _package(package: str) -> Shard:
    import importlib.metadata

    names = importlib.metadata.packages_distributions().get(package.split(".")[0], [])
    release = importlib.metadata.version(names[0]) if names else ""
    return _shard(package, release, lambda: assets.docstrings(package))


def _hugging_face(corpus: str, column: str, max_samples: int | None) -> Source:
    dataset, *rest = corpus.removeprefix("hf:").split(":")
    splits = [part for part in rest if part in ("train", "validation", "test")]
    split = rest[1] if len(rest) > 1 else (splits or ["train"])[0]
    config = rest[0] if len(rest) > 1 or (rest and not splits) else None
    if Path(dataset).is_dir():  # on this machine, not on the hub
        _require_regular((str(p) for p in Path(dataset).rglob("*") if not p.is_dir()), corpus)

    def records() -> Iterator[Record]:
        from datasets import load_dataset

        try:
            rows = load_dataset(dataset, config, split=split, streaming=True)
            for number, row in enumerate(rows.take(max_samples) if max_samples else rows, 1):
                yield formats.record_of(row, column, f"{dataset}:{number}")
        except Exception as error:
            raise DataError(
                f"the dataset '{dataset}' cannot be read: {formats.first_line(error)}",
                where=corpus,
                expected="hf:<dataset>[:<config>[:<split>]], on the hub or in a local folder",
                do="correct the name; for a gated one accept its licence and export HF_TOKEN",
            ) from None

    parts = [dataset.rstrip("/").split("/")[-1], config or "", "" if split == "train" else split]
    name = assets.slug("_".join(part for part in parts if part))
    shard = Shard(f"{dataset} {config or ''} {split}", "", records)
    return Source(f"hf_{name}" if name in BUILTIN else name, corpus, [shard], 0.05)


def _files(pattern: str, column: str) -> list[Shard]:
    """Every file of a path, folder, glob or URL, in the order of their names."""
    import fsspec

    path = pattern if "://" in pattern else str(Path(pattern).expanduser().absolute())
    web = pattern.startswith(("http://", "https://"))
    try:
        fs, root = fsspec.core.url_to_fs(path, **(_web_options() if web else {}))
        fs.invalidate_cache()  # a file may have been fixed a moment ago
        names = _list(fs, root, pattern, web)
        details = {} if web else {name: fs.info(name) for name in names}
    except ImportError as error:
        raise DataError(
            f"reading {pattern.split('://')[0]}:// needs another package: {error}",
            where=pattern,
            do="pip install gcsfs==2025.3.0 (for gs://), which fits the pinned versions",
        ) from None
    except DataError:
        raise
    except FileNotFoundError as error:
        raise formats.missing(pattern, error) from None
    except Exception as error:  # each object storage has errors of its own
        raise formats.unreachable(pattern, error) from None
    if not names:
        raise DataError(
            "there is no file with text",
            where=pattern,
            expected=f"files that end in {', '.join(FORMATS)}, plain or {', '.join(COMPRESSED)}",
            do="check the path; other files are skipped",
        )
    start = root.split("*")[0].rsplit("/", 1)[0] if "*" in root else root
    return [
        Shard(
            PurePosixPath(name).name if len(names) == 1 else name.removeprefix(start).lstrip("/"),
            _mark(details.get(name, {})),
            functools.partial(formats.read_file, fs, name, column, pattern, web),
        )
        for name in sorted(names)
    ]


def _list(fs: Any, root: str, pattern: str, web: bool) -> list[str]:
    from fsspec.implementations.local import LocalFileSystem

    local = isinstance(fs, LocalFileSystem)  # also by file://
    names = [root]
    is_glob = any(mark in root for mark in "*[") or (not web and "?" in root)
    if is_glob and not (local and Path(root).exists()):
        if local:
            _require_readable(Path(root.split("*")[0].split("[")[0]).parent, pattern)
        names = [name for name in fs.glob(root) if formats.format_of(name)]
    elif not web and fs.isdir(root):
        if local:
            _require_readable(Path(root), pattern)
        names = [name for name in fs.find(root) if formats.format_of(name)]
    if local:
        _require_regular(names, pattern)
    return names


def _web_options() -> dict[str, Any]:
    import aiohttp

    timeout = aiohttp.ClientTimeout(
        total=None, sock_connect=formats.TIMEOUT, sock_read=formats.TIMEOUT
    )
    return {"client_kwargs": {"timeout": timeout}}


def _mark(details: dict[str, Any]) -> str:
    """Size, and time or digest, of a file; empty where the file system gives neither."""
    keys = ("ETag", "etag", "mtime", "LastModified", "last_modified")
    changed = next((details[key] for key in keys if details.get(key)), "")
    return f"{details.get('size')} {changed}" if changed else ""


def _require_readable(folder: Path, pattern: str) -> None:
    """Raises for a folder that cannot be listed, since fsspec skips it silently."""

    def fail(error: OSError) -> None:
        raise DataError(
            f"there is no permission to read the folder: {error.strerror}",
            where=error.filename,
            expected=f"permission to read all of {pattern}",
            do="change its permissions, or give files that you may read",
        )

    for _ in os.walk(folder, onerror=fail):
        pass


def _require_regular(names: Iterable[str], pattern: str) -> None:
    """Raises for a pipe, a socket or a device: opening one may block forever."""
    paths = [Path(name) for name in sorted(names)]
    irregular = [p for p in paths if not p.is_file() and (p.exists() or p.is_symlink())]
    if not irregular:
        return
    path, more = irregular[0], len(irregular) - 1
    file_types = [
        ("a folder", path.is_dir()),
        ("a named pipe", path.is_fifo()),
        ("a socket", path.is_socket()),
        ("a broken link", not path.exists()),
    ]
    file_type = next((name for name, matches in file_types if matches), "a device")
    raise DataError(
        f"{path.name} is {file_type}, not a regular file",
        where=f"{path}, and {more} more" if more else path,
        expected=f"regular files in {pattern}",
        do="write the text to a regular file, or remove the entry from the folder",
    )
