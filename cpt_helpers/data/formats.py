"""The forms text comes in: each read as a stream of records, each record checked by itself."""

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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import DataError

# What libraries raise where a file is not what its name says.
DAMAGE = (gzip.BadGzipFile, lzma.LZMAError, zlib.error)
MAX_BYTES = 10_000_000  # a longer line is no document, and is never held whole


@dataclass(frozen=True)
class Record:
    """One document as read, or what is in its place.

    Attributes:
        where: ``file:line`` or ``file``, as a reader would look it up.
        line: A line of JSON, still to be parsed; ``None`` where ``text`` or ``problem`` is given.
        text: A text that needs no parsing.
        problem: Why there is no document here.
        damaged: The rest of the file cannot be read: no rate of bad records makes up for that.
    """

    where: str
    line: bytes | None = None
    text: str | None = None
    problem: str = ""
    damaged: bool = False


def utf8_of(file: Any, where: str) -> io.BufferedReader:
    """The bytes of a text file after its byte-order mark.

    Raises:
        DataError: The first bytes show UTF-16 or UTF-32. Every line would be refused otherwise.
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
            where=where,
            expected="UTF-8, with or without a byte-order mark",
            do=f"convert it, such as with: iconv -f {code} -t UTF-8 FILE > NEW\n"
            "decompress a compressed file first",
        )
    return io.BufferedReader(_Joined(head.removeprefix(codecs.BOM_UTF8), reader), 2**20)


def lines_of(reader: io.BufferedReader, short: str) -> Iterator[Record]:
    number = 0
    while line := reader.readline(MAX_BYTES):
        number += 1
        if len(line) == MAX_BYTES and not line.endswith(b"\n"):
            length = len(line)
            while (more := reader.readline(MAX_BYTES)) and not more.endswith(b"\n"):
                length += len(more)
            problem = f"longer than {MAX_BYTES:,} bytes ({length + len(more):,})"
            yield Record(f"{short}:{number}", problem=problem)
        elif line.strip():
            yield Record(f"{short}:{number}", line=line)


def json_of(reader: io.BufferedReader, column: str, short: str) -> Iterator[Record]:
    """An array of objects, streamed; one object; or lines after all."""
    import ijson

    head = reader.readline(MAX_BYTES)
    while head and not head.strip():
        head = reader.readline(MAX_BYTES)
    if not head.lstrip().startswith(b"["):
        if parse(head, column)[1].startswith("not JSON"):  # one object over several lines
            head += reader.read(MAX_BYTES)
            with contextlib.suppress(ValueError, RecursionError):
                yield of_row(json.loads(head), column, short)
                return
        yield from lines_of(io.BufferedReader(_Joined(head, reader), 2**20), short)
        return
    rest = _Joined(head, reader)
    number = 0
    try:
        for number, row in enumerate(ijson.items(rest, "item"), 1):
            yield of_row(row, column, f"{short}:item {number}")
    except ijson.JSONError as error:
        yield Record(f"{short}:item {number + 1}", problem=f"not JSON ({error})", damaged=True)


class _Joined(io.RawIOBase):
    """A stream whose first bytes were read already."""

    def __init__(self, head: bytes, rest: Any) -> None:
        self.head, self.rest = head, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.head[: len(buffer)] or self.rest.read(len(buffer))
        self.head = self.head[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)


def csv_of(
    file: io.BufferedReader, column: str, short: str, given: str, delimiter: str
) -> Iterator[Record]:
    csv.field_size_limit(MAX_BYTES)
    # Bytes that are not UTF-8 become lone surrogates, and are refused with the rest of those.
    text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
    rows = csv.DictReader(text, delimiter=delimiter, strict=True)
    try:
        if rows.fieldnames is None:
            return
    except csv.Error as error:
        yield Record(short, problem=f"not CSV ({error})", damaged=True)
        return
    if column not in rows.fieldnames:
        raise _no_column(given, short, column, rows.fieldnames)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield Record(f"{short}:{rows.line_num}", problem=f"not CSV ({error})")
            continue
        if None in row:
            problem = f"more fields than the header's {len(rows.fieldnames)}: is a quote missing?"
            yield Record(f"{short}:{rows.line_num}", problem=problem)
            continue
        yield of_row(row, column, f"{short}:{rows.line_num}")


def parquet_of(file: Any, column: str, short: str, given: str) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        table = parquet.ParquetFile(file)
    except (ConnectionError, TimeoutError):  # the network's, not the file's
        raise
    except (pa.ArrowException, OSError) as error:
        yield Record(short, problem=f"not Parquet ({error})", damaged=True)
        return
    names = table.schema_arrow.names
    if column not in names:
        raise _no_column(given, short, column, names)
    number = 0
    for batch in table.iter_batches(batch_size=256, columns=[column]):
        values = batch.column(0)
        if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            values = values.cast(pa.large_binary())  # decoded here, one by one
        for value in values.to_pylist():
            number += 1
            if isinstance(value, bytes):
                value = value.decode("utf-8", "surrogateescape")
            yield of_row({column: value}, column, f"{short}:row {number}")


def whole_of(file: io.BufferedReader, short: str) -> Iterator[Record]:
    """A file that is one document; an empty one is none."""
    content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        yield Record(short, problem=f"longer than {MAX_BYTES:,} bytes: split it")
    elif content.strip():
        try:
            yield Record(short, text=content.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield Record(short, problem=f"not UTF-8 (byte {error.start + 1})")


def unpacked(file: Any, name: str) -> Any:
    """A file's content without its compression, by its name."""
    if name.endswith(".zst"):
        return _Zstd(file)
    openers = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    opener = next((openers[end] for end in openers if name.endswith(end)), None)
    return opener(io.BufferedReader(file, 2**20)) if opener else file


class _Zstd(io.RawIOBase):
    """Frames of zstd; one that is cut is an EOFError, where libraries end silently."""

    def __init__(self, file: Any) -> None:
        import zstandard

        self.file, self.new = file, zstandard.ZstdDecompressor().decompressobj
        self.frame, self.begun, self.ready = self.new(), False, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            packed = self.file.read(2**20)
            if not packed:
                if self.begun:
                    raise EOFError("a frame of zstd is not complete")
                return 0
            while packed:
                self.begun = True
                self.ready += self.frame.decompress(packed)
                packed = b""
                if self.frame.eof:
                    packed = self.frame.unused_data
                    self.frame, self.begun = self.new(), False
        data, self.ready = self.ready[: len(buffer)], self.ready[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)


def of_row(row: Any, column: str, where: str) -> Record:
    text, problem = text_of(row, column)
    return Record(where, problem=problem) if problem else Record(where, text=text)


def text_of(row: Any, column: str) -> tuple[str, str]:
    """The text of a parsed record and what is wrong with it, one of them empty."""
    if not isinstance(row, dict) or column not in row:
        keys = (
            f"its keys: {', '.join(map(str, row))[:80]}" if isinstance(row, dict) else "no object"
        )
        return "", f"no `{column}` ({keys})"
    text = row[column]
    if not isinstance(text, str):
        return "", f"`{column}` is {type(text).__name__}, not a string"
    return text, problem_of(text, column)


def problem_of(text: str, column: str = "text") -> str:
    """Why a text is no document; empty where it is one."""
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


def parse(line: bytes, column: str) -> tuple[str, str]:
    """The text of a line of JSON and what is wrong with it, one of them empty."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return "", f"not UTF-8 (byte {error.start + 1} of the line is 0x{line[error.start]:02x})"
    except json.JSONDecodeError as error:
        return "", f"not JSON ({error.msg} at column {error.colno})"
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a thousand brackets
        return "", f"not JSON ({error})"
    return text_of(record, column)


def _no_column(given: str, short: str, column: str, names: Iterable[str]) -> DataError:
    return DataError(
        f"{short} has no column '{column}'",
        where=given,
        expected=f"one of its columns: {', '.join(list(names)[:12])}",
        do="give its name as TEXT_COLUMN",
    )
