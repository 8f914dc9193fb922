"""File formats: each file is read as a stream of records, and each record is validated by itself.

To add a format, write a function that yields :class:`Record` and call it in :func:`read_file`.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import DataError

FORMATS = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".txt", ".md")
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
TIMEOUT = 30.0  # seconds to wait for a server
MAX_BYTES = 10_000_000  # a longer line is invalid, and is never held in memory as a whole
_DAMAGED = (gzip.BadGzipFile, lzma.LZMAError, zlib.error)


@dataclass(frozen=True)
class Record:
    """One record of a source: a document, or the reason why it is invalid."""

    where: str  # ``file:line`` or ``file``
    line: bytes | None = None  # a line of JSON that is not parsed yet
    text: str | None = None  # a text that needs no parsing
    problem: str = ""  # why the record is invalid
    damaged: bool = False  # the rest of the file cannot be read; TOLERATE does not allow this


def format_of(name: str) -> str:
    """The format of a file by its name, without compression; empty if it is not supported."""
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return next((suffix for suffix in FORMATS if name.lower().endswith(suffix)), "")


def read_file(filesystem: Any, path: str, column: str, pattern: str, web: bool) -> Iterator[Record]:
    """Streams the records of one file; messages name ``pattern``, the source as the user wrote it.

    Raises:
        DataError: The file is missing or cannot be read, or has no such column.
    """
    plain = path.split("?")[0]  # a query may hold a signature
    name, suffix = PurePosixPath(plain).name, format_of(plain) or ".jsonl"
    options = {"block_size": 0} if web and suffix != ".parquet" else {}  # servers without ranges
    try:
        with filesystem.open(path, "rb", **options) as packed:
            if suffix == ".parquet":
                yield from _parquet(packed, column, name, pattern)
                return
            file = _utf8(_decompressed(packed, plain), plain)
            if suffix in (".jsonl", ".ndjson"):
                yield from _json_lines(file, name)
            elif suffix == ".json":
                yield from _json(file, column, name)
            elif suffix in (".csv", ".tsv"):
                yield from _csv(file, column, name, pattern, "\t" if suffix == ".tsv" else ",")
            else:
                yield from _whole_file(file, name)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise missing(pattern, error) from None
    except PermissionError as error:
        problem = f"there is no permission to read the file: {error.strerror}"
        raise DataError(problem, where=path, do="change its permissions") from None
    except Exception as error:  # each object storage has errors of its own
        if isinstance(error, EOFError) or "Truncated compressed stream" in str(error):
            problem = f"the compressed file ends in the middle ({error})"
        elif isinstance(error, _DAMAGED) or "ZSTD decompress failed" in str(error):
            problem = f"the file is damaged ({error})"
        else:
            raise unreachable(pattern, error) from None
        yield Record(name, problem=problem, damaged=True)


def first_line(error: BaseException) -> str:
    for cause in (error, error.__context__):  # s3fs fails again while it handles a time-out
        if isinstance(cause, TimeoutError) and cause.errno is None:  # not the system's
            return "the server stopped sending data"
    return (str(error).splitlines() or [""])[0][:300] or type(error).__name__


def missing(pattern: str, error: Exception) -> DataError:
    if "://" in pattern and error.__cause__ is not None:  # fsspec's answer to any HTTP error
        return unreachable(pattern, error.__cause__)
    return DataError(
        f"the corpus {pattern} does not exist",
        where=pattern if "://" in pattern else Path(pattern).expanduser().absolute(),
        expected="a file, a folder, a glob or a URL",
        do="check the path; a relative path starts at the working directory",
    )


def unreachable(pattern: str, error: BaseException) -> DataError:
    status = f"HTTP {error.status}, " if hasattr(error, "status") else ""
    return DataError(
        f"the corpus cannot be read: {status}{first_line(error)}",
        where=pattern,
        expected=f"an answer within {TIMEOUT:.0f} s, and permission to read",
        do="check the address, the network and the credentials, or download it and give its path",
    )


def _utf8(file: Any, path: str) -> io.BufferedReader:
    """The bytes of a text file after its byte-order mark.

    Raises:
        DataError: The first bytes show UTF-16 or UTF-32. Every line would be invalid otherwise.
    """
    reader = io.BufferedReader(file, 2**20)
    head = reader.read(4)
    encoding = json.detect_encoding(head)  # by the mark, or by the zero bytes of ASCII text
    start = head.decode(encoding, "ignore")
    marked = encoding in ("utf-16", "utf-32")
    if marked or ("utf-8" not in encoding and start.isascii() and start.strip("\0")):
        code = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
        raise DataError(
            f"the file is encoded as {code}, not as UTF-8",
            where=path,
            expected="UTF-8, with or without a byte-order mark",
            do=f"convert it, such as with: iconv -f {code} -t UTF-8 FILE > NEW\n"
            "decompress a compressed file first",
        )
    return io.BufferedReader(_Joined(head.removeprefix(codecs.BOM_UTF8), reader), 2**20)


def _decompressed(file: Any, path: str) -> Any:
    """A file's content without its compression, by its name."""
    if path.endswith(".zst"):  # zstandard ends silently where a file is cut; pyarrow fails
        import pyarrow as pa

        return pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    opener = next((openers[suffix] for suffix in openers if path.endswith(suffix)), None)
    return opener(io.BufferedReader(file, 2**20)) if opener else file


class _Joined(io.RawIOBase):
    """A stream with bytes that were already read from it in front."""

    def __init__(self, head: bytes, rest: Any) -> None:
        self.head, self.rest = head, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.head[: len(buffer)] or self.rest.read(len(buffer))
        self.head = self.head[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)


def _json_lines(reader: io.BufferedReader, name: str) -> Iterator[Record]:
    number = 0
    while line := reader.readline(MAX_BYTES):
        number += 1
        if len(line) == MAX_BYTES and not line.endswith(b"\n"):
            length = len(line)
            while (more := reader.readline(MAX_BYTES)) and not more.endswith(b"\n"):
                length += len(more)
            problem = f"longer than {MAX_BYTES:,} bytes ({length + len(more):,})"
            yield Record(f"{name}:{number}", problem=problem)
        elif line.strip():
            yield Record(f"{name}:{number}", line=line)


def _json(reader: io.BufferedReader, column: str, name: str) -> Iterator[Record]:
    """An array of objects, as a stream; one object; or JSON Lines."""
    import ijson

    head = reader.readline(MAX_BYTES)
    while head and not head.strip():
        head = reader.readline(MAX_BYTES)
    if not head.lstrip().startswith(b"["):
        if parse_line(head, column)[1].startswith("not JSON"):  # one object over several lines
            head += reader.read(MAX_BYTES)
            with contextlib.suppress(ValueError, RecursionError):
                yield record_of(json.loads(head), column, name)
                return
        yield from _json_lines(io.BufferedReader(_Joined(head, reader), 2**20), name)
        return
    number = 0
    try:
        for number, row in enumerate(ijson.items(_Joined(head, reader), "item"), 1):
            yield record_of(row, column, f"{name}:item {number}")
    except ijson.JSONError as error:
        yield Record(f"{name}:item {number + 1}", problem=f"not JSON ({error})", damaged=True)


def _csv(
    file: io.BufferedReader, column: str, name: str, pattern: str, delimiter: str
) -> Iterator[Record]:
    csv.field_size_limit(MAX_BYTES)
    # Bytes that are not UTF-8 become lone surrogates, which are invalid too.
    text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
    rows = csv.DictReader(text, delimiter=delimiter, strict=True)
    try:
        header = rows.fieldnames
    except csv.Error as error:
        yield Record(name, problem=f"not CSV ({error})", damaged=True)
        return
    if header is None:
        return
    _require_column(column, list(header), name, pattern)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield Record(f"{name}:{rows.line_num}", problem=f"not CSV ({error})")
            continue
        where = f"{name}:{rows.line_num}"
        if None in row:
            problem = f"more fields than the header's {len(header)}: is a quote missing?"
            yield Record(where, problem=problem)
        else:
            yield record_of(row, column, where)


def _parquet(file: Any, column: str, name: str, pattern: str) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        table = parquet.ParquetFile(file)
    except (ConnectionError, TimeoutError):  # the network's, not the file's
        raise
    except (pa.ArrowException, OSError) as error:
        yield Record(name, problem=f"not Parquet ({error})", damaged=True)
        return
    _require_column(column, table.schema_arrow.names, name, pattern)
    number = 0
    for batch in table.iter_batches(batch_size=256, columns=[column]):
        values = batch.column(0)
        if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            values = values.cast(pa.large_binary())  # decoded below, one by one
        for value in values.to_pylist():
            number += 1
            if isinstance(value, bytes):
                value = value.decode("utf-8", "surrogateescape")
            yield record_of({column: value}, column, f"{name}:row {number}")


def _whole_file(file: io.BufferedReader, name: str) -> Iterator[Record]:
    """A file that is one document; an empty file has none."""
    content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        yield Record(name, problem=f"longer than {MAX_BYTES:,} bytes: split it")
    elif content.strip():
        try:
            yield Record(name, text=content.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield Record(name, problem=f"not UTF-8 (byte {error.start + 1})")


def record_of(row: Any, column: str, where: str) -> Record:
    text, problem = _text_of(row, column)
    return Record(where, problem=problem) if problem else Record(where, text=text)


def parse_line(line: bytes, column: str) -> tuple[str, str]:
    """The text of a line of JSON, and its problem; one of them is empty."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return "", f"not UTF-8 (byte {error.start + 1} of the line is 0x{line[error.start]:02x})"
    except json.JSONDecodeError as error:
        return "", f"not JSON ({error.msg} at column {error.colno})"
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a thousand brackets
        return "", f"not JSON ({error})"
    return _text_of(row, column)


def _text_of(row: Any, column: str) -> tuple[str, str]:
    if not isinstance(row, dict):
        return "", f"no `{column}` (not an object)"
    if column not in row:
        return "", f"no `{column}` (its keys: {', '.join(map(str, row))[:80]})"
    text = row[column]
    if not isinstance(text, str):
        return "", f"`{column}` is {type(text).__name__}, not a string"
    return text, problem_of(text, column)


def problem_of(text: str, column: str) -> str:
    """Why a text is not a valid document; empty if it is one."""
    if not text.strip():
        return f"`{column}` is empty"
    if len(text) > MAX_BYTES:
        return f"longer than {MAX_BYTES:,} characters ({len(text):,})"
    if "\0" in text:
        return f"a NUL byte at character {text.index(chr(0)) + 1}"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:
            return f"not UTF-8 (0x{code - 0xDC00:02x} at character {error.start + 1})"
        return f"a lone surrogate, U+{code:04X}, at character {error.start + 1}"
    return ""


def _require_column(column: str, columns: list[str], name: str, pattern: str) -> None:
    if column not in columns:
        raise DataError(
            f"{name} has no column '{column}'",
            where=pattern,
            expected=f"one of its columns: {', '.join(columns[:12])}",
            do="give its name as TEXT_COLUMN",
        )
