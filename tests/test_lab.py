"""What a session in JupyterLab leaves behind: nothing in the checkout, no model in memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
import websocket
from nodes import free_port

from cpt_helpers import lab as jupyterlab
from cpt_helpers.run import PROJECT, STEPS

LIVE_MODELS = """
import gc, transformers
models = [o for o in gc.get_objects() if issubclass(type(o), transformers.PreTrainedModel)]
print("live models:", len(models))
"""


def git(checkout: Path, *arguments: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
    done = subprocess.run(
        ["git", *who, *arguments], cwd=checkout, capture_output=True, text=True, check=True
    )
    assert not done.stderr, done.stderr
    return done.stdout


@contextmanager
def connected(address: str, kernel: str) -> Iterator[Callable[[str], list]]:
    """A kernel of the server, as the browser speaks to it: runs a cell, returns its outputs."""
    channel = websocket.create_connection(
        f"ws://{address}/api/kernels/{kernel}/channels", header=["Authorization: token t"]
    )

    def run(code: str) -> list:
        own, outputs = uuid.uuid4().hex, []
        header = {"msg_id": own, "session": "t", "username": "t", "version": "5.3"}
        request = {"header": header | {"msg_type": "execute_request"}, "channel": "shell"}
        request |= {"parent_header": {}, "metadata": {}, "content": {"code": code}}
        channel.send(json.dumps(request))
        while True:
            message = json.loads(channel.recv())
            kind, content = message["header"]["msg_type"], message["content"]
            if message["parent_header"].get("msg_id") != own:
                continue
            assert kind != "error", content
            if kind in ("stream", "display_data", "execute_result"):
                outputs.append(nbformat.v4.output_from_msg(message))
            if kind == "status" and content["execution_state"] == "idle":
                return outputs

    yield run
    channel.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The project under git, elsewhere, and a JupyterLab started there; its address."""
    home = tmp_path_factory.mktemp("lab")
    folder, storage, port = home / "checkout", home / "storage", free_port()
    others = shutil.ignore_patterns(
        ".git", ".venv", "cluster_storage", "mlruns", "__pycache__", ".*_cache", "*.egg-info"
    )
    shutil.copytree(PROJECT, folder, ignore=others)
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "as published")
    command = [sys.executable, "-m", "cpt_helpers", "lab", "--storage", str(storage)]
    command += ["--", "--no-browser"]
    command += [f"--ServerApp.port={port}", "--IdentityProvider.token=t", "--allow-root"]
    own = {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    log = (home / "log").open("wb")
    process = subprocess.Popen(
        command, cwd=folder, env=os.environ | own, stdout=log, stderr=log, start_new_session=True
    )
    try:
        yield folder, f"127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


def ask(address: str, path: str, body: dict | None = None, method: str | None = None) -> dict:
    """Asks the server, which may be starting."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": "token t", "Content-Type": "application/json"}
    request = urllib.request.Request(f"http://{address}{path}", data, headers, method=method)
    for _ in range(120):
        try:
            return json.loads(urllib.request.urlopen(request, timeout=30).read() or b"{}")
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{error} {path}: {error.read()[:300]!r}") from None
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"JupyterLab does not answer at {address}")


def test_run_all_leaves_the_checkout_clean(lab: tuple[Path, str]) -> None:
    """Opened, run by the server's own kernel and saved, as the browser does."""
    checkout, address = lab
    where = "/api/contents/lab/01_setup.ipynb"
    notebook = nbformat.from_dict(ask(address, where)["content"])
    kernel = ask(address, "/api/sessions", {
        "path": "lab/01_setup.ipynb", "type": "notebook", "name": "", "kernel": {"name": "python3"}
    })["kernel"]["id"]  # fmt: skip
    with connected(address, kernel) as run:
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = run(cell.source)
        said = "".join(output.text for output in run(LIVE_MODELS))
    assert said == "live models: 0\n", "step 4 needs the GPU memory that a model is left in"
    ask(address, where, {"type": "notebook", "content": notebook}, "PUT")
    saved = checkout.parent / "storage" / "lab" / "01_setup.ipynb"
    assert "✓ documents have a separator" in saved.read_text("utf-8")
    assert (checkout.parent / "storage" / "cpt-cpu" / "results.json").is_file()
    assert git(checkout, "status", "--porcelain", "--ignored") == ""


def test_a_copy_keeps_its_edits_until_its_source_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project = tmp_path / "project"
    shutil.copytree(PROJECT / "notebooks", project / "notebooks")
    monkeypatch.setattr(jupyterlab, "PROJECT", project)
    folder = jupyterlab.working_copies(tmp_path / "storage")
    assert sorted(path.stem for path in folder.glob("*.ipynb")) == list(STEPS)
    (folder / "02_data.ipynb").write_text("mine")
    jupyterlab.working_copies(tmp_path / "storage")
    assert (folder / "02_data.ipynb").read_text() == "mine"
    (project / "notebooks" / "02_data.ipynb").write_text("pulled")
    jupyterlab.working_copies(tmp_path / "storage")
    assert (folder / "02_data.ipynb").read_text() == "pulled"
    (older,) = folder.glob("02_data.*-*.ipynb")
    assert older.read_text() == "mine" and older.name in capsys.readouterr().out
