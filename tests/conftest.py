"""What the tests share: a storage, a tiny random Gemma-3, a small corpus of real text."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from nodes import free_port

from cpt_helpers import recipes
from cpt_helpers.setup import assets

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["CXX"] = "/bin/false"  # a bare machine has no compiler: nothing may need one
os.environ.pop("CPT_STORAGE", None)


def write_jsonl(path: Path, documents: list[str]) -> None:
    """Writes documents as JSON Lines with one ``text`` field each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
    path.write_text("".join(lines), "utf-8")


@pytest.fixture(scope="session")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One storage for the whole session, so that models and corpora are made once."""
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """Real text from a package that is installed anyway."""
    return assets.docstrings("ray")[:400]


@pytest.fixture(scope="session")
def corpus(storage: Path, documents: list[str]) -> Path:
    """Those documents as a user's JSON Lines file."""
    path = storage / "files" / "handbook.jsonl"
    write_jsonl(path, documents)
    return path


@pytest.fixture(scope="session")
def tiny_gemma3(storage: Path, documents: list[str]) -> Path:
    """A random Gemma-3 of about 100 thousand parameters with a tokenizer of its own."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

    folder = storage / "files" / "tiny-gemma3"
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        documents,
        trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=alphabet),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=32,
            sliding_window_pattern=2,
            max_position_embeddings=512,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def train_tiny(storage: Path, corpus: Path, tiny_gemma3: Path):
    """Trains the tiny model for a few steps by a CPU recipe, once: ``train_tiny("lora")``."""
    from cpt_helpers import pipeline
    from cpt_helpers.run import Run
    from cpt_helpers.train import launch

    def train(kind: str, corpus: str = str(corpus), name: str = "") -> Run:
        run = Run.open(name or f"tiny-{kind}", storage)
        if run.state != "complete":
            recipe = "cpt_cpu.yaml" if kind == "full" else f"cpt_cpu_{kind}.yaml"
            layers = {"freeze_trainable_layers": 1} if kind == "freeze" else {}
            few = {"cutoff_len": 64, "max_steps": 8, "save_steps": 8, "eval_steps": 8}
            few["per_device_train_batch_size"] = 2
            model = {"model_name_or_path": str(tiny_gemma3), "learning_rate": 5e-3}
            other = {"report_to": "none", "bf16": False}
            pipeline.configure(run, recipe, corpus, model | layers | few | other)
            launch.train(run, recipes.load(run))
        return run

    return train


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """MLflow's own server, with SQLite; it accepts any user and password."""
    home = tmp_path_factory.mktemp("mlflow-server")
    port = free_port()
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
        "--backend-store-uri", f"sqlite:///{home}/mlflow.db",
        "--artifacts-destination", str(home / "artifacts"), "--workers", "1",
    ]  # fmt: skip
    log = (home / "log").open("wb")
    process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    uri = f"http://127.0.0.1:{port}"
    for _ in range(240):
        try:
            urllib.request.urlopen(f"{uri}/health", timeout=1).close()
            break
        except OSError:
            time.sleep(0.5)
    yield uri
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(timeout=30)


def python(code: str, **environment: str) -> dict:
    """Runs Python by itself and reads the JSON of its last line of output."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])
