"""Corpora: invalid records, held-out halves, names and the registry."""

from __future__ import annotations

import http.server
import json
import threading
from pathlib import Path

import pytest

from cpt_helpers.data import corpora
from cpt_helpers.errors import AssetError, DataError

GOOD = b'{"text": "a document"}'


def write(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "cut', "not JSON"),
        (b"no json at all", "not JSON"),
        (b'{"content": "x"}', "no `text` (its keys: content)"),
        (b'["x"]', "no `text` (not an object)"),
        (b'{"text": ""}', "`text` is empty"),
        (b'{"text": "  \\n "}', "`text` is empty"),
        (b'{"text": 7}', "`text` is int, not a string"),
        (b'{"text": null}', "`text` is NoneType, not a string"),
        ('{"text": "Käse"}'.encode("latin-1"), "not UTF-8 (byte 12 of the line is 0xe4)"),
        (b'{"text": "a\\u0000b"}', "a NUL byte at character 2"),
        (b'{"text": "a \\ud800"}', "a lone surrogate, U+D800, at character 3"),
        (b"[" * 5000, "not JSON"),
        (b'{"text": "' + b"x" * 10_000_001 + b'"}', "longer than 10,000,000 bytes (10,000,014)"),
    ],
)
def test_error_names_the_number_of_an_invalid_line(
    tmp_path: Path, line: bytes, problem: str
) -> None:
    path = write(tmp_path / "c.jsonl", GOOD, GOOD, line, GOOD)
    with pytest.raises(DataError) as refused:
        corpora.prepare(str(path), tmp_path)
    assert f"c.jsonl:3: {problem}" in str(refused.value)
    assert "1 of 4 records are invalid" in str(refused.value)
    assert not (tmp_path / "corpora" / "c").exists() and not (tmp_path / corpora.REGISTRY).exists()


def test_error_counts_many_invalid_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", *[b"{"] * 8, GOOD)
    with pytest.raises(DataError, match=r"(?s)8 of 9 records.*c\.jsonl:5.*and 3 more") as refused:
        corpora.prepare(str(path), tmp_path)
    assert "c.jsonl:6" not in str(refused.value)


def test_tolerated_records_are_kept_in_rejects(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document number {i}"}).encode() for i in range(96)]
    path = write(tmp_path / "c.jsonl", *lines[:50], b"{oops", b'{"text": 7}', *lines[50:])
    found = corpora.prepare(str(path), tmp_path, tolerate=0.03, fraction=0.2)
    assert (found.records, found.documents + found.heldout_documents) == (98, 96)
    assert found.rejected == {"not JSON": 1, "`text` is int": 1}
    rejects = [
        json.loads(line) for line in (found.folder / "rejects.jsonl").read_text().splitlines()
    ]
    assert [r["where"] for r in rejects] == ["c.jsonl:51", "c.jsonl:52"]
    assert rejects[0]["raw"] == "{oops"
    other = write(tmp_path / "d.jsonl", *lines, *[b"{"] * 9)
    with pytest.raises(DataError, match=r"9 of 105 records(?s:.*)more than the 3.0%"):
        corpora.prepare(str(other), tmp_path, tolerate=0.03)


@pytest.mark.parametrize("content", [b"", b"\n\n  \n"])
def test_empty_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.jsonl").write_bytes(content)
    with pytest.raises(DataError, match="the corpus is empty"):
        corpora.prepare(str(tmp_path / "c.jsonl"), tmp_path)


def test_missing_file_and_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        corpora.prepare(str(tmp_path / "nothere.jsonl"), tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="there is no file with text"):
        corpora.prepare(str(tmp_path / "folder"), tmp_path)


def test_error_for_unknown_name_suggests_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nearest known: ray_docs"):
        corpora.prepare("ray_doc", tmp_path)
    with pytest.raises(AssetError, match="'nosuchpackage' is not installed"):
        corpora.prepare("package:nosuchpackage", tmp_path)


@pytest.fixture
def server(tmp_path: Path):
    """A web server on loopback over a folder with one good and one bad corpus."""
    folder = tmp_path / "served"
    folder.mkdir()
    write(folder / "good.jsonl", *[json.dumps({"text": f"text {i}"}).encode() for i in range(99)])
    write(folder / "bad.jsonl", GOOD, b"oops")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, directory=str(folder), **kwargs)

        def log_message(self, *args) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


def test_corpus_from_a_url(server: str, tmp_path: Path) -> None:
    found = corpora.prepare(f"{server}/good.jsonl", tmp_path, fraction=0.2)
    assert found.name == "good" and found.documents + found.heldout_documents == 99
    with pytest.raises(DataError, match=r"bad\.jsonl:2: not JSON"):
        corpora.prepare(f"{server}/bad.jsonl", tmp_path)
    with pytest.raises(DataError, match=r"cannot be read: HTTP 404"):
        corpora.prepare(f"{server}/missing.jsonl", tmp_path)


def test_unreachable_url_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read") as refused:
        corpora.prepare("http://127.0.0.1:9/c.jsonl", tmp_path)
    assert "http://127.0.0.1:9/c.jsonl" in str(refused.value)


def test_halves_are_stable_and_disjoint(corpus: Path, tmp_path: Path) -> None:
    first = corpora.prepare(str(corpus), tmp_path, fraction=0.1)
    train, heldout = (set(corpora.texts_of(half)) for half in (first.train, first.heldout))
    assert not train & heldout
    assert first.documents == len(train) and first.heldout_documents == len(heldout)
    assert 0.04 < len(heldout) / 400 < 0.18
    # More documents in another order: the same ones are held out.
    lines = corpus.read_text().splitlines()
    grown = tmp_path / "grown.jsonl"
    grown.write_text("\n".join(['{"text": "new"}', *reversed(lines)]) + "\n")
    again = corpora.prepare(str(grown), tmp_path, fraction=0.1)
    assert set(corpora.texts_of(again.heldout)) - {"new"} == heldout


def test_duplicates_are_kept_once(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"text {i % 30}"}).encode() for i in range(60)]
    found = corpora.prepare(str(write(tmp_path / "c.jsonl", *lines)), tmp_path, fraction=0.3)
    assert found.documents + found.heldout_documents == 30
    assert sum(found.dropped.values()) == 30


def test_too_few_documents_to_hold_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too few to hold out"):
        corpora.prepare(str(write(tmp_path / "c.jsonl", GOOD)), tmp_path)


def test_taken_name_is_refused(corpus: Path, tmp_path: Path) -> None:
    found = corpora.prepare(str(corpus), tmp_path)
    assert corpora.prepare(str(corpus), tmp_path) == found  # the same documents are no conflict
    (tmp_path / "other").mkdir()
    other = write(tmp_path / "other" / corpus.name, *[b'{"text": "%d"}' % i for i in range(99)])
    before = found.train.read_bytes()
    with pytest.raises(DataError, match="taken by other documents"):
        corpora.prepare(str(other), tmp_path)
    assert found.train.read_bytes() == before
    with pytest.raises(DataError, match="built-in corpus 'news'"):
        corpora.prepare(str(write(tmp_path / "news.jsonl", GOOD)), tmp_path)


def test_registry_keeps_other_datasets(corpus: Path, tmp_path: Path) -> None:
    mine = {"file_name": "mine.jsonl", "columns": {"prompt": "body"}}
    (tmp_path / corpora.REGISTRY).write_text(json.dumps({"mine": mine}))
    corpora.prepare(str(corpus), tmp_path)
    known = corpora.read_registry(tmp_path / corpora.REGISTRY)
    assert known["mine"] == mine
    assert known["handbook"]["file_name"] == "corpora/handbook/train.jsonl"
    assert set(known) == {"mine", "handbook", "handbook_heldout"}, "only what is on the storage"
    with pytest.raises(DataError, match="'mine' is taken"):
        corpora.register(tmp_path / corpora.REGISTRY, {"mine": {"file_name": "yours.jsonl"}})
    (tmp_path / corpora.REGISTRY).write_text("{")
    with pytest.raises(DataError, match="registry cannot be read"):
        corpora.prepare(str(corpus), tmp_path)
