"""The notebooks as sources: their form, their parameters, and that unknown ones are refused."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import papermill
import pytest
from papermill.exceptions import PapermillExecutionError

from cpt_helpers.errors import ConfigError, ParameterError, StepError
from cpt_helpers.pipeline import NOTEBOOKS, run_all
from cpt_helpers.run import STEPS, Run

APPLY = {
    "01_setup": {"TRAIN_CONFIG", "OVERRIDES", "PROMPT"},
    "02_data": {
        "TRAIN_CONFIG",
        "OVERRIDES",
        "CORPUS",
        "REPLAY",
        "EPOCHS",
        "TEXT_COLUMN",
        "MAX_SAMPLES",
        "TOLERATE",
        "CLEAN",
    },
    "03_config": {"TRAIN_CONFIG", "OVERRIDES"},
    "04_train": {"RETRIES", "WORKERS"},
    "05_checkpoints": {"KILL"},
    "06_export": {"CHECKPOINT", "DTYPE", "FORM", "QUANTIZE"},
}


def cells(step: str, kind: str) -> list[str]:
    notebook = json.loads((NOTEBOOKS / f"{step}.ipynb").read_text("utf-8"))
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == kind]


def test_there_are_six() -> None:
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == list(STEPS)


@pytest.mark.parametrize("step", STEPS)
def test_the_form_of_a_notebook(step: str) -> None:
    notebook = json.loads((NOTEBOOKS / f"{step}.ipynb").read_text("utf-8"))
    assert 20 <= len(notebook["cells"]) <= 30
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"] and cell["execution_count"] is None, (
                "sources have no outputs"
            )
    tagged = [c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    for source in cells(step, "code"):
        assert len(source.splitlines()) <= 25, source
        assert not source.lstrip().startswith(("!", "%%bash")), "a shell command fails no cell"
        for node in ast.walk(ast.parse(source)):
            assert not isinstance(node, ast.FunctionDef), "what needs a name lives in cpt_helpers"
    prose = "\n".join(cells(step, "markdown"))
    assert prose.startswith(f"# {int(step[:2])} · ")
    for heading in ("## Check", "## If it fails", "## For your own run", "**At the end you have**"):
        assert heading in prose, heading
    assert ".finish(" in "\n".join(cells(step, "code"))


@pytest.mark.parametrize("step", STEPS)
def test_every_table_is_shown(step: str) -> None:
    """Jupyter shows a cell's last expression; a table made before it is computed for nothing."""
    for source in cells(step, "code"):
        body = ast.parse(source).body
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Expr) and ast.unparse(node).startswith("show.table("):
                assert ast.dump(node) == ast.dump(body[-1]), source


@pytest.mark.parametrize("step", STEPS)
def test_parameters_are_literals_with_their_choices(step: str) -> None:
    declared = papermill.inspect_notebook(NOTEBOOKS / f"{step}.ipynb")
    assert set(declared) == APPLY[step] | {"RUN_NAME", "STORAGE"}
    for name, parameter in declared.items():
        ast.literal_eval(parameter["default"])
        assert parameter["help"], f"{name} says nothing of its choices"


@pytest.mark.parametrize(
    ("given", "nearest"), [("RUN_NAM", "RUN_NAME"), ("storage", "STORAGE"), ("CORPUS", None)]
)
def test_an_unknown_parameter_is_refused(tmp_path: Path, given: str, nearest: str | None) -> None:
    copy = tmp_path / "out.ipynb"
    values = {"STORAGE": str(tmp_path / "s"), given: "x"}
    with pytest.raises(PapermillExecutionError) as refused:
        papermill.execute_notebook(
            NOTEBOOKS / "04_train.ipynb", copy, values, progress_bar=False, kernel_name="python3"
        )
    assert refused.value.ename == "ParameterError"
    assert f"unknown parameter {given}" in refused.value.evalue
    if nearest:
        assert f"nearest known: {nearest}" in refused.value.evalue


def test_the_pipeline_refuses_it_before_it_starts(tmp_path: Path) -> None:
    run = Run.open("r", tmp_path)
    with pytest.raises(ParameterError, match="unknown parameter CORPSE"):
        run_all(run, {"CORPSE": "x"})
    assert not run.folder.exists()


def test_a_mistyped_key_stops_it_before_the_first_notebook(tmp_path: Path) -> None:
    run = Run.open("r", tmp_path)
    with pytest.raises(ConfigError, match="nearest known: max_steps"):
        run_all(run, {"OVERRIDES": {"max_step": 3}})
    with pytest.raises(ConfigError, match=r"the recipe 'cpt_gpus.yaml' does not exist"):
        run_all(run, {"TRAIN_CONFIG": "cpt_gpus.yaml"})
    assert not run.folder.exists()


def test_a_notebook_that_fails_is_named_in_plain_words(tmp_path: Path) -> None:
    run = Run.open("r", tmp_path)
    with pytest.raises(StepError) as failed:
        run_all(run, {"OVERRIDES": {"model_name_or_path": str(tmp_path / "nothing")}})
    message = str(failed.value)
    assert "notebook 01_setup stopped in cell" in message
    assert "the model 'nothing' does not exist" in message
    assert "Traceback" not in message
    copy = run.notebooks / "01_setup.ipynb"
    assert str(copy) in message and copy.is_file()
