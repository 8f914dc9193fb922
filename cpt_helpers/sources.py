"""Where text comes from: files of many forms, folders, URLs, object storage, hubs, packages.

Everything is read as a stream of :class:`Record`; nothing here holds a whole file. Paths and URLs
go through ``fsspec``: ``s3://`` and ``gs://`` work where ``s3fs`` or ``gcsfs`` is installed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from . import assets, forms
from .errors import DataError, nearest
from .forms import Record
from .redact import SECRET

TIMEOUT = 30.0  # seconds without an answer from a server
FORMS = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".txt", ".md")
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
C4_URL = (  # the file of the guide "Continued Pre-Training (CPT) at scale with DeepSpeed"
    "https://anyscale-public-materials.s3.us-west-2.amazonaws.com/"
    "llm-finetuning/llama-factory/datasets/alpaca/c4.jsonl"
)


@dataclass(frozen=True)
class Shard:
    """One part of a source that is read, and done, by itself.

    Attributes:
        name: How it is called in messages.
        mark: Changes when its content does (size and time of a file, release of a package); empty
            where nothing tells.
        read: Gives its records.
    """

    name: str
    mark: str
    read: Callable[[], Iterable[Record]]


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
    "my_cpt_c4": Builtin("the guide's 100 documents of C4", lambda: _files(C4_URL, "text"), 0.1),
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
        name, corpus.split("?")[0] if "://" in corpus else corpus, _files(corpus, column), 0.05
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
    for suffix in (*_COMPRESSED, *FORMS):
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

    def records() -> Iterator[Record]:
        from datasets import load_dataset

        try:
            rows = load_dataset(name, config, split=split, streaming=True)
            for number, row in enumerate(rows.take(max_samples) if max_samples else rows, 1):
                yield forms.of_row(row, column, f"{name}:{number}")
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"the dataset '{name}' cannot be read: {_first(error)}",
                where=corpus,
                expected="hf:<dataset>[:<config>[:<split>]] that the hub, or a local folder, has",
                do="correct the name; for a gated one accept its licence and export HF_TOKEN",
            ) from None

    shard = Shard(f"{name} {config or ''} {split}", "", records)
    parts = [name.rstrip("/").split("/")[-1], config or "", "" if split == "train" else split]
    own = assets.slug("_".join(part for part in parts if part))
    return Source(f"hf_{own}" if own in BUILTIN else own, corpus, [shard], 0.05)


def _files(pattern: str, column: str) -> list[Shard]:
    """Every file a path, folder, glob or URL means, in the order of their names."""
    import fsspec

    remote = "://" in pattern
    options = _options(pattern)
    try:
        fs, root = fsspec.core.url_to_fs(
            pattern if remote else str(Path(pattern).expanduser().absolute()), **options
        )
        fs.invalidate_cache()  # what was mended a moment ago is to be seen
        web = pattern.startswith(("http://", "https://"))
        globbed = any(mark in root for mark in "*[") or (not web and "?" in root)
        if globbed and not (not remote and Path(root).exists()):
            if not remote:
                _require_readable(Path(root.split("*")[0].split("[")[0]).parent, pattern)
            names = [name for name in fs.glob(root) if _form(name)]
        elif not web and fs.isdir(root):
            if not remote:
                _require_readable(Path(root), pattern)
            names = [name for name in fs.find(root) if _form(name)]
        else:
            names = [root]
        details = {} if web else {name: fs.info(name) for name in names}
    except ImportError as error:
        raise DataError(
            f"reading {pattern.split('://')[0]}:// needs another package: {error}",
            where=pattern,
            do="pip install gcsfs==2025.3.0 (for gs://), which goes with the pins",
        ) from None
    except DataError:
        raise
    except FileNotFoundError as error:
        raise _missing(pattern, error) from None
    except Exception as error:  # each object storage has errors of its own
        raise _unreachable(pattern, error) from None
    if not names:
        raise DataError(
            "no file with text is there",
            where=pattern,
            expected=f"files that end in {', '.join(FORMS)}, plain or {', '.join(_COMPRESSED)}",
            do="check the path; other files are passed over",
        )
    return [
        Shard(
            PurePosixPath(name).name if len(names) == 1 else _short(name, root),
            _mark(details.get(name)),
            lambda name=name: _read_file(fs, name, column, pattern, web),
        )
        for name in sorted(names)
    ]


def _require_readable(folder: Path, pattern: str) -> None:
    """fsspec leaves out what it may not list, without a word."""

    def refuse(error: OSError) -> None:
        raise DataError(
            f"the folder may not be read: {error.strerror}",
            where=error.filename,
            expected=f"leave to read all of {pattern}",
            do="change its permissions, or give what may be read",
        )

    for _ in os.walk(folder, onerror=refuse):
        pass


def _options(pattern: str) -> dict[str, Any]:
    if pattern.startswith(("http://", "https://")):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
        return {"client_kwargs": {"timeout": timeout}}
    return {}


def _short(name: str, root: str) -> str:
    start = root.split("*")[0].rsplit("/", 1)[0] if "*" in root else root
    return name.removeprefix(start).lstrip("/")


def _mark(details: dict[str, Any] | None) -> str:
    """Size, and time or digest, of a file; its content need not be read to know it changed."""
    if not details:
        return ""
    keys = ("ETag", "etag", "mtime", "LastModified", "last_modified")
    when = next((details[key] for key in keys if details.get(key)), "")
    return f"{details.get('size')} {when}" if when else ""


def _form(name: str) -> str:
    """A file's form by its name, compression apart; empty where it is none we read."""
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    return next((form for form in FORMS if name.lower().endswith(form)), "")


def _read_file(fs: Any, name: str, column: str, given: str, web: bool) -> Iterator[Record]:
    short = PurePosixPath(name.split("?")[0]).name
    form = _form(name.split("?")[0]) or ".jsonl"
    how = {"block_size": 0} if web else {}  # a stream: servers need not know ranges
    try:
        if form == ".parquet":
            with fs.open(name, "rb") as file:
                yield from forms.parquet_of(file, column, short, given)
            return
        with fs.open(name, "rb", **how) as packed:
            try:
                file = forms.unpacked(packed, name.split("?")[0])
                if form in (".jsonl", ".ndjson"):
                    yield from forms.lines_of(file, short)
                elif form == ".json":
                    yield from forms.json_of(file, column, short)
                elif form in (".csv", ".tsv"):
                    yield from forms.csv_of(
                        file, column, short, given, "\t" if form == ".tsv" else ","
                    )
                else:
                    yield from forms.whole_of(file, short)
            except EOFError as error:
                problem = f"the compressed file ends in the middle ({error})"
                yield Record(short, problem=problem, damaged=True)
            except forms.DAMAGE as error:
                yield Record(short, problem=f"the file is damaged ({error})", damaged=True)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise _missing(given, error) from None
    except PermissionError as error:
        raise DataError(
            f"the file may not be read: {error.strerror}", where=name, do="change its permissions"
        ) from None
    except Exception as error:
        raise _unreachable(given, error) from None


def mark_of(source: Source) -> str:
    """A digest of all its shards' names and marks; empty where one of them has no mark."""
    if not all(shard.mark for shard in source.shards):
        return ""
    text = "\n".join(f"{shard.name} {shard.mark}" for shard in source.shards)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300] or type(error).__name__


def _missing(pattern: str, error: Exception) -> DataError:
    if "://" in pattern and error.__cause__ is not None:  # any answer but a file, to fsspec
        return _unreachable(pattern, error.__cause__)
    return DataError(
        f"the corpus {pattern} does not exist",
        where=pattern if "://" in pattern else Path(pattern).expanduser().absolute(),
        expected="a file, a folder, a glob or a URL, or a built-in corpus: " + ", ".join(BUILTIN),
        do="check the path; a relative one starts at the working directory",
    )


def _unreachable(pattern: str, error: Exception) -> DataError:
    code = f"HTTP {error.status}, " if hasattr(error, "status") else ""
    reason = f"{code}{_first(error)}"
    return DataError(
        f"the corpus cannot be read: {reason}",
        where=pattern,
        expected=f"an answer within {TIMEOUT:.0f} s, and leave to read",
        do="check the address, the network and the credentials, or download it and give its path",
    )
