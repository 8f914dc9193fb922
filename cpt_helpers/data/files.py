"""Files of text by path, folder, glob or URL: found, checked, and read as streams of records."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import DataError
from . import formats
from .formats import Record

TIMEOUT = 30.0  # seconds without an answer from a server
FORMS = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".txt", ".md")
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")


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


def shards_of(pattern: str, column: str) -> list[Shard]:
    """Every file a path, folder, glob or URL means, in the order of their names."""
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    path = pattern if "://" in pattern else str(Path(pattern).expanduser().absolute())
    try:
        fs, root = fsspec.core.url_to_fs(path, **_options(pattern))
        local = isinstance(fs, LocalFileSystem)  # also by file://
        fs.invalidate_cache()  # a file may have been fixed a moment ago
        web = pattern.startswith(("http://", "https://"))
        globbed = any(mark in root for mark in "*[") or (not web and "?" in root)
        if globbed and not (local and Path(root).exists()):
            if local:
                _require_readable(Path(root.split("*")[0].split("[")[0]).parent, pattern)
            names = [name for name in fs.glob(root) if _form(name)]
        elif not web and fs.isdir(root):
            if local:
                _require_readable(Path(root), pattern)
            names = [name for name in fs.find(root) if _form(name)]
        else:
            names = [root]
        if local:
            require_regular(names, pattern)
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
            expected=f"files that end in {', '.join(FORMS)}, plain or {', '.join(COMPRESSED)}",
            do="check the path; other files are skipped",
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
    """fsspec silently skips a folder that it may not list."""

    def refuse(error: OSError) -> None:
        raise DataError(
            f"there is no permission to read the folder: {error.strerror}",
            where=error.filename,
            expected=f"permission to read all of {pattern}",
            do="change its permissions, or give files that may be read",
        )

    for _ in os.walk(folder, onerror=refuse):
        pass


def require_regular(names: Iterable[str], pattern: str) -> None:
    """Opening a pipe, a socket or a device may wait forever, and some devices never end.

    Raises:
        DataError: One of the paths exists and is not a regular file.
    """
    paths = [Path(name) for name in sorted(names)]
    odd = [p for p in paths if not p.is_file() and (p.exists() or p.is_symlink())]
    if odd:
        others = f", and {len(odd) - 1} more" if odd[1:] else ""
        raise DataError(
            f"{odd[0].name} is {_kind(odd[0])}, not a regular file",
            where=f"{odd[0]}{others}",
            expected=f"regular files in {pattern}",
            do="write the text to a regular file, or remove the entry from the folder",
        )


def _kind(path: Path) -> str:
    kinds = [
        ("a folder", path.is_dir()),
        ("a named pipe", path.is_fifo()),
        ("a socket", path.is_socket()),
        ("a link to nothing", not path.exists()),
    ]
    return next((kind for kind, found in kinds if found), "a device")


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
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return next((form for form in FORMS if name.lower().endswith(form)), "")


def _read_file(fs: Any, name: str, column: str, given: str, web: bool) -> Iterator[Record]:
    short = PurePosixPath(name.split("?")[0]).name
    form = _form(name.split("?")[0]) or ".jsonl"
    how = {"block_size": 0} if web else {}  # a stream: servers need not know ranges
    try:
        if form == ".parquet":
            with fs.open(name, "rb") as file:
                yield from formats.parquet_of(file, column, short, given)
            return
        with fs.open(name, "rb", **how) as packed:
            try:
                plain = name.split("?")[0]  # a query may hold a signature
                file = formats.utf8_of(formats.unpacked(packed, plain), plain)
                if form in (".jsonl", ".ndjson"):
                    yield from formats.lines_of(file, short)
                elif form == ".json":
                    yield from formats.json_of(file, column, short)
                elif form in (".csv", ".tsv"):
                    yield from formats.csv_of(
                        file, column, short, given, "\t" if form == ".tsv" else ","
                    )
                else:
                    yield from formats.whole_of(file, short)
            except EOFError as error:
                problem = f"the compressed file ends in the middle ({error})"
                yield Record(short, problem=problem, damaged=True)
            except formats.DAMAGE as error:
                yield Record(short, problem=f"the file is damaged ({error})", damaged=True)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise _missing(given, error) from None
    except PermissionError as error:
        raise DataError(
            f"there is no permission to read the file: {error.strerror}",
            where=name,
            do="change its permissions",
        ) from None
    except Exception as error:
        raise _unreachable(given, error) from None


def first_line(error: Exception) -> str:
    for cause in (error, error.__context__):  # s3fs fails once more while it handles one
        if isinstance(cause, TimeoutError) and cause.errno is None:  # not the system's
            return "the server stopped sending data"
    return (str(error).splitlines() or [""])[0][:300] or type(error).__name__


def _missing(pattern: str, error: Exception) -> DataError:
    if "://" in pattern and error.__cause__ is not None:  # any answer but a file, to fsspec
        return _unreachable(pattern, error.__cause__)
    return DataError(
        f"the corpus {pattern} does not exist",
        where=pattern if "://" in pattern else Path(pattern).expanduser().absolute(),
        expected="a file, a folder, a glob or a URL",
        do="check the path; a relative one starts at the working directory",
    )


def _unreachable(pattern: str, error: Exception) -> DataError:
    code = f"HTTP {error.status}, " if hasattr(error, "status") else ""
    reason = f"{code}{first_line(error)}"
    return DataError(
        f"the corpus cannot be read: {reason}",
        where=pattern,
        expected=f"an answer within {TIMEOUT:.0f} s, and permission to read",
        do="check the address, the network and the credentials, or download it and give its path",
    )
