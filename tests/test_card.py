"""The model card's licence: the base model's, from wherever it is named."""

from __future__ import annotations

import importlib.metadata
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from conftest import python

from cpt_helpers.export import model_card
from cpt_helpers.run import Run

UNKNOWN = "licence of the base model is not known"
APACHE = importlib.metadata.distribution("transformers").read_text("LICENSE")


def written(tmp_path: Path, base: str) -> tuple[dict, str, Path]:
    """The front matter, the text and the folder of an export of a model with this base."""
    run, folder = Run.open("licensed", tmp_path / "storage"), tmp_path / "export"
    run.config_dir.mkdir(parents=True, exist_ok=True)
    run.train_yaml.write_text(yaml.safe_dump({"model_name_or_path": base, "dataset": "news"}))
    folder.mkdir(exist_ok=True)
    (folder / "export.json").write_text(json.dumps({"form": "merged"}))
    text = model_card.write(run, folder, {"step": 1, "dtype": "float32"}).read_text("utf-8")
    return yaml.safe_load(text.split("---")[1]), text, folder


def test_an_embedded_model(tmp_path: Path) -> None:
    base = tmp_path / "storage" / "models" / "SmolLM2-135M-Instruct"
    matter, text, _ = written(tmp_path, str(base))
    assert matter["license"] == "apache-2.0"
    assert "The licence of the base model, apache-2.0, applies to this model too." in text


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"README.md": "---\nlicense: gemma\n---\n# It"}, {"license": "gemma"}),
        ({"README.md": '---\ntags: [x]\nlicense: "mit"\n---\n'}, {"license": "mit"}),
        (
            {
                "README.md": "---\nlicense: other\nlicense_name: tl\nlicense_link: LICENSE\n---\n",
                "LICENSE": "The Terms",
                "NOTICE": "By them",
            },
            {"license": "other", "license_name": "tl", "license_link": "LICENSE"},
        ),
        ({"README.md": "# It\nlicense: mit", "LICENSE.txt": APACHE}, {"license": "apache-2.0"}),
        (
            {"LICENSE": "The Terms of Use of It"},
            {"license": "other", "license_name": "license-file", "license_link": "LICENSE"},
        ),
        ({"README.md": "---\nlicense: [\n---\n"}, {}),
        ({"README.md": "# It"}, {}),
        ({}, {}),
    ],
)
def test_a_folder_with_a_card_or_a_licence_file(
    tmp_path: Path, files: dict[str, str], said: dict[str, str]
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for name, text in files.items():
        (base / name).write_text(text)
    matter, text, export = written(tmp_path, str(base))
    assert {key: value for key, value in matter.items() if key.startswith("license")} == said
    assert (UNKNOWN in text) == (not said)
    for name in files.keys() - {"README.md"}:
        assert (export / name).read_text() == files[name], "the licence's text is copied"


class Hub(BaseHTTPRequestHandler):
    """The hub's answer for a model whose card names its licence."""

    def do_GET(self) -> None:
        known = self.path.startswith("/api/models/open/model")
        body = json.dumps({"id": "open/model", "cardData": {"license": "gemma"}} if known else {})
        self.send_response(200 if known else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize(
    ("name", "offline", "said"),
    [
        ("open/model", "0", {"license": "gemma"}),
        ("no/model", "0", {}),
        ("open/model", "1", {}),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "1", {"license": "apache-2.0"}),
    ],
)
def test_a_model_of_the_hub(hub: str, tmp_path: Path, name: str, offline: str, said: dict) -> None:
    code = "import json; from cpt_helpers.export.model_card import _license as of; "
    code += f"print(json.dumps(of({name!r})))"
    own = {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": offline, "HF_HOME": str(tmp_path)}
    assert python(code, **own) == said
