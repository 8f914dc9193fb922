"""What is exported is asked: through servers, beside its like, and from MLflow's registry."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
import yaml
from conftest import python, write_jsonl
from nodes import free_port

from cpt_helpers import recipes
from cpt_helpers.data import corpora
from cpt_helpers.errors import ExportError, TrackingError
from cpt_helpers.export import evaluation, huggingface, model_registry, quantization, serving
from cpt_helpers.run import PROJECT, Run
from cpt_helpers.setup import models
from cpt_helpers.train import tracking

pytestmark = pytest.mark.forms
CONFIGS = PROJECT / "serving-configs"
BIN = Path(sys.executable).parent
PROMPT = "The number of workers of a cluster is"


@pytest.fixture(scope="module")
def exported(train_tiny, storage: Path) -> Path:
    return huggingface.write_model(train_tiny("full").output, storage / "serving" / "export")


@contextlib.contextmanager
def served(folder: Path, log: Path) -> Iterator[str]:
    """LLaMA-Factory's own server on loopback, as the notebook gives its command."""
    port = free_port()
    command = [BIN / "llamafactory-cli", "api", "--model_name_or_path", folder]
    command += ["--template", "empty", "--infer_backend", "huggingface"]
    where = {"API_HOST": "127.0.0.1", "API_PORT": str(port), "API_MODEL_NAME": "cpt"}
    with log.open("w") as out:
        server = subprocess.Popen(
            command, env=os.environ | where, stdout=out, stderr=out, start_new_session=True
        )
    try:
        for _ in range(1200):
            assert server.poll() is None, log.read_text()[-3000:]
            with contextlib.suppress(OSError):
                urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=1).close()
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def greedily(folder: Path, prompt: str, new: int) -> str:
    """What the model adds, by plain transformers."""
    import torch

    model, tokenizer = models.load(folder)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        said = model.generate(ids, max_new_tokens=new, do_sample=False)
    return tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.training
@pytest.mark.parametrize("form", ["full", "W8A16"])
def test_a_server_is_asked_by_openais_client(form: str, exported: Path, tmp_path: Path) -> None:
    import openai

    folder = exported
    if form != "full":
        folder = tmp_path / form
        quantization.quantize(exported, folder, form)
    with served(folder, tmp_path / "server.log") as url:
        client = openai.OpenAI(base_url=url, api_key="none", timeout=60)
        assert [model.id for model in client.models.list()] == ["cpt"]
        answer = client.chat.completions.create(
            model="cpt",
            messages=[{"role": "user", "content": PROMPT}],
            max_tokens=12,
            temperature=0,
        )
    said = answer.choices[0].message.content
    assert said == greedily(folder, PROMPT, 12) and said, "what plain transformers says"
    assert 0 < answer.usage.completion_tokens <= 12


@pytest.fixture(scope="module")
def adapters(train_tiny, storage: Path) -> dict[str, Run]:
    """Two adapters of our recipe on one base: documentation, and Python source."""
    source = storage / "files" / "source.jsonl"
    files = sorted(Path(json.__file__).parent.parent.glob("*.py"))
    write_jsonl(source, [path.read_text("utf-8")[:4000] for path in files[:120]])
    return {
        "handbook": train_tiny("lora"),
        "source": train_tiny("lora", str(source), "tiny-lora-source"),
    }


@pytest.mark.training
def test_adapters_on_one_base(
    adapters: dict[str, Run], tiny_gemma3: Path, storage: Path, tmp_path: Path
) -> None:
    """Each is better on its own kind of text, beside the other; peft, as servers do, swaps them."""
    from peft import PeftModel

    target = tmp_path / "adapters"
    facts = serving.lay_out_adapters({name: run.output for name, run in adapters.items()}, target)
    assert (facts["base"], facts["rank"]) == (str(tiny_gemma3), 16)
    files = sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
    each = [f"{n}/{f}" for n in sorted(adapters) for f in sorted(serving.FILES)]
    assert files == sorted([*each, serving.NOTE])
    assert serving.lay_out_adapters({n: run.output for n, run in adapters.items()}, target) == facts
    with pytest.raises(ExportError, match="holds something else"):
        serving.lay_out_adapters({"other": adapters["source"].output}, target)

    base, tokenizer = models.load(tiny_gemma3)
    first, *others = adapters
    model = PeftModel.from_pretrained(base, target / first, adapter_name=first)
    for name in others:
        model.load_adapter(target / name, adapter_name=name)
    found = {}
    for text in adapters:
        held_out = list(corpora.texts_of(corpora.load(text, storage).heldout))
        for name in adapters:
            model.set_adapter(name)
            found[text, name] = evaluation.perplexity(model.eval(), tokenizer, held_out, 64)
    # A few steps of a random model: one may be better on both, but more so on its own.
    on = {t: found[t, "handbook"] / found[t, "source"] for t in ("handbook", "source")}
    assert on["handbook"] < 0.995 * on["source"], found


def test_what_is_no_adapter(tiny_gemma3: Path, tmp_path: Path) -> None:
    def adapter(name: str, **settings: object) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        config = {"base_model_name_or_path": "base", "r": 8, "modules_to_save": None}
        (folder / "adapter_config.json").write_text(json.dumps(config | settings))
        (folder / "adapter_model.safetensors").write_bytes(name.encode())
        return folder

    one, other = adapter("one"), adapter("other", base_model_name_or_path="another", r=32)
    target = tmp_path / "target"
    for given, said in (
        ({"a": tiny_gemma3}, "'a' is no adapter: adapter_config.json and adapter_model"),
        ({"a": one, "b": other}, "belong to 2 base models: another, base"),
        ({}, "belong to 0 base models"),
        ({"a/b": one}, "'a/b' cannot name an adapter"),
        ({"a": adapter("dora", use_dora=True)}, "'a': use_dora is True"),
        ({"a": adapter("whole", modules_to_save=["lm_head"])}, r"modules_to_save is \['lm_head'\]"),
    ):
        with pytest.raises(ExportError, match=said):
            serving.lay_out_adapters(given, target)
        assert not target.exists()
    assert serving.lay_out_adapters({"a": other}, target)["rank"] == 32


READ = """
import json
from ray.llm._internal.serve.configs.server_models import LLMServingArgs
from ray.serve.schema import ServeDeploySchema

found = {{}}
for name, given in json.loads({text!r}).items():
    (app,) = ServeDeploySchema(**given).applications
    try:
        (config,) = LLMServingArgs.model_validate(app.args).parse_args().llm_configs
        found[name] = config.model_dump(mode="json", exclude_unset=True)
    except ValueError as error:
        found[name] = str(error)
print(json.dumps(found))
"""


def test_rays_own_classes_take_the_files() -> None:
    """LLMServingArgs is what ``build_openai_app`` makes of it; ServeDeploySchema ``serve run``."""
    files, settings = {}, {}
    for path in CONFIGS.glob("*.yaml"):
        text = path.read_text("utf-8")
        assert f"serve run serving-configs/{path.name}" in text and "To fill in" in text
        files[path.stem] = yaml.safe_load(text)
        assert files[path.stem]["http_options"]["host"] == "127.0.0.1"
        (application,) = files[path.stem]["applications"]
        assert application["import_path"] == "ray.serve.llm:build_openai_app"
        (settings[path.stem],) = application["args"]["llm_configs"]
    assert set(files) == {"ray_serve_llm", "ray_serve_multi_lora"}
    wrong = copy.deepcopy(files)
    of = {name: given["applications"][0]["args"]["llm_configs"][0] for name, given in wrong.items()}
    of["ray_serve_llm"]["accelerator"] = of["ray_serve_llm"].pop("accelerator_type")
    lora = of["ray_serve_multi_lora"]["lora_config"]
    lora["dynamic_lora_loading_path"] = "/mnt/cluster_storage/adapters"
    asked = files | {f"wrong {name}": given for name, given in wrong.items()}
    found = python(READ.format(text=json.dumps(asked)))
    assert {name: found[name] for name in files} == settings
    assert "Extra inputs are not permitted" in found["wrong ray_serve_llm"]
    assert 'must start with "s3://" or "gs://"' in found["wrong ray_serve_multi_lora"]


def test_the_vllm_command(tmp_path: Path) -> None:
    """What the script would start; vLLM itself needs a GPU."""
    stand_in = tmp_path / "bin" / "vllm"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)
    for name in ("handbook", "tickets"):
        (tmp_path / "two adapters" / name).mkdir(parents=True)
        (tmp_path / "two adapters" / name / "adapter_config.json").write_text("{}")

    def asked(*arguments: object) -> list[str]:
        done = subprocess.run(
            ["sh", CONFIGS / "vllm.sh", *arguments],
            env=os.environ | {"PATH": f"{stand_in.parent}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
        )
        return done.stdout.splitlines() if done.returncode == 0 else [done.stderr]

    common = "--served-model-name cpt --host 127.0.0.1 --port 8000 --tensor-parallel-size 1"
    common = [*common.split(), "--max-model-len", "4096"]
    assert asked("a model") == ["serve", "a model", *common]
    assert asked("m", "--", "--seed", "1") == ["serve", "m", *common, "--seed", "1"]
    folder = tmp_path / "two adapters"
    lora = ["--enable-lora", "--max-lora-rank", "16", "--lora-modules"]
    lora += [f"{name}={folder / name}" for name in ("handbook", "tickets")]
    assert asked("base", folder) == ["serve", "base", *common, *lora]
    assert asked("base", folder, "--", "-x") == ["serve", "base", *common, "-x", *lora]
    assert "usage: vllm.sh MODEL" in asked()[0]


@pytest.mark.training
def test_a_registered_model_is_found_and_asked(
    exported: Path, train_tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train_tiny("full")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    args = recipes.load(run) | {"report_to": "mlflow"}
    known = {"path": str(exported), "perplexity": {"domain": 12.5}}
    assert model_registry.register(run, args | {"report_to": "none"}, known) is None
    assert not (tmp_path / "mlflow.db").exists(), "report_to: none asks nothing of MLflow"
    tracking.catch_up(run, args)  # as the training leaves it in MLflow
    tracking.add_export(run, args, known)

    first = model_registry.register(run, args, known, "tiny")
    assert (first, model_registry.register(run, args, known, "tiny")) == (1, 1), "made once"
    other = tmp_path / "other"
    shutil.copytree(exported, other)
    assert model_registry.register(run, args, known | {"path": str(other)}, "tiny") == 2
    assert model_registry.registered(uri, "tiny")[0] == other, "the newest"
    folder, tags = model_registry.registered(uri, "tiny", 1)
    assert folder == exported
    said = {key.removeprefix("cpt."): value for key, value in tags.items()}
    assert said["perplexity.domain"] == "12.5" and said["base_model"] == args["model_name_or_path"]
    assert said["data"] == "handbook" and len(said["data.handbook.sha256"]) == 64
    assert said["run"] == run.name and said["code"] and said["recipe"]
    model, tokenizer = models.load(folder)
    assert models.continuation(model, tokenizer, PROMPT, new_tokens=8)

    (other / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(TrackingError, match="'tiny' version 2 no longer holds the registered"):
        model_registry.registered(uri, "tiny")
    with pytest.raises(TrackingError, match=r"no model 'tiny', version 9(.|\n)*\[1, 2\]"):
        model_registry.registered(uri, "tiny", 9)
    with pytest.raises(TrackingError, match="no model 'nothing'"):
        model_registry.registered(uri, "nothing")
