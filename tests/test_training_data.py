"""Notebook 02 and ``train`` make the same blocks of a recipe, or refuse it with one message."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import papermill
import pytest
import yaml
from conftest import write_jsonl
from papermill.exceptions import PapermillExecutionError

from cpt_helpers import data, notebook, pipeline, recipes
from cpt_helpers.data import corpora, packing
from cpt_helpers.errors import ConfigError, DataError
from cpt_helpers.run import Run
from cpt_helpers.setup import assets


@pytest.fixture
def recipe(tiny_gemma3: Path, tmp_path: Path) -> Path:
    """The CPU recipe for the tiny model, with few steps, short blocks and ``max_samples``."""
    given = recipes.read_recipe("cpt_cpu.yaml")[1] | {
        "model_name_or_path": str(tiny_gemma3),
        "max_samples": 300,
        "max_steps": "8",  # as text, which LLaMA-Factory takes
        "cutoff_len": 64,
        "report_to": "none",
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(dict(given)))
    return path


@pytest.fixture
def new_storage(tmp_path: Path) -> Path:
    return tmp_path / "storage"


def by_notebook(recipe: Path, corpus: Path, new_storage: Path, **overrides: Any) -> dict[str, Any]:
    """Runs notebook 02 and returns its results."""
    given = {"RUN_NAME": "notebook", "STORAGE": str(new_storage)}
    notebook.begin("01_setup", **given).finish({}, {})
    given |= {"TRAIN_CONFIG": str(recipe), "CORPUS": str(corpus), "OVERRIDES": overrides}
    copy = new_storage / "02_data.ipynb"
    papermill.execute_notebook(
        pipeline.NOTEBOOKS / "02_data.ipynb", copy, given, progress_bar=False, kernel_name="python3"
    )
    return Run.open("notebook", new_storage).read_step("02_data")["data"]


def test_notebook_and_train_make_the_same_blocks(
    recipe: Path, corpus: Path, new_storage: Path
) -> None:
    run = Run.open("train", new_storage)
    pipeline.configure(run, str(recipe), str(corpus), {})
    args = recipes.load(run)
    assert corpora.load("handbook", new_storage).records == 300, "max_samples of the recipe"
    results = by_notebook(recipe, corpus, new_storage)
    assert results["tokenized_path"] == args["tokenized_path"]
    assert results["datasets"] == args["dataset"] == "handbook"
    assert results["records"] == 300


def test_notebook_and_train_refuse_too_long_blocks(
    recipe: Path, corpus: Path, new_storage: Path
) -> None:
    """The message names the number of tokens and the largest ``cutoff_len`` that works."""
    run = Run.open("train", new_storage)
    few = {"max_steps": 1, "per_device_train_batch_size": 1}
    long = few | {"cutoff_len": 100_000}
    with pytest.raises(DataError, match=r"no block of 100,000 tokens is full in") as refused:
        pipeline.configure(run, str(recipe), str(corpus), long)
    message = str(refused.value)
    tokens = heldout_tokens(recipe, corpus, new_storage)
    assert f"handbook_heldout: {tokens:,} tokens" in message
    assert f"cutoff_len of at most {tokens:,}\n" in message
    assert not run.train_yaml.exists()
    with pytest.raises(PapermillExecutionError) as stopped:
        by_notebook(recipe, corpus, new_storage, **long)
    assert (stopped.value.ename, stopped.value.evalue) == ("DataError", message)
    with pytest.raises(DataError, match="is full in handbook_heldout\n"):
        pipeline.configure(run, str(recipe), str(corpus), few | {"cutoff_len": tokens + 1})
    pipeline.configure(run, str(recipe), str(corpus), few | {"cutoff_len": tokens})
    assert splits(run) == ["train", "validation_handbook_heldout", "validation_news_heldout"]


def test_advised_cutoff_len_leaves_enough_blocks(
    recipe: Path, corpus: Path, new_storage: Path
) -> None:
    run = Run.open("train", new_storage)
    with pytest.raises(DataError) as refused:
        pipeline.configure(run, str(recipe), str(corpus), {"cutoff_len": 100_000})
    found = re.search(r"cutoff_len of at most ([\d,]+)", str(refused.value))
    advised = int(found[1].replace(",", ""))
    assert 64 < advised < heldout_tokens(recipe, corpus, new_storage)
    pipeline.configure(run, str(recipe), str(corpus), {"cutoff_len": advised})


def test_training_half_must_fill_a_block(recipe: Path, new_storage: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.jsonl"
    write_jsonl(small, [f"document {i}" for i in range(40)])
    with pytest.raises(DataError, match=r"is full in small, small_heldout(?s:.*)\n.*small: "):
        pipeline.configure(
            Run.open("r", new_storage), str(recipe), str(small), {"cutoff_len": 2000}
        )


def test_without_evaluation_no_held_out_block_is_needed(
    recipe: Path, new_storage: Path, corpus: Path
) -> None:
    held = {"eval_strategy": "no", "eval_on_start": False}
    tokens = heldout_tokens(recipe, corpus, new_storage)
    run, longer = Run.open("r", new_storage), {"cutoff_len": tokens + 1, "max_steps": 1}
    longer["per_device_train_batch_size"] = 1
    for evaluating in ({"eval_strategy": "steps"}, {"eval_on_start": True}, {"do_eval": True}):
        with pytest.raises(DataError, match="is full in handbook_heldout\n"):
            pipeline.configure(run, str(recipe), str(corpus), longer | held | evaluating)
    pipeline.configure(run, str(recipe), str(corpus), longer | held)
    assert splits(run) == ["train"]


def splits(run: Run) -> list[str]:
    """The splits that the workers load."""
    index = Path(recipes.load(run)["tokenized_path"]) / "dataset_dict.json"
    return json.loads(index.read_text())["splits"]


def heldout_tokens(recipe: Path, corpus: Path, new_storage: Path) -> int:
    chosen = data.prepare(str(recipe), {}, new_storage, corpus=str(corpus))
    tokenizer = assets.tokenizer_of(chosen.recipe["model_name_or_path"])
    return packing.tokenise(chosen.domain, tokenizer, 64, held_out=True).tokens


def test_too_many_steps_are_refused(recipe: Path, corpus: Path, new_storage: Path) -> None:
    run = Run.open("r", new_storage)
    with pytest.raises(ConfigError, match=r"too small for 100000 steps(?s:.*)max_steps of at most"):
        pipeline.configure(run, str(recipe), str(corpus), {"max_steps": 100_000})
    assert not run.train_yaml.exists()


def test_removed_key_has_its_default(recipe: Path, corpus: Path, new_storage: Path) -> None:
    none = {"max_samples": None, "max_steps": None, "seed": None, "cutoff_len": None}
    chosen = data.prepare(str(recipe), none, new_storage, corpus=str(corpus))
    assert chosen.domain.records == 400
    tokenizer = assets.tokenizer_of(chosen.recipe["model_name_or_path"])
    assert chosen.blocks(tokenizer).block_size == 2048
