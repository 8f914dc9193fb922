"""Recipes: every shipped file meets the real parsers, and what cannot work is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from conftest import python

from cpt_helpers import recipes
from cpt_helpers.config import findings, hardware, planning, resolution, validation
from cpt_helpers.data import corpora, mixing, sources
from cpt_helpers.errors import ConfigError, ParameterError, RunExistsError
from cpt_helpers.run import PROJECT, Run
from cpt_helpers.setup.assets import tokenizer_of

RECIPES = sorted((PROJECT / "train-configs").glob("*.yaml"))
DEEPSPEED = sorted((PROJECT / "deepspeed-configs").glob("*.json"))


@pytest.fixture(scope="session")
def prepared(storage: Path, corpus: Path, tiny_gemma3: Path) -> Run:
    """A storage with the corpora a recipe may name."""
    corpora.prepare(str(corpus), storage)
    for name in ("ray_docs", "news"):
        corpora.prepare(name, storage)
    gone = {"gone": {"file_name": "corpora/gone/train.jsonl", "columns": {"prompt": "text"}}}
    corpora.register(storage / corpora.REGISTRY, gone)
    return Run.open("config-tests", storage)


@pytest.fixture
def resolve(prepared: Run, tiny_gemma3: Path):
    def call(
        recipe: str = "cpt_cpu.yaml", corpus: str = "ray_docs", **overrides
    ) -> resolution.Resolved:
        model = {"model_name_or_path": str(tiny_gemma3)}
        return resolution.resolve(prepared, recipe, model | overrides, corpus)

    return call


def test_every_recipe_passes_llamafactorys_parser(tmp_path: Path) -> None:
    """As it stands, but for what no machine of CI has: GPUs (use_cpu) and /mnt/cluster_storage."""
    code = f"""
import json, os, yaml
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                  MASTER_PORT="29512", DS_ACCELERATOR="cpu", USE_RAY="1")
from cpt_helpers.train.patches import join_cpu_group
join_cpu_group()
from llamafactory.hparams import get_ray_args, get_train_args
found = {{}}
for path in {[str(path) for path in RECIPES]!r}:
    args = yaml.safe_load(open(path)) | {{"use_cpu": True}}
    name = os.path.basename(args["deepspeed"])
    args["deepspeed"] = os.path.join({str(PROJECT)!r}, "deepspeed-configs", name)
    args["output_dir"] = {str(tmp_path)!r}
    model, data, training, finetuning, _ = get_train_args(args)
    ray = get_ray_args(args)
    found[os.path.basename(path)] = dict(
        stage=finetuning.stage, kind=finetuning.finetuning_type, template=data.template,
        packing=data.packing, trust=model.trust_remote_code, timeout=training.ddp_timeout,
        cutoff=data.cutoff_len, workers=ray.ray_num_workers, resources=ray.resources_per_worker,
        zero=training.hf_deepspeed_config.config["zero_optimization"]["stage"],
        use_ray=ray.use_ray, eval_on=data.eval_dataset)
print(json.dumps(found))
"""
    found = python(code)
    assert set(found) == {path.name for path in RECIPES}
    for name, values in found.items():
        assert values["stage"] == "pt" and values["packing"] is True, name
        assert values["template"] == "empty" and values["trust"] is False, name
        assert values["timeout"] <= 3600 and values["use_ray"] is True, name
        assert len(values["eval_on"]) == 2, name
    guide = found["cpt_deepspeed.yaml"]
    assert guide["resources"] == {"GPU": 1, "anyscale/accelerator_shape:4xL40S": 0.001}
    assert (guide["workers"], guide["cutoff"], guide["zero"]) == (4, 512, 3)


def test_the_guides_recipe_keeps_the_guides_settings() -> None:
    recipe = yaml.safe_load((PROJECT / "train-configs" / "cpt_deepspeed.yaml").read_text())
    guide = {
        "model_name_or_path": "google/gemma-3-4b-pt",
        "finetuning_type": "full",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2.0,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "bf16": True,
        "dataset": "my_cpt_c4",
        "report_to": "mlflow",
    }
    assert {key: recipe[key] for key in guide} == guide
    assert recipe["output_dir"].startswith("/") and "trust_remote_code" not in recipe
    for path in RECIPES:
        text = path.read_text()
        values = "\n".join(line.split("#")[0] for line in text.splitlines())
        assert "TOKEN" not in values and "<your" not in values, path.name


def test_every_deepspeed_file_passes_deepspeeds_own_class() -> None:
    code = f"""
import json, os
os.environ["DS_ACCELERATOR"] = "cpu"
from deepspeed.runtime.config import DeepSpeedConfig
found = {{}}
numbers = {{"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4,
           "gradient_accumulation_steps": 2, "gradient_clipping": 1.0}}
for path in {[str(path) for path in DEEPSPEED]!r}:
    raw = json.load(open(path))
    assert {{key for key, value in raw.items() if value == "auto"}} == set(numbers)
    raw |= numbers
    raw["fp16"]["enabled"], raw["bf16"]["enabled"] = False, True
    zero = raw["zero_optimization"]
    raw["zero_optimization"] = {{k: v for k, v in zero.items() if v != "auto"}}
    made = DeepSpeedConfig(raw)
    found[os.path.basename(path)] = [made.zero_optimization_stage,
        bool(made.zero_config.offload_optimizer), bool(made.zero_config.offload_param),
        made.zero_config.gather_16bit_weights_on_model_save]
print(json.dumps(found))
"""
    assert python(code) == {
        "ds_z1_config.json": [1, False, False, False],
        "ds_z2_config.json": [2, False, False, False],
        "ds_z3_config.json": [3, False, False, True],
        "ds_z3_offload_config.json": [3, True, True, True],
    }


def test_the_shipped_registry_names_the_built_in_corpora() -> None:
    shipped = corpora.read_registry(PROJECT / "dataset-configs" / "dataset_info.json")
    assert set(shipped) == {n + s for n in sources.BUILTIN for s in ("", recipes.HELD_OUT)}
    for name in sources.BUILTIN:
        assert corpora.entries_of(name).items() <= shipped.items()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_checkpoint_of_a_recipe_has_a_held_out_loss(path: Path) -> None:
    """Without one a checkpoint cannot be the best; and the curve has a point between its ends."""
    recipe = yaml.safe_load(path.read_text("utf-8"))
    assert recipe["save_steps"] % recipe["eval_steps"] == 0
    assert recipe["eval_steps"] < recipe.get("max_steps", float("inf"))


def test_resolving_makes_paths_absolute_and_the_runs_own(resolve, prepared: Run) -> None:
    resolved = resolve(max_steps=7)
    args = resolved.args
    assert args["output_dir"] == str(prepared.output)
    assert args["dataset_dir"] == args["ray_storage_path"] == str(prepared.storage)
    assert args["deepspeed"] == str(prepared.config_dir / "ds_z3_config.json")
    assert args["ray_run_name"] == "config-tests" and args["max_steps"] == 7
    why = {change.key: change.why for change in resolved.changes}
    assert why["max_steps"] == "OVERRIDES" and why["output_dir"] == "the run's own"
    written = resolution.write(prepared, resolved)
    assert recipes.load(prepared) == args and written == prepared.train_yaml
    assert json.loads(Path(args["deepspeed"]).read_text())["zero_optimization"]["stage"] == 3


def test_a_corpus_of_ones_own_takes_both_places(resolve) -> None:
    args = resolve(corpus="handbook").args
    assert args["dataset"] == "handbook"
    assert args["eval_dataset"] == "handbook_heldout,news_heldout"
    assert args.held_out == {"domain": "handbook_heldout", "general": "news_heldout"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"learnin_rate": 1e-4}, r"unknown key 'learnin_rate'(?s:.*)nearest known: learning_rate"),
        ({"lr_scheduler_type": "cosin"}, r"lr_scheduler_type: 'cosin' is not a choice"),
        ({"max_steps": "many"}, r"max_steps: 'many' is not a number"),
        ({"cutoff_len": 0}, r"cutoff_len: 0"),
        ({"ray_num_workers": 0}, r"ray_num_workers: 0"),
        ({"eval_dataset": "nonews"}, r"unknown dataset 'nonews'"),
        ({"eval_dataset": "gone"}, r"registered, but its file is missing"),
        ({"deepspeed": "ds_z4_config.json"}, r"'ds_z4_config.json' does not exist(?s:.*)ds_z3"),
        ({"hf_hub_token": "hf_canary"}, r"holds a secret, hf_hub_token"),
        (
            {"ray_init_kwargs": {"runtime_env": {"env_vars": {"X": "hf_canary_0123456789"}}}},
            r"holds a secret, ray_init_kwargs\.runtime_env\.env_vars\.X",
        ),
        (
            {"run_name": None, "adapter_name_or_path": "<your_adapter>"},
            r"a placeholder was left in",
        ),
    ],
)
def test_what_cannot_work_is_refused(resolve, overrides: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        resolve(**overrides)
    assert "hf_canary" not in str(refused.value)


def test_a_token_where_guides_put_it_is_taken_out(resolve, monkeypatch) -> None:
    """And handed to the workers by memory, where it was a real one."""
    from cpt_helpers.train.worker_env import worker_environment

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "mine")
    variables = {"HF_TOKEN": "hf_canary_0123456789", "MLFLOW_TRACKING_TOKEN": "<your_token>"}
    variables["HF_HUB_ENABLE_HF_TRANSFER"] = "1"
    resolved = resolve(ray_init_kwargs={"runtime_env": {"env_vars": variables}})
    kept = {"runtime_env": {"env_vars": {"HF_HUB_ENABLE_HF_TRANSFER": "1"}}}
    assert resolved.args["ray_init_kwargs"] == kept
    assert "canary" not in str(resolved.args) + str(resolved.changes)
    handed = worker_environment(resolved.args)
    assert handed["HF_TOKEN"] == "hf_canary_0123456789"
    assert "MLFLOW_TRACKING_TOKEN" not in handed, "workers report nothing to MLflow"
    monkeypatch.delenv("HF_TOKEN")


def test_a_recipe_that_is_not_there_or_not_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not exist(?s:.*)cpt_cpu\.yaml"):
        recipes.read_recipe("cpt_gpu.yaml")
    (tmp_path / "bad.yaml").write_text("stage: pt\n  do_train: [\n")
    with pytest.raises(ConfigError, match=r"not YAML(?s:.*)bad\.yaml:2"):
        recipes.read_recipe(str(tmp_path / "bad.yaml"))
    (tmp_path / "typo.yaml").write_text("stage: pt\nuse_cpu: true\nlearning_rat: 1\n")
    with pytest.raises(ConfigError, match=r"'learning_rat'(?s:.*)typo\.yaml:3"):
        validation.refuse(
            validation.keys(*reversed(recipes.read_recipe(str(tmp_path / "typo.yaml"))), {})
        )


def test_the_plan_is_what_the_trainer_does() -> None:
    args = recipes.Recipe(
        cutoff_len=256, per_device_train_batch_size=4, ray_num_workers=2, dataset="d"
    )
    plan = planning.plan(args | {"max_steps": 30}, blocks=3493, dropped=444)
    assert (plan.global_batch, plan.tokens_per_step, plan.steps) == (8, 2048, 30)
    assert plan.tokens == 61440
    epochs = planning.plan(args | {"num_train_epochs": 2.0}, blocks=3493, dropped=0)
    assert epochs.steps == 2 * 437  # ⌈⌈3493 / 2⌉ / 4⌉ steps an epoch
    # The guide's run: 100 documents made 20 steps of 8 blocks in 2 epochs.
    guide = {"cutoff_len": 512, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    guide |= {"ray_num_workers": 4, "num_train_epochs": 2.0, "dataset": "c4"}
    assert planning.plan(recipes.Recipe(guide), blocks=80, dropped=0).steps == 20


def test_a_corpus_that_is_too_small() -> None:
    args = recipes.Recipe(
        cutoff_len=256, per_device_train_batch_size=4, ray_num_workers=2, dataset="d"
    )
    with pytest.raises(ConfigError, match="too small: 99 tokens, not one block"):
        planning.plan(args, blocks=0, dropped=99)
    with pytest.raises(ConfigError, match=r"too small for 30 steps: 80 blocks last 10"):
        planning.plan(args | {"max_steps": 30}, blocks=80, dropped=0)


def test_memory_by_zero_stage() -> None:
    size = planning.model_size(planning.known_config("gemma-3-4b-pt"), "gemma")
    assert size.parameters == 4_300_079_472  # as published
    gib = [worker for worker, _ in hardware.deepspeed_estimates(size, workers=4).values()]
    assert gib == sorted(gib, reverse=True), "each stage needs less than the one before"
    assert gib[0] == pytest.approx(20 * size.parameters / 2**30, rel=1e-3)
    assert gib[3] < 24 < 44.98 < gib[0]  # stage 3 fits an L40S, plain data parallelism does not


def test_the_learning_rate_warms_up_and_falls() -> None:
    recipe = recipes.read_recipe("cpt_cpu.yaml")[1]
    rates = planning.learning_rates(recipe | {"max_steps": 30}, 30)
    peak = float(recipe["learning_rate"])
    assert len(rates) == 30 and rates[0] == 0 and max(rates) == pytest.approx(peak)
    assert rates[-1] == pytest.approx(0.1 * peak, rel=0.1)


def test_a_trained_run_keeps_its_settings(resolve, prepared: Run) -> None:
    run = Run.open("config-tests-trained", prepared.storage)
    resolution.write(run, resolution.resolve(run, "cpt_cpu.yaml", {}, "ray_docs"))
    resolution.write(
        run, resolution.resolve(run, "cpt_cpu.yaml", {"max_steps": 3}, "ray_docs")
    )  # untrained
    run.metrics.write_text('{"event": "start", "step": 0}\n')
    resolution.write(run, resolution.resolve(run, "cpt_cpu.yaml", {"max_steps": 3}, "ray_docs"))
    with pytest.raises(RunExistsError, match="max_steps was 3, is 4"):
        resolution.write(run, resolution.resolve(run, "cpt_cpu.yaml", {"max_steps": 4}, "ray_docs"))
    assert recipes.load(run)["max_steps"] == 3


def test_packing_is_left_to_the_stage(resolve) -> None:
    assert "packing" not in resolve(packing=True).args


def test_precision_follows_the_cpu(resolve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolution, "cpu_has_bf16", lambda: False)
    assert resolve().args["bf16"] is False
    assert resolve(bf16=True).args["bf16"] is True  # asked for is asked for
    monkeypatch.setattr(resolution, "cpu_has_bf16", lambda: True)
    assert resolve().args["bf16"] is True


def test_whole_numbers_written_with_a_point_are_whole(resolve) -> None:
    assert repr(resolve(max_steps=7.0).args["max_steps"]) == "7"


@pytest.mark.parametrize("template", ["gemma", "gemma3", "chatml", "llama3"])
def test_a_template_that_replaces_the_end_token_is_a_warning(resolve, template: str) -> None:
    (warning,) = resolve(template=template).warnings
    assert "replaces the end-of-sequence token <eos> by <" in str(warning)
    assert warning.do == "template: empty" and warning.where == "OVERRIDES: template"


def test_templates_that_keep_the_end_token(resolve, tiny_gemma3: Path, tmp_path: Path) -> None:
    """Also one that would replace it, where the tokenizer ends documents by that token already."""
    assert resolve().warnings == () and resolve(template="default").warnings == ()
    tokenizer = tokenizer_of(str(tiny_gemma3))
    tokenizer.eos_token = "<end_of_turn>"
    tokenizer.save_pretrained(tmp_path)
    args = {"template": "gemma", "model_name_or_path": str(tmp_path)}
    assert findings.replaced_end_token(args) is None
    hub = args | {"model_name_or_path": "google/gemma-3-4b-pt"}
    assert findings.replaced_end_token(hub) == ("of the model", "<end_of_turn>")


def test_an_evaluation_that_is_missing_and_one_that_is_declined(resolve) -> None:
    (warning,) = resolve(eval_strategy=None, eval_steps=None).warnings
    assert warning.do == "eval_strategy: steps\neval_steps: 50"
    assert resolve(eval_strategy="no", eval_on_start=False).warnings == ()


def test_documents_per_process(resolve, prepared: Run) -> None:
    """The corpus is counted where step 2 has prepared it, and ``max_samples`` bounds it."""
    count = corpora.load("news", prepared.storage).documents
    held_out = {"eval_dataset": "news_heldout"}
    (warning,) = resolve(corpus="news", preprocessing_num_workers=16, **held_out).warnings
    assert f"preprocessing_num_workers: 16 for {count:,} documents" in str(warning)
    assert resolve(corpus="news", preprocessing_num_workers=1, **held_out).warnings == ()
    (warning,) = resolve(preprocessing_num_workers=4, max_samples=3000).warnings
    assert warning.do == "preprocessing_num_workers: 3"
    assert resolve(preprocessing_num_workers=2, max_samples=3000).warnings == ()


def test_what_runs_share_cannot_name_a_run(tmp_path: Path, corpus: Path, tiny_gemma3: Path) -> None:
    """Whatever the preparation of a run leaves next to the runs."""
    made = corpora.prepare(str(corpus), tmp_path)
    recipe = recipes.read_recipe("cpt_cpu.yaml")[1] | {"cutoff_len": 64}
    mixing.for_recipe(recipe, [(made, 1.0)], [made], tokenizer_of(str(tiny_gemma3)))
    shared = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert {"corpora", "tokenised", "dataset_info.json"} <= shared
    (tmp_path / "a-file").write_text("")
    for name in (*shared, "Tokenised", "models", "mlflow", "adapters", "a-file"):
        with pytest.raises(ParameterError, match="cannot name a run"):
            Run.open(name, tmp_path)
    assert Run.open("tokenised-2", tmp_path).folder.name == "tokenised-2"
