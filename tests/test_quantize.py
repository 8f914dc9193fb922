"""Quantized forms of an exported model, loaded by plain transformers in a process of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import python

from cpt_helpers.data import corpora
from cpt_helpers.errors import AssetError, ExportError
from cpt_helpers.export import evaluation, huggingface, quantization
from cpt_helpers.export.quantization import NOTE, SCHEMES
from cpt_helpers.setup import models

pytestmark = pytest.mark.forms
BLOCK = 64
# How far logits may be from the full model's: the norm of the difference by that of the logits.
TOLERANCE = {"W8A16": 0.02, "W4A16": 0.25}

LOGITS = """
import json, sys, torch, transformers

ids = torch.tensor([list(range(10, 74))])
model = transformers.AutoModelForCausalLM.from_pretrained({folder!r}, torch_dtype="auto").eval()
tokenizer = transformers.AutoTokenizer.from_pretrained({folder!r})
with torch.no_grad():
    logits = model(input_ids=ids).logits[0].float()
    said = model.generate(ids[:, :8], max_new_tokens=4, do_sample=False)
assert not [name for name in sys.modules if name.startswith("llmcompressor")]
print(json.dumps({{"logits": logits.tolist(), "said": tokenizer.decode(said[0, 8:])}}))
"""


@pytest.fixture(scope="module")
def exported(train_tiny, storage: Path) -> Path:
    return huggingface.write_model(train_tiny("full").output, storage / "forms" / "export")


@pytest.fixture(scope="module")
def forms(exported: Path, documents: list[str]) -> dict[str, Path]:
    made = {}
    for scheme in SCHEMES:
        made[scheme] = exported.with_name(scheme)
        texts = documents if scheme == "W4A16" else None
        size = quantization.quantize(
            exported, made[scheme], scheme, texts, samples=32, block_size=BLOCK
        )
        assert size == quantization.size_of(made[scheme])
    return made


def logits_of(folder: Path):
    import torch

    return torch.tensor(python(LOGITS.format(folder=str(folder)))["logits"])


@pytest.mark.training
def test_they_say_what_the_full_model_says(exported: Path, forms: dict[str, Path]) -> None:
    full, off = logits_of(exported), {}
    for scheme, folder in forms.items():
        off[scheme] = ((logits_of(folder) - full).norm() / full.norm()).item()
        assert 0 < off[scheme] < TOLERANCE[scheme], off
    assert off["W8A16"] < off["W4A16"], "four bits say less than eight"


@pytest.mark.training
def test_perplexity_stays(
    exported: Path, forms: dict[str, Path], train_tiny, storage: Path, corpus: Path
) -> None:
    held_out = list(corpora.texts_of(corpora.load(corpus.stem, storage).heldout))
    found = {}
    for name, folder in {"full": exported, **forms}.items():
        model, tokenizer = models.load(folder)
        found[name] = evaluation.perplexity(model, tokenizer, held_out, BLOCK)
    assert found["W8A16"] == pytest.approx(found["full"], rel=0.01), found
    assert found["W4A16"] == pytest.approx(found["full"], rel=0.05), found


@pytest.mark.training
def test_the_folder_is_what_vllm_takes(exported: Path, forms: dict[str, Path]) -> None:
    sizes = {}
    for scheme, folder in forms.items():
        names = {path.name for path in folder.iterdir()}
        assert {"config.json", "tokenizer.json", "tokenizer_config.json", NOTE} <= names
        assert {n for n in names if n.endswith((".safetensors", ".bin", ".pt"))} == {
            "model.safetensors"
        }
        said = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert said["quant_method"] == "compressed-tensors"
        assert (said["format"], said["ignore"]) == ("pack-quantized", ["lm_head"])
        (group,) = said["config_groups"].values()
        assert group["input_activations"] is None
        weights = group["weights"]
        assert (weights["num_bits"], weights["type"]) == (int(scheme[1]), "int")
        assert weights["group_size"] == (64 if scheme == "W4A16" else None)
        sizes[scheme] = (folder / "model.safetensors").stat().st_size
    assert sizes["W4A16"] < sizes["W8A16"] < (exported / "model.safetensors").stat().st_size
    assert not list(exported.parent.glob(".*")), "nothing half-written stays"


@pytest.mark.training
def test_again(exported: Path, forms: dict[str, Path], documents: list[str]) -> None:
    folder = forms["W4A16"]
    before = (folder / "model.safetensors").stat()
    size = quantization.quantize(exported, folder, "W4A16", documents, samples=32, block_size=BLOCK)
    assert size == quantization.size_of(folder)
    assert (folder / "model.safetensors").stat() == before, "left alone"
    for scheme, texts in (("W8A16", None), ("W4A16", documents[50:])):
        with pytest.raises(ExportError, match="holds something else"):
            quantization.quantize(exported, folder, scheme, texts, samples=32, block_size=BLOCK)
    with pytest.raises(ExportError, match="quantized already"):
        quantization.quantize(folder, folder.with_name("twice"))


def test_what_cannot_be_quantized(tiny_gemma3: Path, tmp_path: Path) -> None:
    target = tmp_path / "q"
    with pytest.raises(ExportError, match=r"unknown scheme 'W4A8'\n.*W8A16, W4A16"):
        quantization.quantize(tiny_gemma3, target, "W4A8")
    with pytest.raises(AssetError, match="is no model folder"):
        quantization.quantize(tmp_path, target)
    with pytest.raises(ExportError, match=r"no text to calibrate with\n.*none given"):
        quantization.quantize(tiny_gemma3, target, "W4A16")
    with pytest.raises(ExportError, match="less than 256 tokens"):
        quantization.quantize(tiny_gemma3, target, "W4A16", ["short"])
    target.mkdir()
    with pytest.raises(ExportError, match="holds something else"):
        quantization.quantize(tiny_gemma3, target)
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_an_adapter_is_merged_first(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "/models/base"}')
    for scheme in SCHEMES:
        with pytest.raises(ExportError, match="an adapter cannot be quantized") as refused:
            quantization.quantize(adapter, tmp_path / "q", scheme, ["text"])
        assert refused.value.where == str(adapter / "adapter_config.json")
        assert refused.value.expected.startswith("full weights")
        assert 'FORM = "merged" first' in refused.value.do
    with pytest.raises(ExportError, match="an adapter alone cannot be quantized"):
        quantization.validate_options("W8A16", "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_widths_that_no_group_divides(tiny_gemma3: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(tiny_gemma3, odd)
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(config | {"intermediate_size": 72}))
    with pytest.raises(ExportError, match=r"groups of inputs(.|\n)*widths 72\n(.|\n)*W8A16"):
        quantization.quantize(odd, tmp_path / "q", "W4A16", ["text"])


@pytest.mark.parametrize(
    ("widths", "group"),
    [((576, 1536), 64), ((2560, 10240, 2048), 128), ((96, 64), 32)],  # SmolLM2-135M, Gemma-3-4B
)
def test_the_group_is_the_largest_that_fits(widths: tuple[int, ...], group: int) -> None:
    from torch import nn

    layers = {f"l{i}": nn.Linear(width, 8, device="meta") for i, width in enumerate(widths)}
    layers["lm_head"] = nn.Linear(7, 8, device="meta")  # is not quantized
    assert quantization.group_size(nn.ModuleDict(layers)) == group
