"""A run folder written by release 0.1.0: this release reads it, or refuses it with a message."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from cpt_helpers import display, notebook, pipeline, plots, recipes
from cpt_helpers.checkpoints import manifests
from cpt_helpers.errors import RunExistsError, StepError
from cpt_helpers.run import Run
from cpt_helpers.train import launch

START = {
    "event": "start", "step": 0, "time": 1040.0, "max_steps": 2, "world_size": 2,
    "tokens_per_step": 512, "optimizer": "DeepSpeedZeroOptimizer_Stage3", "zero_stage": 3,
    "parameters": {"all": 1000, "trained": 1000}, "ranks": [], "resumed_from": None,
    "flops_per_token": 1e6, "memory_before": 1, "eval_on_start": True, "eval_strategy": "steps",
}  # fmt: skip
STEP = {"event": "step", "learning_rate": 1e-4, "grad_norm": 1.0, "seconds": 4.0}
STEP |= {"tokens_per_second": 128.0, "mfu": 0.5, "memory": 2**30}
EVENTS = [  # without ``attempt`` and ``weights``, which 0.2.0 added to a start
    START,
    {"event": "eval", "step": 0, "time": 1042.0, "dataset": "news_heldout", "loss": 3.5},
    STEP | {"step": 1, "time": 1046.0, "loss": 3.5},
    STEP | {"step": 2, "time": 1050.0, "loss": 3.1},
    {"event": "eval", "step": 2, "time": 1052.0, "dataset": "news_heldout", "loss": 3.0},
    {"event": "save", "step": 2, "time": 1055.0, "bytes": 7, "seconds": 3.0, "path": "p"},
    {"event": "end", "step": 2, "time": 1056.0, "memory": [2**30, 2**30]},
]
DATA = {"TRAIN_CONFIG": "cpt_cpu.yaml", "OVERRIDES": {}, "CORPUS": "news", "TEXT_COLUMN": "text"}
DATA |= {"MAX_SAMPLES": 0, "TOLERATE": 0.0, "CLEAN": {}, "REPLAY": {}, "EPOCHS": 1}


@pytest.fixture
def old(tmp_path: Path) -> Run:
    run = Run("old", tmp_path)
    for folder in (run.config_dir, run.logs, run.folder / "results"):
        folder.mkdir(parents=True)
    run.train_yaml.write_text("max_steps: 2\ndataset: news\neval_dataset: news_heldout\n")
    run.metrics.write_text("".join(json.dumps(event) + "\n" for event in EVENTS))
    (run.logs / "launched.json").write_text('{"launched": [1000.0]}')
    recorded = {
        "02_data": {"data": {"name": "news", "blocks": 9}, "parameters": DATA},
        "04_train": {
            "train": {"steps": 2, "tokens": 1024, "tokens_per_second": 128.0, "seconds": 56.0},
            "perplexity": {"domain": {"before": 33.1, "after": 20.1}},
            "tracking": None,
            "parameters": {},
        },
        "05_checkpoints": {"survival": None, "parameters": {}},
        "06_export": {"export": {"path": "/old/export", "dtype": "bf16"}, "parameters": {}},
    }
    for step, values in recorded.items():
        run.record(step, values | {"notebooks": {step: {"seconds": 60.0}}})  # without warnings
    whole = run.folder / "TorchTrainer_2026-11-22_00-00-00" / "checkpoint_000000"
    weights = whole / "checkpoint" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"weights")
    manifest = {
        "step": 2, "world_size": 2, "losses": {"news_heldout": 3.0},
        "written": "2026-11-22T00:00:00+0000", "versions": {"ray": "2.48.0"},
        "files": {
            "checkpoint/model.safetensors": {
                "bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest(), "rank": 0
            }
        },
    }  # fmt: skip
    (whole / "manifest.json").write_text(json.dumps(manifest))
    return run


def test_its_events_results_and_checkpoints_are_read(old: Run) -> None:
    assert old.state == "complete" and len(old.events()) == len(EVENTS)
    assert display.progress(old) == (2, 2, "trained")
    assert display.progress(old, "0001")[2].startswith("workers are starting")
    assert recipes.load(old).held_out == {"domain": "news_heldout"}
    measured = plots.perplexities(old, {"domain": "news_heldout"})
    assert measured == {"domain": {"before": 33.115, "after": 20.086}}
    assert plots.costs(old)["tokens_per_second"] == 128.0
    assert sum(plots.time_spent(old).values()) == 56.0
    assert launch.summary(old)["launches"] == 1
    assert "1,024 tokens in 2 steps" in pipeline.summary_table(old)
    checkpoint = manifests.latest(old)
    assert checkpoint is not None and checkpoint.step == 2 and not checkpoint.broken


def test_its_settings_are_compared_with_new_ones(old: Run) -> None:
    given = {"RUN_NAME": "old", "STORAGE": str(old.storage)}
    notebook.begin("02_data", **given, **DATA)
    with pytest.raises(RunExistsError, match="CORPUS was 'news', is now 'ray_docs'"):
        notebook.begin("02_data", **given, **DATA | {"CORPUS": "ray_docs"})


def test_a_damaged_record_is_refused(old: Run) -> None:
    old.step_json("02_data").write_text('{"data": ')
    with pytest.raises(StepError, match=r"02_data\.json is not a record") as refused:
        old.read_step("02_data")
    assert "run notebooks/02_data.ipynb" in str(refused.value)
    old.results_json.write_text("[]")
    with pytest.raises(StepError, match=r"results\.json is not a record"):
        old.results()
