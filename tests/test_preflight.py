"""Each fault that would cost GPU hours, planted, and seen within seconds of the call."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from conftest import python
from nodes import Node, can_hide, cluster, free_port

from cpt_helpers import config, data, environment, preflight, variables
from cpt_helpers.__main__ import main
from cpt_helpers.errors import (
    AssetError,
    ConfigError,
    CptError,
    StorageError,
    TrackingError,
    UnreadyError,
)
from cpt_helpers.run import PROJECT, Run

RECIPES = sorted((PROJECT / "train-configs").glob("*.yaml"))
SECONDS = 10


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    since = time.monotonic()
    yield
    assert time.monotonic() - since < SECONDS


@pytest.fixture(scope="module")
def run(storage: Path, corpus: Path, tiny_gemma3: Path) -> Run:
    """A run as notebooks 01 and 02 leave it."""
    checks_loaded = config.read_recipe("cpt_cpu.yaml")
    assert checks_loaded
    data.prepare(str(corpus), storage)
    data.prepare("news", storage)
    return Run.open("preflight", storage)


@pytest.fixture(scope="module")
def args(run: Run, tiny_gemma3: Path) -> dict:
    model = {"model_name_or_path": str(tiny_gemma3), "report_to": "none"}
    resolved = config.resolve(run, "cpt_cpu.yaml", model, "handbook")
    return resolved.args | {"deepspeed": str(resolved.deepspeed)}  # the run's copy is not written


@pytest.fixture(scope="module")
def ray(run: Run) -> Iterator:
    with environment.cluster() as ray:
        yield ray


def refused(run: Run, tiny: Path, overrides: dict) -> str:
    with in_time(), pytest.raises(ConfigError) as error:
        model = {"model_name_or_path": str(tiny)}
        config.resolve(run, "cpt_cpu.yaml", model | overrides, "handbook")
    assert not run.folder.exists(), "nothing may be written"
    return str(error.value)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"learnin_rate": 1e-4}, "nearest known: learning_rate"),
        ({"max_steps": 1.5}, "a whole number"),
        ({"bf16": "maybe"}, "true or false"),
        ({"bf16": False, "learning_rate": "fast"}, "is not a number"),
        ({"bf16": True, "fp16": True}, "bf16 and fp16 exclude each other"),
        ({"stage": "sft"}, "is not continued pre-training"),
        ({"use_cpu": False}, "ask for no GPU"),
        ({"resources_per_worker": {"GPU": 1}}, "each worker asks for a GPU"),
        ({"do_train": False}, "nothing would be trained"),
        ({"eval_strategy": "epoch", "eval_dataset": None}, "nothing to measure on"),
        ({"template": "no_such"}, "template: 'no_such' is not known"),
        ({"val_size": 0.1}, "LLaMA-Factory refuses the recipe"),
        ({"streaming": True, "max_steps": None}, "LLaMA-Factory refuses the recipe"),
        ({"neat_packing": True}, "LLaMA-Factory refuses the recipe"),
        ({"model_name_or_path": "<your_model>"}, "a placeholder was left in, <your_model>"),
        ({"eval_dataset": "nowhere"}, "unknown dataset 'nowhere'"),
    ],
)
def test_a_recipe(run: Run, tiny_gemma3: Path, overrides: dict, said: str) -> None:
    message = refused(run, tiny_gemma3, overrides)
    assert said in message and "do:" in message, message


def test_several_faults_are_told_at_once(run: Run, tiny_gemma3: Path) -> None:
    message = refused(
        run, tiny_gemma3, {"eval_dataset": "nowhere", "ddp_timeout": 180000000, "do_train": False}
    )
    assert "3 things are wrong" in message
    assert (
        "nowhere" in message and "ddp_timeout" in message and "nothing would be trained" in message
    )


def test_numbers_that_yaml_reads_as_text(run: Run, tiny_gemma3: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    text = (PROJECT / "train-configs" / "cpt_cpu.yaml").read_text()
    recipe.write_text(text.replace("learning_rate: 2.5e-4", "learning_rate: 1e-4"))
    assert yaml.safe_load(recipe.read_text())["learning_rate"] == "1e-4", "YAML 1.1"
    model = {"model_name_or_path": str(tiny_gemma3)}
    resolved = config.resolve(run, str(recipe), model, "handbook")
    assert resolved.args["learning_rate"] == 1e-4


def test_sizes_in_deepspeeds_file(run: Run, tiny_gemma3: Path, tmp_path: Path) -> None:
    settings = json.loads((PROJECT / "deepspeed-configs" / "ds_z3_config.json").read_text())
    mine = tmp_path / "ds.json"
    mine.write_text(json.dumps(settings | {"train_micro_batch_size_per_gpu": 16}))
    message = refused(run, tiny_gemma3, {"deepspeed": str(mine)})
    assert "train_micro_batch_size_per_gpu: 16, the recipe comes to 4" in message


def test_all_is_well(run: Run, args: dict, ray) -> None:
    with in_time():
        findings = preflight.look(run, args, ray)
    assert all(finding.error is None for finding in findings), findings
    assert {"model", "disk", "tracking", "placement"} <= {f.subject for f in findings}
    assert any(f.subject.startswith("node ") and "same packages" in f.said for f in findings)
    assert not list(run.storage.glob(".preflight*"))


def test_too_many_workers(run: Run, args: dict, ray) -> None:
    with in_time(), pytest.raises(UnreadyError, match=r"99 workers(?s:.*)cannot be placed"):
        preflight.placement(ray, args | {"ray_num_workers": 99})
    with in_time(), pytest.raises(UnreadyError, match="room for 1"):
        preflight.placement(ray, args | {"placement_strategy": "STRICT_SPREAD"})
    with in_time(), pytest.raises(UnreadyError, match=r"1 GPU each cannot be placed"):
        preflight.placement(ray, args | {"resources_per_worker": {"GPU": 1}})


def test_other_work_takes_the_room(run: Run, args: dict, ray) -> None:
    @ray.remote(num_cpus=1)
    class Other:
        def there(self) -> bool:
            return True

    other = Other.remote()
    assert ray.get(other.there.remote())
    everything = args | {"ray_num_workers": int(ray.cluster_resources()["CPU"])}
    with in_time(), pytest.raises(UnreadyError, match="other work takes the room"):
        preflight.placement(ray, everything)
    ray.kill(other)


def test_a_file_that_is_gone(run: Run, args: dict, ray) -> None:
    gone = args | {"tokenized_path": str(run.storage / "tokenised" / "gone")}
    with in_time():
        findings = preflight.nodes(run, gone, ray)
    assert any("cannot read what the workers need" in str(f.error) for f in findings)
    with pytest.raises(CptError, match="run notebooks 01 and 02"):
        preflight.raise_if_wrong(findings)


def test_a_model_that_is_not_there(run: Run, args: dict, tmp_path: Path) -> None:
    with in_time(), pytest.raises(AssetError, match="the model is not there"):
        preflight.model(args | {"model_name_or_path": str(tmp_path / "nothing")})
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with in_time(), pytest.raises(AssetError, match="holds no safetensors"):
        preflight.model(args | {"model_name_or_path": str(tmp_path)})


def test_disk_and_memory_too_small(
    run: Run, args: dict, ray, tiny_gemma3: Path, tmp_path: Path
) -> None:
    giant = json.loads((tiny_gemma3 / "config.json").read_text())
    giant |= {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 200}
    (tmp_path / "config.json").write_text(json.dumps(giant))
    with in_time(), pytest.raises(UnreadyError, match=r"2 workers need .* at the peak"):
        preflight.enough_memory(ray, args | {"model_name_or_path": str(tmp_path)})
    with in_time(), pytest.raises(StorageError, match=r"too little room(?s:.*)checkpoints of"):
        preflight.room(run, args | {"model_name_or_path": str(tmp_path)})


@pytest.mark.skipif(not can_hide(), reason="needs mounts of its own (root, or user namespaces)")
def test_nodes_that_are_not_alike(run: Run, args: dict, tmp_path: Path) -> None:
    """One lacks the corpus and has another accelerate, one has no shared storage at all."""
    other = tmp_path / "accelerate-9.9.9.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: accelerate\nVersion: 9.9.9\n")
    here = os.environ.get("PYTHONPATH", "")
    lacking = Node(hides=[run.storage / "corpora"], variables={"PYTHONPATH": f"{tmp_path}:{here}"})
    alone = Node(hides=[run.storage])
    code = f"""
import json, time
from pathlib import Path
from cpt_helpers import environment, preflight
from cpt_helpers.run import Run
run, args = Run("preflight", Path({str(run.storage)!r})), json.loads({json.dumps(args)!r})
with environment.cluster() as ray:
    since = time.monotonic()
    findings = preflight.nodes(run, args, ray)
    seconds = time.monotonic() - since
print(json.dumps([seconds, [[f.subject, f.said, str(f.error or "")] for f in findings]]))
"""
    with cluster(1, lacking, alone) as address:
        seconds, findings = python(code, RAY_ADDRESS=address)
    assert seconds < SECONDS
    said = {name: "" for name, *_ in findings}
    for name, _, error in findings:
        said[name] += error
    second, third = (
        next(text for name, text in said.items() if name.startswith(f"node 127.0.0.{number},"))
        for number in (2, 3)
    )
    (head,) = (text for text in said.values() if text not in (second, third))
    assert not head
    assert "cannot read what the workers need" in second and "(the driver can)" in second
    assert "accelerate 9.9.9 (here " in second
    assert "another folder at the place of the storage" in third


def test_gpus_too_small(run: Run, tmp_path: Path) -> None:
    """A node that says it has an L4, to Gemma-3-4B under ZeRO-2."""
    code = f"""
import json, time
from cpt_helpers import config, environment, forecast, preflight
from cpt_helpers.errors import UnreadyError
forecast.memory.model_size(forecast.planning.smollm2_135m(), "the libraries are loaded")
args = config.read_recipe("cpt_deepspeed.yaml")[1]
args |= {{"deepspeed": {str(PROJECT / "deepspeed-configs" / "ds_z2_config.json")!r}}}
with environment.cluster() as ray:
    since = time.monotonic()
    try:
        said = preflight.enough_memory(ray, args)
    except UnreadyError as error:
        said = str(error)
    seconds = time.monotonic() - since
print(json.dumps([seconds, said]))
"""
    gpu = Node(options=["--num-gpus", "1", "--resources", '{"accelerator_type:L4": 1}'])
    with cluster(1, gpu) as address:
        seconds, said = python(code, RAY_ADDRESS=address)
    assert "does not fit on an L4" in said and "ds_z3_offload" in said
    assert seconds < SECONDS


class Hub(BaseHTTPRequestHandler):
    """What the hub answers: open, gated, unknown; and MLflow's API, by token."""

    def do_HEAD(self) -> None:
        allowed = self.headers.get("authorization") == "Bearer hf_allowed_0123456789"
        if "/gated/" in self.path and not allowed:
            self.send_response(403 if self.headers.get("authorization") else 401)
            self.send_header("X-Error-Code", "GatedRepo")
        elif "/gated/" in self.path or "/open/" in self.path:
            self.send_response(200)
            for name, value in (("ETag", '"1"'), ("X-Repo-Commit", "a" * 40)):
                self.send_header(name, value)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        allowed = self.headers.get("authorization") == "Bearer allowed"
        body = json.dumps({"error_code": "RESOURCE_DOES_NOT_EXIST"} if allowed else {}).encode()
        self.send_response(404 if allowed else 403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize(
    ("name", "token", "said"),
    [
        ("open/model", "", "is on the hub"),
        ("gated/model", "", "is gated, and there is no HF_TOKEN"),
        ("gated/model", "hf_refused_0123456789", "HF_TOKEN is not allowed to read it"),
        ("gated/model", "hf_allowed_0123456789", "HF_TOKEN may read it"),
        ("no/model", "", "the hub has no model no/model"),
    ],
)
def test_the_hub_is_asked(hub: str, name: str, token: str, said: str, tmp_path: Path) -> None:
    answer = ask_hub(name, HF_ENDPOINT=hub, HF_TOKEN=token, HF_HOME=str(tmp_path))
    assert said in answer["said"] and answer["seconds"] < SECONDS
    assert not token or token not in answer["said"]


@pytest.mark.parametrize("of", ["refused", "allowed"])
def test_a_token_of_huggingface_cli_login(hub: str, of: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"hf_{of}_0123456789")
    answer = ask_hub("gated/model", HF_ENDPOINT=hub, HF_TOKEN="", HF_HOME=str(tmp_path))
    may = {"refused": "is not allowed to read it", "allowed": "may read it"}[of]
    assert f"the token of `huggingface-cli login` {may}" in answer["said"]
    assert "0123456789" not in answer["said"]


def test_a_hub_out_of_reach(tmp_path: Path) -> None:
    dead = f"http://127.0.0.1:{free_port()}"
    answer = ask_hub("open/model", HF_ENDPOINT=dead, HF_HOME=str(tmp_path))
    assert "the hub cannot be asked" in answer["said"] and "HF_ENDPOINT" in answer["said"]
    assert answer["seconds"] < SECONDS


def ask_hub(name: str, **environment: str) -> dict:
    return python(
        f"""
import json, time
from cpt_helpers import preflight
from cpt_helpers.errors import AssetError
since = time.monotonic()
try:
    said = preflight.model({{"model_name_or_path": {name!r}}})
except AssetError as error:
    said = str(error)
print(json.dumps(dict(said=said, seconds=time.monotonic() - since)))
""",
        HF_HUB_OFFLINE="0",
        **environment,
    )


def test_tracking_servers(run: Run, args: dict, hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reporting = args | {"report_to": "mlflow"}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    with in_time(), pytest.raises(TrackingError, match=r"does not answer(?s:.*)report_to"):
        preflight.server(run, reporting)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", hub)
    with in_time(), pytest.raises(TrackingError, match=r"let this user in \(403(?s:.*)none is set"):
        preflight.server(run, reporting)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "allowed")
    with in_time():
        assert "(new)" in preflight.server(run, reporting)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "databricks")
    with in_time(), pytest.raises(TrackingError, match="DATABRICKS_HOST and DATABRICKS_TOKEN are"):
        preflight.server(run, reporting)
    monkeypatch.setenv("DATABRICKS_HOST", "https://example.invalid")
    monkeypatch.setenv("DATABRICKS_TOKEN", "t")
    with in_time(), pytest.raises(TrackingError, match="no experiment named 'cpt'"):
        preflight.server(run, reporting)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "/Users/someone/cpt")
    assert "Databricks" in preflight.server(run, reporting)
    assert variables.worker_environment(run, reporting)["DATABRICKS_TOKEN"] == "t"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_dry_run_of_every_recipe(
    recipe: Path, ray, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """On a bare storage: steps 1 and 2 bring what the CPU recipe lacks; GPUs nobody brings."""
    given = ["--config", str(recipe), "--run", "dry", "--storage", str(tmp_path)]
    code = main(["train", "--dry-run", *given])
    said = capsys.readouterr().out
    on_cpu = "use_cpu: true" in recipe.read_text()
    assert code == (0 if on_cpu else 1), said
    assert "as it would be" in said and "zero_optimization" in said and "one step" in said
    assert "nothing was launched" in said and "what was looked at" in said
    assert on_cpu or "cannot be placed" in said
    assert not list(tmp_path.iterdir()), "nothing may be written"
