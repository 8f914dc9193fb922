"""The six notebooks for real: a tiny Gemma-3 through Ray, DeepSpeed ZeRO-3 and LLaMA-Factory."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import papermill
import pytest
import yaml
from nodes import Node, can_hide, cluster

from cpt_helpers import checkpoints, pipeline, recipes
from cpt_helpers.checkpoints import manifests
from cpt_helpers.data import corpora
from cpt_helpers.errors import RunExistsError, TrainingError
from cpt_helpers.export import evaluation, model_registry, quantization
from cpt_helpers.notebook import begin
from cpt_helpers.run import PROJECT, STEPS, Run
from cpt_helpers.setup import assets, models
from cpt_helpers.train import launch, tracking

pytestmark = pytest.mark.training

# No real ones; a file that holds one of these holds whatever a user's environment has.
CANARIES = {
    "HF_TOKEN": "hf_canary0of0the0walkthrough",
    "MLFLOW_TRACKING_TOKEN": "canary-of-the-tracking-server",
    "MLFLOW_TRACKING_PASSWORD": "canary-of-a-password",
    "DATABRICKS_TOKEN": "dapi0c0ffee0c0ffee0canary",
    "AWS_ACCESS_KEY_ID": "AKIA0CANARY0CANARY00",  # Ray Tune would have Ray log these two
    "AWS_SECRET_ACCESS_KEY": "canary/of/a/key/to/buckets",
}
URI_CANARY = "canary-inside-a-uri"  # the password of MLFLOW_TRACKING_URI
STEPS_TAKEN, BLOCK, WORKERS, MICRO = 12, 64, 2, 2


@pytest.fixture(scope="module")
def parameters(corpus: Path, tiny_gemma3: Path) -> dict:
    return {
        "TRAIN_CONFIG": "cpt_cpu.yaml",
        "QUANTIZE": "W8A16",
        "CORPUS": str(corpus),
        "OVERRIDES": {
            "model_name_or_path": str(tiny_gemma3),
            "cutoff_len": BLOCK,
            "max_steps": STEPS_TAKEN,
            "save_steps": 5,  # 5, 10, and the last
            "save_total_limit": 3,
            "eval_steps": 5,
            "per_device_train_batch_size": MICRO,
            "learning_rate": 5e-3,
            "bf16": False,
        },
    }


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the walkthrough is started; the storage is elsewhere."""
    return tmp_path_factory.mktemp("here")


@pytest.fixture(scope="module")
def walked(storage: Path, parameters: dict, here: Path) -> Run:
    run = Run.open("walkthrough", storage)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        for name, secret in CANARIES.items():
            patch.setenv(name, secret)
        pipeline.run_all(run, parameters)
    return run


@pytest.fixture(scope="module")
def results(walked: Run) -> dict:
    return json.loads(walked.results_json.read_text())


def test_it_trained_what_was_planned(walked: Run, results: dict) -> None:
    tokens = STEPS_TAKEN * MICRO * WORKERS * BLOCK
    assert results["plan"]["steps"] == results["train"]["steps"] == STEPS_TAKEN
    assert results["plan"]["tokens"] == results["train"]["tokens"] == tokens
    assert (results["train"]["workers"], results["train"]["zero_stage"]) == (WORKERS, 3)
    steps = [event for event in walked.events() if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, STEPS_TAKEN + 1))
    assert steps[0]["loss"] == pytest.approx(math.log(512), rel=0.1)  # it knows nothing yet
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3
    rate = tokens / STEPS_TAKEN / results["train"]["tokens_per_second"]
    assert min(e["seconds"] for e in steps) <= rate <= max(e["seconds"] for e in steps)


def test_mfu_is_tokens_times_flops_by_the_peak(walked: Run, results: dict) -> None:
    (start,) = (event for event in walked.events() if event["event"] == "start")
    peak = sum(rank["peak_flops"] for rank in start["ranks"])
    assert 1e9 < peak < 1e14, "two CPU cores"
    steps = [event for event in walked.events() if event["event"] == "step"]
    for step in steps:
        flops = step["tokens_per_second"] * start["flops_per_token"]
        assert step["mfu"] == pytest.approx(flops / peak, abs=2e-4)
    assert 0 < results["train"]["mfu"] < 1
    assert results["train"]["peak_memory"] >= max(step["memory"] for step in steps) > 2**28


def test_the_logs_show_two_ranks_under_zero_3(walked: Run) -> None:
    said = launch.evidence(walked).to_string()
    assert "rank-0" in said and "rank-1" in said and "world size: 2" in said
    assert "ZeRO stage 3" in (walked.logs / "rank-0.log").read_text()


def test_each_rank_has_its_shard_and_each_checkpoint_is_there_once(walked: Run) -> None:
    found = manifests.listing(walked)
    assert [c.step for c in found] == [5, 10, STEPS_TAKEN]
    for checkpoint in found:
        assert checkpoints.ranks_with_shards(checkpoint) == [0, 1]
        names = set(checkpoints.files(checkpoint)["file"])
        assert {
            "model.safetensors",
            "tokenizer.json",
            "rng_state_0.pth",
            "rng_state_1.pth",
        } <= names
        assert "TorchTrainer_" in str(checkpoint.path) and checkpoint.path.name.startswith(
            "checkpoint_"
        )
    assert not list(walked.output.glob("checkpoint-*")), "a second copy beside Ray's"
    assert not list(walked.output.glob(".rank-*"))


def test_perplexity_is_what_plain_transformers_measures(
    walked: Run, results: dict, tiny_gemma3: Path
) -> None:
    """Before: the base model. After: the exported one. Neither by the trainer."""
    for role, name in (("domain", "handbook"), ("general", "news")):
        texts = list(corpora.texts_of(corpora.load(name, walked.storage).heldout))
        for when, folder in (("before", tiny_gemma3), ("after", walked.export)):
            model, tokenizer = models.load(folder, dtype="float32")
            again = evaluation.perplexity(model, tokenizer, texts, BLOCK)
            assert results["perplexity"][role][when] == pytest.approx(again, rel=1e-3), (role, when)
    domain = results["perplexity"]["domain"]
    assert domain["after"] < 0.8 * domain["before"]
    assert results["export"]["perplexity"]["domain"] == pytest.approx(domain["after"], rel=1e-3)


def test_the_export_is_the_checkpoint_and_nothing_more(walked: Run, results: dict) -> None:
    from safetensors.torch import load_file

    assert results["export"]["path"] == str(walked.export)
    assert results["export"]["dtype"] == "float32"
    names = {path.name for path in walked.export.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= names
    assert not {"training_args.bin", "trainer_state.json", "optimizer.pt"} & names
    trained = load_file(manifests.latest(walked).model / "model.safetensors")
    exported = load_file(walked.export / "model.safetensors")
    assert set(exported) <= set(trained)
    assert all(exported[name].equal(trained[name]) for name in exported)
    special = json.loads((walked.export / "special_tokens_map.json").read_text())
    assert special["eos_token"]["content"] == "<eos>"


def test_every_step_left_its_results(walked: Run, results: dict) -> None:
    assert set(results["notebooks"]) == set(STEPS)
    assert all(step["seconds"] > 0 for step in results["notebooks"].values())
    assert results["versions"]["llamafactory"] == "0.9.3"
    for step in STEPS:
        copy = json.loads((walked.notebooks / f"{step}.ipynb").read_text())
        assert not any(
            output["output_type"] == "error"
            for cell in copy["cells"]
            for output in cell.get("outputs", [])
        )
    size = (walked.notebooks / "04_train.ipynb").stat().st_size
    images = sum(
        len(output.get("data", {}).get("image/png", ""))
        for cell in json.loads((walked.notebooks / "04_train.ipynb").read_text())["cells"]
        for output in cell.get("outputs", [])
    )
    assert size - images < 40_000, "the training's log is in the notebook"


def test_mlflow_has_the_run(walked: Run) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{walked.mlflow_db}")
    experiment = client.get_experiment_by_name("cpt")
    runs = client.search_runs([experiment.experiment_id])
    assert [run.info.run_name for run in runs] == ["walkthrough"]
    losses = client.get_metric_history(runs[0].info.run_id, "loss")
    logged = [event["loss"] for event in walked.events() if event["event"] == "step"]
    assert [metric.value for metric in sorted(losses, key=lambda m: m.step)] == logged


def test_held_out_documents_were_not_trained_on(walked: Run) -> None:
    args = recipes.load(walked)
    assert args["dataset"] == "handbook"
    corpus = corpora.load("handbook", walked.storage)
    assert not set(corpora.texts_of(corpus.train)) & set(corpora.texts_of(corpus.heldout))


def test_fewer_bits_are_written_and_the_export_is_registered(walked: Run, results: dict) -> None:
    full, fewer = results["export"]["forms"]
    assert (full["weights"], fewer["weights"]) == ("float32", "W8A16")
    assert fewer["MB"] < full["MB"]
    for role, value in results["export"]["perplexity"].items():
        assert full[f"perplexity, {role}"] == value
        assert fewer[f"perplexity, {role}"] == pytest.approx(value, rel=0.02)
    note = json.loads((walked.folder / "export-w8a16" / quantization.NOTE).read_text())
    assert note["model"] == str(walked.export)
    assert results["export"]["registered"] == 1
    folder, tags = model_registry.registered(f"sqlite:///{walked.mlflow_db}", walked.name)
    assert folder == walked.export and tags["cpt.data"] == recipes.load(walked)["dataset"]


def said_in(copy: Path, stream: str) -> str:
    """What an executed notebook printed to one of its streams."""
    cells = json.loads(copy.read_text("utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "".join("".join(o["text"]) for o in outputs if o.get("name") == stream)


def results_in(copy: Path) -> str:
    """The values of an executed notebook's cells, as plain text."""
    cells = json.loads(copy.read_text("utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "".join("".join(o["data"]["text/plain"]) for o in outputs if "data" in o)


def test_nothing_is_written_elsewhere_and_no_migrations_are_printed(
    walked: Run, here: Path
) -> None:
    assert list(here.iterdir()) == []
    for step in STEPS:
        said = said_in(walked.notebooks / f"{step}.ipynb", "stderr")
        assert "alembic" not in said and "INFO" not in said, step


def test_step_6_continues_the_prompt_of_step_1(walked: Run) -> None:
    asked = walked.read_step("01_setup")["model"]
    assert asked["continuation"] in said_in(walked.notebooks / "01_setup.ipynb", "stdout")
    shown = results_in(walked.notebooks / "06_export.ipynb")
    _, _, continued = shown.partition(asked["prompt"] + "\n  base:")
    assert continued.splitlines()[1].startswith("  trained:")


def test_every_checkpoint_can_be_the_best(walked: Run) -> None:
    for checkpoint in manifests.listing(walked):
        assert {"handbook_heldout", "news_heldout"} <= set(checkpoint.losses), checkpoint.step


def test_the_small_runs_are_equal_and_a_failed_demonstration_is_a_warning(
    walked: Run, results: dict, tmp_path: Path
) -> None:
    assert results["fault_demo"]["same_losses"] and results["fault_demo"]["same_weights"]
    assert results["notebooks"]["05_checkpoints"]["warnings"] == []
    weights = walked.folder / "fault_demo" / "killed" / "output" / "model.safetensors"
    records = walked.step_json("05_checkpoints"), walked.results_json
    kept = [path.read_text() for path in records]
    aside = weights.rename(tmp_path / "weights")
    given = {"RUN_NAME": walked.name, "STORAGE": str(walked.storage)}
    try:
        papermill.execute_notebook(
            pipeline.NOTEBOOKS / "05_checkpoints.ipynb", tmp_path / "05.ipynb", given,
            progress_bar=False, kernel_name="python3",
        )  # fmt: skip
        again = walked.read_step("05_checkpoints")
        assert "model.safetensors" in again["fault_demo"]["failed"]
        (warning,) = again["notebooks"]["05_checkpoints"]["warnings"]
        assert f"⚠ not shown: {warning}" in said_in(tmp_path / "05.ipynb", "stdout")
        assert f"not shown: {warning}" in pipeline.summary_table(walked)
        begin("06_export", needs="05_checkpoints", **given)
    finally:
        shutil.move(aside, weights)
        for path, text in zip(records, kept, strict=True):
            path.write_text(text)


def test_again_is_the_same_and_trains_nothing(walked: Run, parameters: dict, results: dict) -> None:
    before = walked.metrics.read_bytes()
    pipeline.run_all(walked, parameters)
    assert walked.metrics.read_bytes() == before
    again = json.loads(walked.results_json.read_text())
    for key in ("train", "perplexity", "export", "plan", "data", "checkpoints"):
        assert again[key] == results[key], key


def test_its_name_is_not_given_to_another_training(walked: Run, parameters: dict) -> None:
    before = {path: path.stat().st_mtime_ns for path in walked.folder.rglob("*") if path.is_file()}
    other = parameters["OVERRIDES"] | {"max_steps": 3}
    given = {"RUN_NAME": walked.name, "STORAGE": str(walked.storage)}
    with pytest.raises(RunExistsError, match="has been trained with other settings"):
        begin("03_config", needs="02_data", **given, TRAIN_CONFIG="cpt_cpu.yaml", OVERRIDES=other)
    changed = parameters | {"OVERRIDES": other}
    with pytest.raises(RunExistsError, match="OVERRIDES was"):
        pipeline.run_all(walked, changed)
    after = {path: path.stat().st_mtime_ns for path in before if path.exists()}
    assert after == before, "something was overwritten"


def test_an_interrupted_run_goes_on_to_the_same_weights(walked: Run) -> None:
    """Interrupted after step 10, by all its files say: it goes on from there, bit for bit."""
    run = Run.open("resumed", walked.storage)
    shutil.copytree(walked.folder, run.folder)
    (_, ten, last) = manifests.listing(run)
    shutil.rmtree(last.path)
    shutil.rmtree(run.output)
    events = [event for event in walked.events() if event["step"] <= 10]
    run.metrics.write_text("".join(json.dumps(event) + "\n" for event in events))
    assert run.state == "started" and manifests.latest(run) == ten
    own = {"output_dir": str(run.output), "ray_run_name": run.name, "report_to": "none"}
    launch.train(run, recipes.load(walked) | own)
    ours = [event for event in run.events() if event["event"] == "step"]
    theirs = [event for event in walked.events() if event["event"] == "step"]
    assert [(e["step"], e["loss"]) for e in ours] == [(e["step"], e["loss"]) for e in theirs]
    weights = [r.output / "model.safetensors" for r in (run, walked)]
    assert assets.sha256(weights[0]) == assets.sha256(weights[1])


def test_a_failing_worker_is_one_readable_error(walked: Run) -> None:
    """A template LLaMA-Factory does not know passes every check of ours and stops in the worker."""
    run = Run.open("failing", walked.storage)
    args = recipes.load(walked) | {"template": "no_such_template", "report_to": "none"}
    args |= {"output_dir": str(run.output), "ray_run_name": run.name}
    with pytest.raises(TrainingError) as failed:
        launch.train(run, args)
    message = str(failed.value)
    assert "training failed in a worker: ValueError: Template no_such_template" in message
    assert str(run.logs / "rank-") in message
    assert "ray::" not in message and len(message.splitlines()) < 25
    assert run.state == "new"


def test_no_secret_is_in_any_file(walked: Run) -> None:
    """The run, its notebooks and logs, MLflow's store, Ray's session: and the workers had them."""
    first = min(event["time"] for event in walked.events())
    assert "HF_TOKEN" in (walked.logs / "rank-1.log").read_text()
    sessions = [p for p in Path("/tmp/ray").glob("session_2*") if p.stat().st_mtime > first - 600]
    assert sessions, "Ray's session folder is elsewhere"
    assert not holding(CANARIES.values(), walked.storage, *sessions)
    planted = walked.storage / "planted"
    planted.write_text(f"x{CANARIES['HF_TOKEN']}x")
    assert holding(CANARIES.values(), walked.storage) == [planted]
    planted.unlink()


def holding(secrets: Iterable[str], *folders: Path) -> list[Path]:
    """Files that hold one of the secrets, whatever kind of files they are."""
    wanted = [secret.encode() for secret in secrets]
    return [
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and any(secret in path.read_bytes() for secret in wanted)
    ]


@pytest.fixture(scope="module")
def spread(walked: Run, mlflow_server: str) -> Run:
    """The same training on two nodes, the second of which shares only the storage."""
    if not can_hide():
        pytest.skip("needs mounts of its own (root, or user namespaces)")
    run = Run.open("spread", walked.storage)
    args = recipes.load(walked) | {"placement_strategy": "STRICT_SPREAD"}
    own = {"output_dir": run.output, "ray_run_name": run.name, "run_name": run.name}
    args |= {key: str(value) for key, value in own.items()}
    read_on_import = {"TORCH_DISTRIBUTED_DEBUG": "INFO"}
    args["ray_init_kwargs"] = {"runtime_env": {"env_vars": read_on_import}}
    run.config_dir.mkdir(parents=True)
    run.train_yaml.write_text(yaml.safe_dump(dict(args)))
    shutil.copy(args["deepspeed"], run.config_dir)
    tests = str(Path(__file__).parent)
    path = f"{tests}:{os.environ.get('PYTHONPATH', '')}"
    strange = Node(hides=[PROJECT / "cpt_helpers", Path("/tmp/ray")])
    uri = mlflow_server.replace("://", f"://someone:{URI_CANARY}@")
    witness = {"PYTHONPATH": path, "CPT_FAULTS": json.dumps([{"what": "witness"}])}
    with cluster(1, strange, **witness) as address:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "faults.drive", run.storage, run.name, "{}"],
            env=os.environ | CANARIES | {"RAY_ADDRESS": address, "MLFLOW_TRACKING_URI": uri}
            | {"PYTHONPATH": path},
            capture_output=True, text=True, timeout=400,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert URI_CANARY not in done.stdout + done.stderr
    return run


def test_two_nodes_end_in_the_same_weights(walked: Run, spread: Run) -> None:
    weights = [r.output / "model.safetensors" for r in (walked, spread)]
    assert assets.sha256(weights[0]) == assets.sha256(weights[1])
    losses = [[e["loss"] for e in r.events() if e["event"] == "step"] for r in (walked, spread)]
    assert losses[0] == losses[1]
    seen = [json.loads((spread.folder / f".witness-{rank}.json").read_text()) for rank in (0, 1)]
    assert seen[0]["node"] != seen[1]["node"]
    assert seen[0]["scratch"] != seen[1]["scratch"], "they share a disk beside the storage"
    token = hashlib.sha256(CANARIES["HF_TOKEN"].encode()).hexdigest()
    for rank in seen:
        assert rank["debug"] == "DebugLevel.INFO", "a variable of the recipe came after torch"
        assert rank["token"] == token, "the driver's token did not reach a node started without it"
    packages = [rank["package"] for rank in seen]
    assert any("py_modules" in package for package in packages), "cpt_helpers was not shipped"
    assert [c.step for c in manifests.listing(spread)] == [5, 10, STEPS_TAKEN]
    assert not holding([*CANARIES.values(), URI_CANARY], spread.folder)


def test_a_tracking_server_has_everything(spread: Run, mlflow_server: str, tmp_path: Path) -> None:
    import mlflow

    client = mlflow.MlflowClient(mlflow_server)
    experiment = client.get_experiment_by_name("cpt")
    named = "attributes.run_name = 'spread'"  # the server has other tests' runs too
    (found,) = client.search_runs([experiment.experiment_id], named)
    assert (found.info.run_name, found.info.status) == ("spread", "FINISHED")
    keys = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu", "memory_gib")
    for key in keys:
        values = client.get_metric_history(found.info.run_id, key)
        assert sorted(m.step for m in values) == list(range(1, STEPS_TAKEN + 1)), key
        assert all(m.value > 0 for m in values if key != "learning_rate"), key
    assert found.data.params["max_steps"] == str(STEPS_TAKEN)
    exported = {"path": str(tmp_path), "dtype": "float32"}
    mlflow.set_tracking_uri(f"sqlite:///{spread.mlflow_db}")  # as another run of this kernel may
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
        tracking.add_export(spread, recipes.load(spread), exported)
        mlflow.set_tracking_uri(mlflow_server)
    where = Path(client.download_artifacts(found.info.run_id, "", str(tmp_path)))
    names = {str(path.relative_to(where)) for path in where.rglob("*") if path.is_file()}
    assert {"figures/training.png", "config/train.yaml", "export.json"} <= names
    assert "config/ds_z3_config.json" in names
    assert json.loads((where / "export.json").read_text()) == exported
    assert client.get_run(found.info.run_id).data.tags["cpt.export"] == str(tmp_path)
    assert not holding(CANARIES.values(), tmp_path)
    assert not any(secret in str(found.data.params) for secret in CANARIES.values())
