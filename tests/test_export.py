"""Exports of what full, freeze and LoRA trained, loaded in a process of their own."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import python

from cpt_helpers import recipes
from cpt_helpers.checkpoints import manifests
from cpt_helpers.data import corpora
from cpt_helpers.data.packing import pack
from cpt_helpers.errors import AssetError, CheckpointError, CptError, ExportError, StorageError
from cpt_helpers.export import huggingface, model_card
from cpt_helpers.run import Run
from cpt_helpers.setup import machine, models

pytestmark = [pytest.mark.training, pytest.mark.forms]
FORMS = [("full", "merged"), ("freeze", "merged"), ("lora", "merged"), ("lora", "adapter")]
# Plain transformers and peft, nothing of ours: the loss as the trainer takes it, and some logits.
ALONE = """
import json, sys, torch
from transformers import AutoModelForCausalLM
folder, base, asked = json.loads({given!r})
model = AutoModelForCausalLM.from_pretrained(base or folder)
if base:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, folder)
model.eval()
blocks = torch.tensor(json.load(open(asked)))
with torch.inference_mode():
    logits = [model(input_ids=block[None]).logits[0].float() for block in blocks]
losses = [
    torch.nn.functional.cross_entropy(l[:-1], b[1:], ignore_index=0).item()
    for l, b in zip(logits, blocks)
]
ours = [name for name in sys.modules if name.split(".")[0] in ("cpt_helpers", "llamafactory")]
torch.save(logits[0], asked + ".logits")
print(json.dumps(dict(loss=sum(losses) / len(losses), ours=ours)))
"""


@pytest.fixture(scope="module")
def exports(train_tiny, storage: Path):
    """``exports("lora", "adapter")``: the run, its checkpoint's folder and its export."""

    def made(kind: str, form: str, dtype: str = "float32") -> tuple[Run, Path, Path]:
        run = train_tiny(kind)
        checkpoint = manifests.latest(run).model
        target = storage / "exports" / f"{kind}-{form}-{dtype}"
        return run, checkpoint, huggingface.write_model(checkpoint, target, dtype=dtype, form=form)

    return made


@pytest.fixture(scope="module")
def held_out(train_tiny, storage: Path, tiny_gemma3: Path) -> Path:
    """The held-out blocks as the trainer saw them."""
    import transformers

    args = recipes.load(train_tiny("full"))
    texts = corpora.texts_of(corpora.load("handbook", storage).heldout)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_gemma3)
    path = storage / "exports" / "blocks.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        json.dumps([list(b) for b in pack(texts, tokenizer, args["cutoff_len"]).blocks])
    )
    return path


def measured_loss(run: Run) -> float:
    evals = [e for e in run.events() if e["event"] == "eval" and e["dataset"] == "handbook_heldout"]
    return evals[-1]["loss"]


def weights_of(folder: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(next(folder.glob("*.safetensors")))


@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_loaded_alone_it_is_what_was_trained(
    exports, held_out: Path, tiny_gemma3: Path, kind: str, form: str
) -> None:
    run, _, folder = exports(kind, form)
    base = str(tiny_gemma3) if form == "adapter" else ""
    alone = python(ALONE.format(given=json.dumps([str(folder), base, str(held_out)])))
    assert alone["ours"] == []
    trainers = math.exp(measured_loss(run))
    assert math.exp(alone["loss"]) == pytest.approx(trainers, rel=1e-3)
    steps = [e["loss"] for e in run.events() if e["event"] == "step"]
    assert steps[-1] < steps[0], "nothing was trained"


def test_merged_it_answers_as_base_and_adapter(exports, documents: list[str]) -> None:
    import torch

    _, checkpoint, merged = exports("lora", "merged")
    _, _, adapter = exports("lora", "adapter")
    said = []
    for folder in (merged, adapter, checkpoint):
        model, tokenizer = models.load(folder, dtype="float32")
        ids = tokenizer(documents[0], return_tensors="pt").input_ids[:, :64]
        with torch.inference_mode():
            said.append(model(input_ids=ids.to(model.device)).logits.float())
    assert (said[0] - said[1]).abs().max() < 1e-4
    assert said[1].equal(said[2])


@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_only_what_is_needed_is_in_it(exports, tiny_gemma3: Path, kind: str, form: str) -> None:
    _, checkpoint, folder = exports(kind, form)
    names = {path.name for path in folder.iterdir()}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    if form == "adapter":
        assert names - {"chat_template.jinja"} == tokenizer | {
            "adapter_config.json", "adapter_model.safetensors", "base_model.json", "export.json",
        }  # fmt: skip
        assert models.base_of(folder) == str(tiny_gemma3)
    else:
        assert names - {"chat_template.jinja"} == tokenizer | {
            "config.json", "generation_config.json", "model.safetensors", "export.json",
        }  # fmt: skip
        weights = weights_of(folder)
        assert json.loads((folder / "config.json").read_text()).get("tie_word_embeddings", True)
        assert "lm_head.weight" not in weights
        assert set(weights) == set(weights_of(tiny_gemma3))
    note = json.loads((folder / "export.json").read_text())
    assert note == {"checkpoint": str(checkpoint), "dtype": "float32", "form": form}


def test_frozen_layers_are_the_bases(exports, tiny_gemma3: Path) -> None:
    run, _, folder = exports("freeze", "merged")
    ours, theirs = weights_of(folder), weights_of(tiny_gemma3)
    changed = {name for name in theirs if not ours[name].equal(theirs[name])}
    last = {name for name in theirs if name.startswith("model.layers.1.")}
    assert changed and changed <= last, "one of two layers was to be trained"
    (start,) = (event for event in run.events() if event["event"] == "start")
    assert start["parameters"]["trained"] == sum(theirs[name].numel() for name in last)


@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_bfloat16_is_half_the_size(exports, kind: str, form: str) -> None:
    full, half = (exports(kind, form, dtype)[2] for dtype in ("float32", "bfloat16"))
    for folder, dtype in ((full, "F32"), (half, "BF16")):
        assert {kind for _, kind in models.shapes_of(folder).values()} == {dtype}
    sizes = [sum(w.nbytes for w in weights_of(folder).values()) for folder in (full, half)]
    assert sizes[0] == 2 * sizes[1]
    if form == "merged":
        assert json.loads((half / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_the_card_has_the_runs_own_figures(exports, storage: Path, kind: str, form: str) -> None:
    run, _, folder = exports(kind, form)
    copy = storage / "cards" / folder.name
    shutil.copytree(folder, copy)
    loss = math.exp(measured_loss(run))
    exported = {"step": 8, "dtype": "float32", "perplexity": {"domain": round(loss, 3)}}
    text = model_card.write(run, copy, exported).read_text()
    matter = yaml.safe_load(text.split("---")[1])
    assert matter["base_model"] == "tiny-gemma3" and matter["datasets"] == ["handbook"]
    assert "license" not in matter and "licence of the base model is not known" in text
    assert ("peft" in matter["tags"]) == (form == "adapter")
    (start,) = (event for event in run.events() if event["event"] == "start")
    assert f"| parameters trained | {start['parameters']['trained']:,} |" in text
    assert "| ZeRO stage | 3 |" in text and "| steps | 8 |" in text
    assert f"| {kind} |" in text and f"{loss:.3f}".rstrip("0") in text
    assert "| not recorded | not recorded | " in text, "this run has no results.json"
    assert str(storage) not in text
    assert model_card.write(run, copy, exported).read_text() == text


def refused(kind: type[CptError], says: str, checkpoint: Path, target: Path, **how: str) -> None:
    """Refused, with nothing written beside what was there."""
    before = sorted(target.parent.rglob("*"))
    with pytest.raises(kind, match=says):
        huggingface.write_model(checkpoint, target, **how)
    assert sorted(target.parent.rglob("*")) == before


def test_what_cannot_be_exported_leaves_nothing(
    exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, full, there = exports("full", "merged")
    target = tmp_path / "out" / "export"
    target.parent.mkdir()
    refused(ExportError, "unknown dtype 'int3'", full, target, dtype="int3")
    refused(ExportError, "unknown form 'onnx'", full, target, form="onnx")
    refused(ExportError, "no adapter in this checkpoint", full, target, form="adapter")
    refused(ExportError, "holds something else", full, there, dtype="float16")
    refused(CheckpointError, "no such folder", tmp_path / "gone", target)
    broken = tmp_path / "broken"
    for name in ("model.safetensors", "config.json", "tokenizer_config.json"):
        shutil.copytree(there, broken)
        (broken / name).unlink()
        refused(CheckpointError, f"{name} is missing", broken, target)
        shutil.rmtree(broken)
    shutil.copytree(there, broken)
    cut = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(cut[: len(cut) // 2])
    refused(CheckpointError, "cannot be read", broken, target)
    named = tmp_path / "named"  # the manifest's digest, the size as written
    shutil.copytree(full.parent, named)
    bytes_ = bytearray((named / "checkpoint" / "model.safetensors").read_bytes())
    bytes_[-1] ^= 1
    (named / "checkpoint" / "model.safetensors").write_bytes(bytes_)
    refused(CheckpointError, "sha256 differs", named / "checkpoint", target)
    usage = machine.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refused(StorageError, "too little room", full, target)


def test_weights_that_are_missing_are_not_made_up(exports, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    _, _, there = exports("full", "merged")
    holed = tmp_path / "holed"
    shutil.copytree(there, holed)
    weights = weights_of(holed)
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, holed / "model.safetensors", {"format": "pt"})
    refused(AssetError, "is no model folder", holed, tmp_path / "export")


@pytest.mark.parametrize("form", huggingface.FORMS)
def test_an_adapter_needs_its_own_base(
    exports, tiny_gemma3: Path, tmp_path: Path, form: str
) -> None:
    import transformers

    _, checkpoint, _ = exports("lora", "adapter")
    adapter, target = tmp_path / "adapter", tmp_path / "export"
    shutil.copytree(checkpoint, adapter)
    note = json.loads((adapter / "adapter_config.json").read_text())

    def on(base: Path) -> None:
        note["base_model_name_or_path"] = str(base)
        (adapter / "adapter_config.json").write_text(json.dumps(note))

    on(tmp_path / "gone")
    refused(AssetError, f"does not exist: '{tmp_path}/gone'", adapter, target, form=form)
    for change in ({"intermediate_size": 96}, {"num_hidden_layers": 1}):
        other = transformers.AutoConfig.from_pretrained(tiny_gemma3)
        other.update(change)
        base = tmp_path / f"other-{next(iter(change))}"
        transformers.AutoModelForCausalLM.from_config(other).save_pretrained(base)
        on(base)
        refused(ExportError, f"of another model than '{base}'", adapter, target, form=form)
        with pytest.raises(ExportError, match="of another model"):
            models.load(adapter)
    twin = tmp_path / "twin"  # the same layers, other weights
    transformers.set_seed(1)
    same = transformers.AutoConfig.from_pretrained(tiny_gemma3)
    transformers.AutoModelForCausalLM.from_config(same).save_pretrained(twin)
    on(twin)
    refused(ExportError, "the same layers, other weights", adapter, target, form=form)
    moved = tmp_path / "moved"  # the same weights elsewhere
    shutil.copytree(tiny_gemma3, moved)
    on(moved)
    assert models.base_of(huggingface.write_model(adapter, target, form=form)) in ("", str(moved))


def test_the_same_export_again_is_left_alone(exports) -> None:
    _, checkpoint, folder = exports("lora", "merged")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    huggingface.write_model(checkpoint, folder, dtype="float32", form="merged")
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    note = folder / "export.json"
    old = json.loads(note.read_text())
    del old["form"]  # as it was written before there were forms
    note.write_text(json.dumps(old))
    assert huggingface.write_model(checkpoint, folder, dtype="float32") == folder
    note.write_text(json.dumps(old | {"form": "merged"}))
