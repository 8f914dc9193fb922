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

from cpt_helpers import recipes
from cpt_helpers.__main__ import main
from cpt_helpers.config import preflight, resolution
from cpt_helpers.data import corpora
from cpt_helpers.errors import (
    AssetError,
    ConfigError,
    CptError,
    StorageError,
    TrackingError,
    UnreadyError,
)
from cpt_helpers.run import PROJECT, Run
from cpt_helpers.setup.cluster import ray_cluster
from cpt_helpers.train import launch, worker_env

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
    checks_loaded = recipes.read_recipe("cpt_cpu.yaml")
    assert checks_loaded
    corpora.prepare(str(corpus), storage)
    corpora.prepare("news", storage)
    return Run.open("preflight", storage)


@pytest.fixture(scope="module")
def args(run: Run, tiny_gemma3: Path) -> dict:
    model = {"model_name_or_path": str(tiny_gemma3), "report_to": "none"}
    resolved = resolution.resolve(run, "cpt_cpu.yaml", model, "handbook")
    return resolved.args | {"deepspeed": str(resolved.deepspeed)}  # the run's copy is not written


@pytest.fixture(scope="module")
def ray(run: Run) -> Iterator:
    with ray_cluster() as ray:
        yield ray


def refused(run: Run, tiny: Path, overrides: dict) -> str:
    with in_time(), pytest.raises(ConfigError) as error:
        model = {"model_name_or_path": str(tiny)}
        resolution.resolve(run, "cpt_cpu.yaml", model | overrides, "handbook")
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
        ({"eval_strategy": "epoch", "eval_dataset": None}, "without a held-out set"),
        ({"template": "no_such"}, "template: 'no_such' is not known"),
        ({"val_size": 0.1}, "LLaMA-Factory refuses the recipe"),
        ({"streaming": True, "max_steps": None}, "LLaMA-Factory refuses the recipe"),
        ({"neat_packing": True}, "LLaMA-Factory refuses the recipe"),
        ({"model_name_or_path": "<your_model>"}, "a placeholder was left in, <your_model>"),
        ({"eval_dataset": "nowhere"}, "unknown dataset 'nowhere'"),
        ({"auto_find_batch_size": True}, "halves the micro-batch when memory runs out"),
        ({"save_on_each_node": True}, "would write the same files on shared storage"),
        ({"save_only_model": True}, "leaves nothing to resume from"),
        ({"ray_storage_filesystem": "s3"}, "ray_storage_filesystem is ignored"),
        ({"use_cpu": None, "resources_per_worker": {"GPU": 2}}, "each worker asks for 2 GPUs"),
        ({"use_cpu": None, "resources_per_worker": {"GPU": 0.5}}, "each worker asks for 0.5 GPUs"),
        ({"resources_per_worker": "all"}, "resources_per_worker: 'all' is not a mapping"),
        (
            {"ray_init_kwargs": {"runtime_env": "env.yaml"}},
            "ray_init_kwargs.runtime_env: 'env.yaml'",
        ),
        ({"lr_scheduler_kwargs": '{"min_lr_rate": 0.1}'}, "is not a mapping"),
        (
            {"ray_init_kwargs": {"address": "auto", "runtime_env": {"pip": ["x"]}}},
            "ray_init_kwargs: address, runtime_env.pip would be ignored",
        ),
    ],
)
def test_a_recipe(run: Run, tiny_gemma3: Path, overrides: dict, said: str) -> None:
    message = refused(run, tiny_gemma3, overrides)
    assert said in message and "do:" in message, message


@pytest.mark.parametrize(
    ("name", "reader"),
    [
        ("LD_PRELOAD", "dynamic loader"),
        ("PYTHONHASHSEED", "Python"),
        ("MALLOC_ARENA_MAX", "C library"),
        ("OPENBLAS_NUM_THREADS", "OpenBLAS"),
        ("CUDA_VISIBLE_DEVICES", "Ray"),
        ("RAY_TRAIN_V2_ENABLED", "Ray"),
    ],
)
def test_variables_that_arrive_too_late(
    run: Run, tiny_gemma3: Path, name: str, reader: str
) -> None:
    in_time = ("NCCL_DEBUG", "TORCH_NCCL_BLOCKING_WAIT", "OMP_NUM_THREADS", "HF_HUB_DISABLE_XET")
    variables = {name: "1"} | dict.fromkeys(in_time, "1")
    overrides = {"ray_init_kwargs": {"runtime_env": {"env_vars": variables}}}
    message = refused(run, tiny_gemma3, overrides)
    assert f"the variable {name} would have no effect" in message and reader in message
    assert not [other for other in in_time if other in message]


def test_what_ray_only_displays_is_a_warning(run: Run, tiny_gemma3: Path) -> None:
    overrides = {"model_name_or_path": str(tiny_gemma3)}
    overrides |= {"ray_init_kwargs": {"log_to_driver": True}}
    (warning,) = resolution.resolve(run, "cpt_cpu.yaml", overrides, "handbook").warnings
    assert warning.what == "ray_init_kwargs: log_to_driver will be ignored"


def test_ray_trains_second_implementation_is_refused(
    run: Run, args: dict, ray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process at once, before anything is written; on each node by its own variables."""
    other = Run.open("second", run.storage)
    monkeypatch.setenv("RAY_TRAIN_V2_ENABLED", "True")
    with in_time(), pytest.raises(UnreadyError, match=r"RAY_TRAIN_V2_ENABLED=True(?s:.*)unset"):
        launch.train(other, args)
    assert not other.folder.exists()
    findings = preflight.look(run, args, ray)
    assert [f.subject for f in findings if f.error] == ["Ray Train"]
    monkeypatch.delenv("RAY_TRAIN_V2_ENABLED")
    code = f"""
import json, os
from pathlib import Path
from cpt_helpers import recipes
from cpt_helpers.setup.cluster import ray_cluster
from cpt_helpers.config import preflight
from cpt_helpers.run import Run
run = Run("preflight", Path({str(run.storage)!r}))
args = recipes.Recipe(json.loads({json.dumps(args)!r}))
os.environ["RAY_TRAIN_V2_ENABLED"] = "1"  # the processes of a cluster started here have it
with ray_cluster() as ray:
    del os.environ["RAY_TRAIN_V2_ENABLED"]
    print(json.dumps([[f.subject, str(f.error or "")] for f in preflight.nodes(run, args, ray)]))
"""
    ((subject, error),) = python(code)
    assert subject.startswith("node ") and "RAY_TRAIN_V2_ENABLED=1" in error and "host" in error


def test_several_faults_are_told_at_once(run: Run, tiny_gemma3: Path) -> None:
    message = refused(
        run, tiny_gemma3, {"eval_dataset": "nowhere", "ddp_timeout": 180000000, "do_train": False}
    )
    assert "the recipe has 3 errors" in message
    assert (
        "nowhere" in message and "ddp_timeout" in message and "nothing would be trained" in message
    )


def test_numbers_that_yaml_reads_as_text(run: Run, tiny_gemma3: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    text = (PROJECT / "train-configs" / "cpt_cpu.yaml").read_text()
    recipe.write_text(text.replace("learning_rate: 2.5e-4", "learning_rate: 1e-4"))
    assert yaml.safe_load(recipe.read_text())["learning_rate"] == "1e-4", "YAML 1.1"
    model = {"model_name_or_path": str(tiny_gemma3)}
    resolved = resolution.resolve(run, str(recipe), model, "handbook")
    assert resolved.args["learning_rate"] == 1e-4


def test_sizes_in_deepspeeds_file(run: Run, tiny_gemma3: Path, tmp_path: Path) -> None:
    settings = json.loads((PROJECT / "deepspeed-configs" / "ds_z3_config.json").read_text())
    mine = tmp_path / "ds.json"
    mine.write_text(json.dumps(settings | {"train_micro_batch_size_per_gpu": 16}))
    message = refused(run, tiny_gemma3, {"deepspeed": str(mine)})
    assert "train_micro_batch_size_per_gpu: 16, and the recipe has 4" in message


def test_all_is_well(run: Run, args: dict, ray) -> None:
    with in_time():
        findings = preflight.look(run, args, ray)
    assert all(finding.error is None for finding in findings), findings
    assert {"model", "disk", "tracking", "placement"} <= {f.subject for f in findings}
    assert any(f.subject.startswith("node ") and "same packages" in f.result for f in findings)
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
    with in_time(), pytest.raises(UnreadyError, match="other jobs use the cluster"):
        preflight.placement(ray, everything)
    ray.kill(other)


def test_a_file_that_is_gone(run: Run, args: dict, ray) -> None:
    gone = args | {"tokenized_path": str(run.storage / "tokenised" / "gone")}
    with in_time():
        findings = preflight.nodes(run, gone, ray)
    assert any("cannot read a file that the workers need" in str(f.error) for f in findings)
    with pytest.raises(CptError, match="run notebooks 01 and 02"):
        preflight.raise_if_wrong(findings)


def test_a_model_that_is_not_there(run: Run, args: dict, tmp_path: Path) -> None:
    with in_time(), pytest.raises(AssetError, match="the model is missing"):
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
from cpt_helpers import recipes
from cpt_helpers.setup.cluster import ray_cluster
from cpt_helpers.config import preflight
from cpt_helpers.run import Run
run = Run("preflight", Path({str(run.storage)!r}))
args = recipes.Recipe(json.loads({json.dumps(args)!r}))
with ray_cluster() as ray:
    since = time.monotonic()
    findings = preflight.nodes(run, args, ray)
    seconds = time.monotonic() - since
print(json.dumps([seconds, [[f.subject, f.result, str(f.error or "")] for f in findings]]))
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
    assert "cannot read a file that the workers need" in second and "(the driver can)" in second
    assert "accelerate 9.9.9 (here " in second
    assert "another folder at the storage's path" in third


def test_gpus_too_small(run: Run, tmp_path: Path) -> None:
    """A node that says it has an L4, to Gemma-3-4B under ZeRO-2."""
    code = f"""
import json, time
from cpt_helpers import recipes
from cpt_helpers.config import planning, preflight
from cpt_helpers.setup.cluster import ray_cluster
from cpt_helpers.errors import UnreadyError
model = planning.known_config("SmolLM2-135M-Instruct")
planning.model_size(model, "the libraries are loaded")
args = recipes.read_recipe("cpt_deepspeed.yaml")[1]
args |= {{"deepspeed": {str(PROJECT / "deepspeed-configs" / "ds_z2_config.json")!r}}}
with ray_cluster() as ray:
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


def test_labels_of_gpus(run: Run) -> None:
    """Ray labels an A100 without its size: one with a size is on no node, and is told so."""
    code = f"""
import json
from cpt_helpers import recipes
from cpt_helpers.config import preflight
from cpt_helpers.setup.cluster import ray_cluster
from cpt_helpers.errors import UnreadyError
args = recipes.read_recipe("cpt_4xA100-40G.yaml")[1] | {{"ray_num_workers": 1}}
asked = [args, args | {{"resources_per_worker": {{"GPU": 1, "accelerator_type:A100-40G": 0.001}}}}]
said = []
with ray_cluster() as ray:
    for recipe in asked:
        try:
            said.append(preflight.placement(ray, recipe))
        except UnreadyError as error:
            said.append(str(error))
    file = {str(PROJECT / "deepspeed-configs" / "ds_z2_config.json")!r}  # 43 GiB
    said.append(preflight.enough_memory(ray, args | {{"deepspeed": file, "ray_num_workers": 2}}))
print(json.dumps(said))
"""
    gpu = Node(options=["--num-gpus", "1", "--resources", '{"accelerator_type:A100": 1}'])
    with cluster(1, gpu) as address:
        shipped, sized, memory = python(code, RAY_ADDRESS=address)
    assert "accelerator_type:A100 each" in shipped and "placed" not in shipped
    assert "no node offers accelerator_type:A100-40G" in sized
    assert "labels that nodes have: accelerator_type:A100\n" in sized
    assert "fits on an A100 of 80 GB, not on one of 40 GB" in memory


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
from cpt_helpers.config import preflight
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
    with (
        in_time(),
        pytest.raises(TrackingError, match=r"refused this user(?s:.*)none is set"),
    ):
        preflight.server(run, reporting)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "allowed")
    with in_time():
        assert "(new)" in preflight.server(run, reporting)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "databricks")
    with (
        in_time(),
        pytest.raises(TrackingError, match="DATABRICKS_HOST and DATABRICKS_TOKEN are"),
    ):
        preflight.server(run, reporting)
    monkeypatch.setenv("DATABRICKS_HOST", "https://example.invalid")
    monkeypatch.setenv("DATABRICKS_TOKEN", "t")
    with in_time(), pytest.raises(TrackingError, match="'cpt' is not the name of an exp"):
        preflight.server(run, reporting)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "/Users/someone/cpt")
    assert "Databricks" in preflight.server(run, reporting)
    assert not {n for n in worker_env.worker_environment(reporting) if n.startswith("DATABRICKS")}


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
    assert "nothing was launched" in said and "# findings" in said
    assert on_cpu or "cannot be placed" in said
    assert not list(tmp_path.iterdir()), "nothing may be written"


# The recipe of "Continued Pre-Training (CPT) at scale with DeepSpeed", as the guide prints it.
GUIDE = """\
model_name_or_path: google/gemma-3-4b-pt
trust_remote_code: true

stage: pt
do_train: true
finetuning_type: full

deepspeed: /mnt/cluster_storage/ds_z3_config.json

dataset: my_cpt_c4
dataset_dir: /mnt/cluster_storage
template: gemma
cutoff_len: 512
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16

output_dir: gemma3_4b_full_cpt
logging_steps: 2
save_steps: 50
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: mlflow

per_device_train_batch_size: 1
gradient_accumulation_steps: 2
learning_rate: 1.0e-4
num_train_epochs: 2.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null

ray_run_name: gemma3_4b_full_cpt
ray_storage_path: /mnt/cluster_storage
ray_num_workers: 4
resources_per_worker:
  GPU: 1
  anyscale/accelerator_shape:4xL40S: 0.001
ray_init_kwargs:
  runtime_env:
    env_vars:
      HF_TOKEN: <your_token>
      HF_HUB_ENABLE_HF_TRANSFER: "1"
      MLFLOW_TRACKING_TOKEN: <your_token>
"""
# What the guide's recipe is warned of, and the line that fixes it.
WARNED = {
    "template: gemma replaces the end-of-sequence token": "template: empty",
    "trust_remote_code: true runs Python code": "trust_remote_code: false",
    "overwrite_cache: true makes LLaMA-Factory tokenise again": "overwrite_cache: false",
    "nothing is evaluated on held-out text": "eval_dataset: my_cpt_c4_heldout",
    "preprocessing_num_workers: 16 for 1,000 documents": "preprocessing_num_workers: 1",
}


def test_the_guides_own_recipe_is_warned_of(
    ray, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "guide.yaml").write_text(GUIDE)
    storage = tmp_path / "storage"
    given = ["--config", str(tmp_path / "guide.yaml"), "--storage", str(storage)]
    assert main(["train", "--dry-run", "--run", "guide", *given]) == 1, "no GPU, and ddp_timeout"
    said = capsys.readouterr().out.split("# findings")[1]
    for what, line in WARNED.items():
        (warning,) = (part for part in said.split("\n! ") if what in part)
        assert "guide.yaml" in warning and "expected:" in warning and f"do:       {line}" in warning
    assert said.count("\n! ") == len(WARNED) and f"{len(WARNED)} warnings" in said
    assert "ddp_timeout: 180000000 is out of range" in said


def test_warnings_stop_nothing(
    run: Run, ray, corpus: Path, tiny_gemma3: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The dry run's exit code, the table of notebook 03, and what is printed at launch."""
    recipe = yaml.safe_load((PROJECT / "train-configs" / "cpt_cpu.yaml").read_text())
    guides = yaml.safe_load(GUIDE)
    doubtful = ("template", "trust_remote_code", "overwrite_cache", "preprocessing_num_workers")
    recipe |= {key: guides[key] for key in doubtful} | {"max_samples": 1000, "report_to": "none"}
    recipe |= {"model_name_or_path": str(tiny_gemma3), "dataset": "handbook"}
    for key in ("eval_dataset", "eval_strategy", "eval_steps", "eval_on_start"):
        del recipe[key]
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump(recipe))
    given = ["--config", str(mine), "--storage", str(run.storage), "--run", "warned"]
    given += ["--corpus", str(corpus)]
    assert main(["train", "--dry-run", *given]) == 0
    assert "nothing to fix, 5 warnings" in capsys.readouterr().out
    warned = Run.open("warned", run.storage)
    resolved = resolution.resolve(warned, str(mine), {}, "handbook")
    capsys.readouterr()
    resolution.write(warned, resolved)
    table = preflight.check(warned, resolved).table()
    assert capsys.readouterr().out.count("! recipe: ") == 5
    assert list(table["level"])[:5] == ["warning"] * 5 and set(table["level"][5:]) == {"note"}
    assert all(table["do"][:5]) and not any(table["do"][5:])
    preflight.before_launch(warned, recipes.load(warned))
    said = capsys.readouterr().out
    assert said.count("! recipe: ") == 5 and f"{warned.train_yaml}:" in said
