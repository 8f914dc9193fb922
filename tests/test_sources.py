"""Sources of text: every file format, and errors for damaged or unreadable files."""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cpt_helpers.data import cleaning, corpora, formats, ingest, sources
from cpt_helpers.errors import DataError

TEXTS = [f"document {i}: «Käse» costs {i} €\nsecond line" for i in range(40)]


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()


def read(corpus: str, column: str = "text", most: int | None = None) -> list[str]:
    """All texts of a corpus; fails for an invalid record."""
    found = []
    for shard in sources.find(corpus, column, most).shards:
        for record in shard.read():
            text, problem = cleaning.text_of(record, column)
            assert not problem, problem
            found.append(text)
    return found


def problems(corpus: str) -> list[str]:
    found = []
    for shard in sources.find(corpus).shards:
        for record in shard.read():
            _, problem = cleaning.text_of(record, "text")
            if problem:
                found.append(f"{record.where}: {problem}")
    return found


def write_parquet(path: Path, texts: list[str], column: str = "text") -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    parquet.write_table(pa.table({"id": list(range(len(texts))), column: texts}), path)


def write_csv(path: Path, texts: list[str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "text"])
        rows.writerows(enumerate(texts))


def zstd(content: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor().compress(content)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("c.jsonl", lambda p: p.write_bytes(jsonl(TEXTS))),
        ("c.json", lambda p: p.write_text(json.dumps([{"text": t} for t in TEXTS]))),
        ("lines.json", lambda p: p.write_bytes(jsonl(TEXTS))),
        ("c.jsonl.gz", lambda p: p.write_bytes(gzip.compress(jsonl(TEXTS)))),
        ("c.jsonl.zst", lambda p: p.write_bytes(zstd(jsonl(TEXTS)))),
        ("c.jsonl.bz2", lambda p: p.write_bytes(bz2.compress(jsonl(TEXTS)))),
        (
            "c.json.gz",
            lambda p: p.write_bytes(
                gzip.compress(json.dumps([{"text": t} for t in TEXTS]).encode())
            ),
        ),
        ("c.parquet", lambda p: write_parquet(p, TEXTS)),
        ("c.csv", lambda p: write_csv(p, TEXTS)),
    ],
)
def test_every_format_is_read(tmp_path: Path, name: str, write: Callable) -> None:
    write(tmp_path / name)
    assert read(str(tmp_path / name)) == TEXTS
    assert sources.find(str(tmp_path / name)).name in ("c", "lines")


def test_folder_and_glob_with_several_formats(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# A\n\ntext")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.jsonl").write_bytes(jsonl(["c1", "c2"]))
    (tmp_path / "d.png").write_bytes(b"no text")
    assert read(str(tmp_path)) == ["# A\n\ntext", "b", "c1", "c2"]
    assert read(str(tmp_path / "*.txt")) == ["b"]
    assert read(str(tmp_path / "**" / "*.jsonl")) == ["c1", "c2"]
    assert [s.name for s in sources.find(str(tmp_path)).shards] == ["a.md", "b.txt", "sub/c.jsonl"]


def test_text_in_another_column(tmp_path: Path) -> None:
    write_parquet(tmp_path / "c.parquet", TEXTS, "body")
    assert read(str(tmp_path / "c.parquet"), "body") == TEXTS
    with pytest.raises(DataError, match=r"no column 'text'(?s:.*)id, body(?s:.*)TEXT_COLUMN"):
        read(str(tmp_path / "c.parquet"))
    (tmp_path / "c.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="no column 'text'"):
        read(str(tmp_path / "c.csv"))


def test_docstrings_of_packages() -> None:
    assert len(read("package:papermill")) > 5
    both = sources.find("package:papermill,nbformat")
    assert both.name == "papermill_nbformat_docs" and len(both.shards) == 2


def test_hugging_face_dataset_is_streamed(tmp_path: Path) -> None:
    """A local folder replaces the hub: the call and the streaming are the same."""
    (tmp_path / "ds").mkdir()
    (tmp_path / "ds" / "train.jsonl").write_bytes(jsonl(TEXTS))
    assert read(f"hf:{tmp_path}/ds", most=7) == TEXTS[:7]
    with pytest.raises(DataError, match="cannot be read"):
        read("hf:no-such-owner/no-such-dataset")


def test_error_names_the_problem_of_a_damaged_file(tmp_path: Path) -> None:
    good = gzip.compress(jsonl(TEXTS * 200))
    (tmp_path / "cut.jsonl.gz").write_bytes(good[: len(good) // 2])
    assert "the compressed file ends in the middle" in problems(str(tmp_path / "cut.jsonl.gz"))[-1]
    packed = zstd(jsonl([f"{i} {t}" for i, t in enumerate(TEXTS * 200)]))
    (tmp_path / "cut.jsonl.zst").write_bytes(packed[: len(packed) // 2])
    assert "the compressed file ends in the middle" in problems(str(tmp_path / "cut.jsonl.zst"))[-1]
    (tmp_path / "two.jsonl.zst").write_bytes(zstd(jsonl(["a"])) + zstd(jsonl(["b"])))
    assert read(str(tmp_path / "two.jsonl.zst")) == ["a", "b"]
    (tmp_path / "not.jsonl.gz").write_bytes(jsonl(TEXTS))
    assert "the file is damaged" in problems(str(tmp_path / "not.jsonl.gz"))[0]
    (tmp_path / "loose.csv").write_text("id,text\n1,Hello 1, world\n2,good\n")
    assert "more fields than the header's 2" in problems(str(tmp_path / "loose.csv"))[0]
    (tmp_path / "open.csv").write_text('id,text\n1,"never closed\n2,good\n')
    assert "not CSV" in problems(str(tmp_path / "open.csv"))[-1]
    with pytest.raises(DataError, match="ends in the middle"):  # whatever is tolerated
        corpora.prepare(str(tmp_path / "cut.jsonl.gz"), tmp_path / "s", tolerate=0.5)
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    assert "not Parquet" in problems(str(tmp_path / "cut.parquet"))[0]
    (tmp_path / "cut.json").write_text('[{"text": "a"}, {"text": "b')
    assert "cut.json:item 2: not JSON" in problems(str(tmp_path / "cut.json"))[0]
    (tmp_path / "latin.csv").write_bytes("id,text\n1,Käse\n2,good\n".encode("latin-1"))
    assert "latin.csv:2: not UTF-8 (0xe4" in problems(str(tmp_path / "latin.csv"))[0]
    (tmp_path / "latin.txt").write_bytes("Käse".encode("latin-1"))
    assert "latin.txt: not UTF-8" in problems(str(tmp_path / "latin.txt"))[0]


def test_byte_order_marks_and_an_object_over_several_lines(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    (tmp_path / "m.jsonl").write_bytes(mark + jsonl(["a", "b"]))
    (tmp_path / "m.json").write_bytes(
        mark + json.dumps([{"text": "a"}, {"text": "b"}], indent=2).encode()
    )
    (tmp_path / "one.json").write_text(json.dumps({"text": "alone"}, indent=2))
    assert read(str(tmp_path / "m.jsonl")) == read(str(tmp_path / "m.json")) == ["a", "b"]
    assert read(str(tmp_path / "one.json")) == ["alone"]


def test_long_line_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    with path.open("wb") as file:
        file.write(jsonl(["before"]) + b'{"text": "')
        for _ in range(50):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n' + jsonl(["after"]))
    found = problems(str(path))
    assert found == ["long.jsonl:2: longer than 10,000,000 bytes (50,000,013)"]
    shard = sources.find(str(path)).shards[0]
    assert [r.line for r in shard.read() if r.line][-1] == jsonl(["after"])


def test_shards_that_were_read_are_not_read_again(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for n in range(3):
        (folder / f"{n}.jsonl").write_bytes(jsonl([f"shard {n} text {i}" for i in range(30)]))
    (folder / "1.jsonl").write_bytes(b"")  # an empty file among others
    (folder / "3.jsonl").write_bytes(jsonl(["x"]) + '{"text": "Käse"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"3\.jsonl:2: not UTF-8"):
        corpora.prepare(str(folder), tmp_path)
    (folder / "3.jsonl").write_bytes(jsonl(["fixed"]))
    done: list[str] = []
    work = ingest.read_shard
    monkeypatch.setattr(
        ingest, "read_shard", lambda shard, *a, **k: done.append(shard.name) or work(shard, *a, **k)
    )
    found = corpora.prepare(str(folder), tmp_path)
    assert done == ["3.jsonl"]
    assert found.records == 61
    corpora.prepare(str(folder), tmp_path)
    assert done == ["3.jsonl"], "nothing was read again"


def test_unreadable_folder_is_refused(tmp_path: Path) -> None:
    """Runs as another user, since root can read everything."""
    folder = tmp_path / "closed"
    (folder / "sub").mkdir(parents=True)
    (folder / "c.jsonl").write_bytes(jsonl(TEXTS))
    (folder / "sub" / "d.jsonl").write_bytes(jsonl(TEXTS))
    (folder / "sub").chmod(0)
    child = os.fork()
    if not child:  # the child must not run pytest's code
        code = 1
        try:
            if os.geteuid() == 0:
                for parent in (tmp_path, *list(tmp_path.parents)[:2]):
                    parent.chmod(0o755)
                os.setuid(65534)
            sources._require_readable(folder, str(folder))
        except DataError as error:
            message = str(error)
            named = "no permission to read the folder" in message and "sub" in message
            code = 0 if named else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    (folder / "sub").chmod(0o755)


def test_only_regular_files_are_opened(tmp_path: Path, monkeypatch) -> None:
    """Opening a pipe without a writer blocks forever."""
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.jsonl").write_bytes(jsonl(TEXTS))
    os.mkfifo(folder / "sub" / "pipe.jsonl")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link.txt").symlink_to(tmp_path / "pipe")
    (tmp_path / "nothing.txt").symlink_to(tmp_path / "gone")
    (tmp_path / "folder.jsonl").mkdir()
    for corpus, problem in [
        (tmp_path / "pipe", "pipe is a named pipe"),
        (f"file://{tmp_path}/pipe", "pipe is a named pipe"),
        (tmp_path / "link.txt", "link.txt is a named pipe"),
        (tmp_path / "nothing.txt", "nothing.txt is a broken link"),
        (folder, "pipe.jsonl is a named pipe"),
        (folder / "**" / "*.jsonl", "pipe.jsonl is a named pipe"),
        (f"hf:{folder}", "pipe.jsonl is a named pipe"),
        (tmp_path / "*.jsonl", "folder.jsonl is a folder"),
        ("/dev/zero", "zero is a device"),
    ]:
        with pytest.raises(DataError, match=f"{problem}, not a regular file"):
            sources.find(str(corpus))
    with socket.socket(socket.AF_UNIX) as bound:
        monkeypatch.chdir(tmp_path)  # the path of a socket may have 107 bytes
        bound.bind("s.jsonl")
        with pytest.raises(DataError, match=r"s\.jsonl is a socket"):
            sources.find(str(tmp_path / "s.jsonl"))
    os.mkfifo(folder / "picture.png")  # skipped by its name, and never opened
    (folder / "sub" / "pipe.jsonl").unlink()
    assert read(str(folder)) == TEXTS


ENCODINGS = ("utf-16", "utf-32", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", ["c.jsonl", "c.json", "c.csv", "c.tsv", "c.txt", "c.jsonl.gz"])
def test_other_encoding_gives_one_error(tmp_path: Path, name: str, encoding: str) -> None:
    """With a byte-order mark, or without one where the text begins in ASCII."""
    content = ("text\n" if name[2] in "ct" else "") + jsonl(TEXTS * 10).decode()
    data_of = content.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data_of) if name.endswith(".gz") else data_of)
    code = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
    with pytest.raises(DataError) as refused:  # whatever is tolerated
        corpora.prepare(str(tmp_path / name), tmp_path / "s", tolerate=0.9)
    message = str(refused.value)
    assert f"encoded as {code}, not as UTF-8\n  where:    {tmp_path / name}\n" in message
    assert f"iconv -f {code} -t UTF-8" in message and "not JSON" not in message
    assert len(message.splitlines()) == 5


def test_zero_bytes_are_not_taken_for_utf16(tmp_path: Path) -> None:
    (tmp_path / "zeros.txt").write_bytes(bytes(100))
    (tmp_path / "one.txt").write_bytes(b"\0abc")
    assert "a NUL byte at character 1" in problems(str(tmp_path / "one.txt"))[0]
    assert problems(str(tmp_path / "zeros.txt")) == ["zeros.txt: a NUL byte at character 1"]


@pytest.fixture
def stalled() -> Iterator[Callable[[bytes], str]]:
    """A server on loopback that sends an answer and then stalls; returns its address."""
    with contextlib.ExitStack() as stack:
        kept: list[socket.socket] = []

        def start(answer: bytes) -> str:
            server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

            def serve() -> None:
                with contextlib.suppress(OSError):  # closed: the test is over
                    while True:
                        kept.append(stack.enter_context(server.accept()[0]))
                        kept[-1].recv(65536)
                        kept[-1].sendall(answer)

            threading.Thread(target=serve, daemon=True).start()
            return f"http://127.0.0.1:{server.getsockname()[1]}"

        yield start


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: 10000000\r\nAccept-Ranges: bytes\r\n\r\n"


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("c.jsonl", b""),
        ("c.jsonl", LENGTH[:40]),
        ("c.jsonl", LENGTH + jsonl(TEXTS * 50)),
        ("c.jsonl", CHUNKED + b"e\r\n" + jsonl(["a"]) + b"\r\n"),
        ("c.jsonl.gz", LENGTH + gzip.compress(jsonl(TEXTS))[:90]),
        ("c.txt", LENGTH + b"text"),
        ("c.parquet", LENGTH),
    ],
)
def test_stalled_server_gives_an_error(
    name: str, answer: bytes, stalled: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server stalls before its answer, in its header, or in its body."""
    monkeypatch.setattr(formats, "TIMEOUT", 1.0)
    since = time.monotonic()
    with pytest.raises(DataError, match="cannot be read: the server stopped sending data"):
        read(f"{stalled(answer)}/{name}")
    assert time.monotonic() - since < 10


def test_stalled_bucket_gives_an_error(stalled: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time-out of ``s3fs`` is five times 15 s; the test shortens it."""
    import s3fs

    monkeypatch.setattr(s3fs.S3FileSystem, "read_timeout", 1)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", stalled(LENGTH.replace(b"200 OK", b"206 OK")))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    opened = s3fs.S3FileSystem(skip_instance_cache=True).open("b/c.txt", size=100)
    with pytest.raises(DataError, match="the server stopped sending data"):
        list(formats.read_file(_Opened(opened), "b/c.txt", "text", "s3://b/c.txt", web=False))


class _Opened:
    """A file system with one open file."""

    def __init__(self, file: object) -> None:
        self.file = file

    def open(self, name: str, mode: str) -> object:
        return self.file


def test_error_names_the_missing_package_of_an_object_storage() -> None:
    with pytest.raises(DataError, match=r"gs:// needs another package(?s:.*)gcsfs==2025\.3\.0"):
        sources.find("gs://bucket/c.jsonl")
