"""MLflow tracking; credentials appear in no output, file or message."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from nodes import free_port

from cpt_helpers import pipeline
from cpt_helpers.data import sources
from cpt_helpers.errors import CptError, DataError, ParameterError, TrackingError
from cpt_helpers.export import model_registry
from cpt_helpers.notebook import defining_parameters
from cpt_helpers.recipes import Recipe
from cpt_helpers.redact import redact
from cpt_helpers.run import Run
from cpt_helpers.setup import tracking_store
from cpt_helpers.train import tracking

CANARY = "canary-inside-a-uri"
ARGS = Recipe(
    report_to="mlflow",
    model_name_or_path="/models/base",
    dataset="handbook",
    eval_dataset="handbook_heldout",
)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """The files of a finished run."""
    run = Run("tracked", tmp_path)
    events = [
        {"event": "start", "step": 0, "max_steps": 2, "tokens_per_step": 8},
        {"event": "step", "step": 1, "loss": 3.5, "learning_rate": 1e-4, "seconds": 0.5},
        {"event": "step", "step": 2, "loss": 3.1, "learning_rate": 1e-5, "seconds": 0.5},
        {"event": "end", "step": 2},
    ]
    run.config_dir.mkdir(parents=True)
    run.train_yaml.write_text("max_steps: 2\n")
    lines = [json.dumps(event | {"time": time.time()}) + "\n" for event in events]
    run.metrics.write_text("".join(lines))
    run.export.mkdir()
    (run.export / "model.safetensors").write_bytes(b"weights")
    return run


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://someone:canary@host:5000/x", "https://***@host:5000/x"),
        ("https://canary@host/x", "https://***@host/x"),
        ("https://someone:c%40nary@host", "https://***@host"),
        ("postgresql://someone:canary@db/mlflow", "postgresql://***@db/mlflow"),
        ("postgresql://db/mlflow?user=me&password=canary&x=1", None),
        ("Invalid URL 'https://a:canary@h/x', and http://b:canary@i", None),
        ("https://bucket/x.jsonl?X-Amz-Signature=canary", None),
        ("a token hf_canary0123456789 in a text", "a token *** in a text"),
        (
            "no tokens: hf_hub_token, hf_transfer==0.1.9",
            "no tokens: hf_hub_token, hf_transfer==0.1.9",
        ),
        ("sqlite:////mnt/storage/a@b/mlflow.db", "sqlite:////mnt/storage/a@b/mlflow.db"),
        ("s3://bucket/a@b.jsonl, me@example.com", "s3://bucket/a@b.jsonl, me@example.com"),
    ],
)
def test_credentials_are_hidden_and_other_text_is_not(text: str, expected: str | None) -> None:
    hidden = redact(text)
    assert "canary" not in hidden and "c%40nary" not in hidden
    assert hidden == expected or (expected is None and "***" in hidden)
    assert redact(hidden) == hidden, "redacting twice changes nothing"


def test_error_messages_hide_credentials() -> None:
    uri = f"https://someone:{CANARY}@host"
    error = CptError(f"no answer from {uri}", where=uri, expected=uri, do=f"ask {uri}")
    parts = (str(error), error.what, error.where, error.expected, error.do)
    assert not any(CANARY in part for part in (*parts, *error._render_traceback_()))
    assert all("https://***@host" in part for part in parts)


def test_a_parameter_with_credentials_is_an_error() -> None:
    with pytest.raises(ParameterError, match="CORPUS holds a token") as refused:
        defining_parameters({"CORPUS": f"https://someone:{CANARY}@host/corpus.jsonl"})
    assert CANARY not in str(refused.value)
    with pytest.raises(DataError, match=r"holds credentials(?s:.*)https://\*\*\*@host") as refused:
        sources.find(f"https://someone:{CANARY}@host/corpus.jsonl")  # as `train --corpus` does
    assert CANARY not in str(refused.value)
    harmless = {"CORPUS": "s3://bucket/a@b.jsonl"}
    assert defining_parameters(harmless) == harmless


@pytest.mark.parametrize(
    "uri",
    [
        "http://someone:{}@127.0.0.1:{port}",
        "http://{}@127.0.0.1:{port}",
        "postgresql://someone:{}@127.0.0.1/mlflow",
        "postgresql://127.0.0.1/mlflow?password={}",
        "htp://someone:{}@host",
    ],
)
def test_a_store_that_does_not_answer_is_an_error(
    run: Run, uri: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    uri = uri.format(CANARY, port=free_port())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    calls = [
        lambda: tracking.prepare_tracking(run, ARGS),
        lambda: tracking.tracked_run(run, ARGS),
        lambda: tracking.add_export(run, ARGS, {"path": str(run.export)}),
        lambda: model_registry.registered(uri, "tiny"),
    ]
    for call in calls:
        with pytest.raises(TrackingError, match=r"does not answer(?s:.*)://") as refused:
            call()
        assert CANARY not in str(refused.value)
    printed = capfd.readouterr()
    assert CANARY not in printed.out + printed.err


@pytest.mark.parametrize(
    "uri",
    [
        "https://someone:first#second@host",
        "https://someone:first/second@host",
        "https://someone:first@second@host",
        "https://someone:1/second@host",
        "mysql+pymysql://someone:first-second@host:port/mlflow",
    ],
)
def test_a_password_that_is_not_encoded_is_not_shown(
    run: Run, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for call in (
        lambda: tracking.prepare_tracking(run, ARGS),
        lambda: tracking_store.ask(run, ARGS, 1),
    ):
        with pytest.raises(TrackingError, match="not a valid URI") as refused:
            call()
        assert not any(part in str(refused.value) for part in ("someone", "first", "second"))


def test_a_server_uri_with_a_password(
    run: Run, mlflow_server: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """Tracks and registers a run on a real server; the URI has a user and a password."""
    import mlflow

    uri = mlflow_server.replace("://", f"://someone:{CANARY}@")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert "127.0.0.1" in (answer := tracking_store.ask(run, ARGS, 8.0))
    shown = tracking.prepare_tracking(run, ARGS)
    assert shown == mlflow_server.replace("://", "://***@")
    tracking.catch_up(run, ARGS)
    exported = {"path": str(run.export), "perplexity": {"domain": 12.5}}
    tracking.add_export(run, ARGS, exported)
    assert model_registry.register(run, ARGS, exported) == 1
    found = tracking.tracked_run(run, ARGS)
    assert found.status == "FINISHED" and found.metrics["loss"] == 3.1

    train = {"tokens": 16, "steps": 2, "tokens_per_second": 16.0, "seconds": 1.0}
    timed = {"04_train": {"seconds": 1.0}}
    old = {"train": train, "export": exported, "notebooks": timed, "tracking": uri}
    run.record("04_train", old | {"tracking": shown})
    table = pipeline.summary_table(run)
    assert mlflow_server.split("://")[1] in table
    kept = [path for path in run.storage.rglob("*") if path.is_file()]
    assert kept and not [path for path in kept if CANARY.encode() in path.read_bytes()]

    run.record("04_train", old)  # as written by an older release, which did not hide it
    table += pipeline.summary_table(run)
    printed = capfd.readouterr()
    assert CANARY not in answer + table + printed.out + printed.err
    client = mlflow.MlflowClient(mlflow_server)
    entry = client.get_run(found.id).to_dictionary()
    assert entry["data"]["tags"]["cpt.export"] == str(run.export)
    assert CANARY not in json.dumps(entry)


def test_a_server_that_stops_during_a_training(
    run: Run, mlflow_server: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """The terminal quotes MLflow's own message, which holds the URI."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    mirror = tracking._Mirror(run, ARGS, tracking_store.client_of(mlflow_server), "Default")
    dead = f"http://someone:{CANARY}@127.0.0.1:{free_port()}"
    mirror.client = tracking_store.client_of(dead)
    mirror.send()
    mirror.close()
    printed = capfd.readouterr()
    assert "does not accept metrics now" in printed.err and "could not be closed" in printed.err
    assert CANARY not in printed.out + printed.err


def test_each_storage_has_its_own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow sets MLFLOW_TRACKING_URI itself; that is not the user's choice."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("one", "other"):
        run = Run("tracked", tmp_path / name)
        assert tracking.prepare_tracking(run, ARGS) == f"sqlite:///{run.mlflow_db}"
