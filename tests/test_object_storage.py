"""A corpus in a bucket: read through s3fs from moto's local S3 server."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpt_helpers.data import corpora
from cpt_helpers.errors import DataError

# moto's server needs another antlr4 than LLaMA-Factory's omegaconf, so it has its own environment.
SERVER = ("moto[server]==5.1.9",)


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """moto's server on loopback."""
    home = tmp_path_factory.mktemp("moto")
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    links = os.environ.get("PIP_FIND_LINKS")
    found = ["--find-links", links] if links else []
    subprocess.run([uv, "venv", "-q", "--python", sys.executable, home / "v"], check=True)
    install = [uv, "pip", "install", "-q", "--python", home / "v" / "bin" / "python", *found]
    subprocess.run([*install, *SERVER], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [home / "v" / "bin" / "moto_server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(200):
            try:
                urllib.request.urlopen(f"{url}/moto-api/", timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    fs = s3fs.S3FileSystem()
    if not fs.exists("corpora"):
        fs.mkdir("corpora")
    for number in range(3):
        lines = "".join(json.dumps({"text": f"shard {number} text {i}"}) + "\n" for i in range(40))
        with fs.open(f"corpora/web/{number}.jsonl.gz", "wb") as file:
            file.write(gzip.compress(lines.encode()))
    return "s3://corpora/web"


def test_corpus_in_a_bucket(bucket: str, tmp_path: Path) -> None:
    found = corpora.prepare(bucket, tmp_path, fraction=0.1)
    assert found.name == "web" and found.records == 120
    assert found.key, "its marks show when it changes"
    one = corpora.prepare(f"{bucket}/1.jsonl.gz", tmp_path, fraction=0.2)
    assert one.records == 40
    several = corpora.prepare(f"{bucket}/[01].jsonl.gz", tmp_path / "b", fraction=0.2)
    assert several.records == 80


def test_missing_file_or_bucket_is_refused(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist|no file with text"):
        corpora.prepare("s3://corpora/nothing.jsonl", tmp_path)
    with pytest.raises(DataError, match=r"does not exist|cannot be read|no file with text"):
        corpora.prepare("s3://no-such-bucket/c.jsonl", tmp_path)
