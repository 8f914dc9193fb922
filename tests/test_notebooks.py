"""The notebooks: form, imports, parameters. The package: front doors and sizes."""

from __future__ import annotations

import ast
import importlib
import json
from pathlib import Path

import papermill
import pytest
from papermill.exceptions import PapermillExecutionError

from cpt_helpers.errors import ConfigError, ParameterError, StepError
from cpt_helpers.pipeline import NOTEBOOKS, run_all
from cpt_helpers.run import PROJECT, STEPS, Run

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


CORE = {"notebook", "display", "plots", "recipes"}
ROOMS = ("setup", "data", "config", "checkpoints", "train", "export")
TAKES = {step: {room} for step, room in zip(STEPS, ("setup", "data", "config"), strict=False)} | {
    "04_train": {"train", "checkpoints"},
    "05_checkpoints": {"checkpoints", "train"},
    "06_export": {"export"},
}


def test_there_are_six_notebooks() -> None:
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
        assert not source.lstrip().startswith(("!", "%%bash")), "a failed command must fail"
        for node in ast.walk(ast.parse(source)):
            assert not isinstance(node, ast.FunctionDef), "functions belong in cpt_helpers"
    prose = "\n".join(cells(step, "markdown"))
    assert prose.startswith(f"# {int(step[:2])} · ")
    for heading in ("## Check", "## If it fails", "## For your own run", "**At the end you have**"):
        assert heading in prose, heading
    assert ".finish(" in "\n".join(cells(step, "code"))


@pytest.mark.parametrize("step", STEPS)
def test_code_cells_are_short(step: str) -> None:
    """At most 12 lines; the cells of the parameters and of ``begin`` may be longer."""
    notebook = json.loads((NOTEBOOKS / f"{step}.ipynb").read_text("utf-8"))
    long = []
    for number, cell in enumerate(notebook["cells"]):
        source = "".join(cell["source"])
        exempt = "parameters" in cell["metadata"].get("tags", []) or "notebook.begin(" in source
        lines = len(source.splitlines())
        if cell["cell_type"] == "code" and lines > 12 and not exempt:
            long.append(f"cell {number}: {lines} lines")
    assert not long


@pytest.mark.parametrize("step", STEPS)
def test_a_notebook_imports_from_the_core_and_its_own_rooms(step: str) -> None:
    """At most six names, all in one cell, none from a module inside a room."""
    imported, importing, other = [], set(), []
    for number, source in enumerate(cells(step, "code")):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                other += [a.name for a in node.names if a.name.startswith("cpt_helpers")]
            if not isinstance(node, ast.ImportFrom) or not node.module.startswith("cpt_helpers"):
                continue
            names = [alias.name for alias in node.names]
            imported += names
            importing.add(number)
            if node.module == "cpt_helpers":
                other += sorted(set(names) - CORE - TAKES[step])
            elif node.module.removeprefix("cpt_helpers.") not in CORE | TAKES[step]:
                other.append(node.module)
    assert not other
    assert len(imported) <= 6, imported
    assert len(importing) == 1, f"imports in cells {sorted(importing)}"


@pytest.mark.parametrize("room", ROOMS)
def test_the_front_door_of_a_room(room: str) -> None:
    module = importlib.import_module(f"cpt_helpers.{room}")
    assert module.__doc__ and len(module.__doc__.splitlines()) > 1
    assert 0 < len(module.__all__) <= 10, module.__all__
    assert not [name for name in module.__all__ if not hasattr(module, name)]
    modules = {path.stem for path in (PROJECT / "cpt_helpers" / room).glob("*.py")}
    assert not modules & set(module.__all__), "a function has the name of its module"


def test_no_file_and_no_function_is_long() -> None:
    long = []
    for path in sorted((PROJECT / "cpt_helpers").rglob("*.py")):
        name, source = path.relative_to(PROJECT), path.read_text("utf-8")
        if len(source.splitlines()) > 350:
            long.append(f"{name}: {len(source.splitlines())} lines")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > 50:
                    long.append(f"{name}:{node.lineno}: {node.name} has {lines} lines")
    assert not long, "\n".join(long)


@pytest.mark.parametrize("step", STEPS)
def test_every_table_is_shown(step: str) -> None:
    """Jupyter shows the last expression of a cell only."""
    for source in cells(step, "code"):
        for node in ast.parse(source).body[:-1]:
            hidden = isinstance(node, ast.Expr) and ast.unparse(node).startswith("display.table(")
            assert not hidden, source


@pytest.mark.parametrize("step", STEPS)
def test_parameters_are_literals_with_their_choices(step: str) -> None:
    declared = papermill.inspect_notebook(NOTEBOOKS / f"{step}.ipynb")
    assert set(declared) == APPLY[step] | {"RUN_NAME", "STORAGE"}
    for name, parameter in declared.items():
        ast.literal_eval(parameter["default"])
        assert parameter["help"], f"{name} has no comment with its choices"


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


def test_the_pipeline_refuses_an_unknown_parameter_before_it_starts(tmp_path: Path) -> None:
    run = Run.open("r", tmp_path)
    with pytest.raises(ParameterError, match="unknown parameter CORPSE"):
        run_all(run, {"CORPSE": "x"})
    assert not run.folder.exists()


def test_a_mistyped_key_stops_the_pipeline_before_the_first_notebook(tmp_path: Path) -> None:
    run = Run.open("r", tmp_path)
    with pytest.raises(ConfigError, match="nearest known: max_steps"):
        run_all(run, {"OVERRIDES": {"max_step": 3}})
    with pytest.raises(ConfigError, match=r"the recipe 'cpt_gpus.yaml' does not exist"):
        run_all(run, {"TRAIN_CONFIG": "cpt_gpus.yaml"})
    assert not run.folder.exists()


def test_a_failed_notebook_is_reported_without_a_traceback(tmp_path: Path) -> None:
    run = Run.open("r", tmp_path)
    with pytest.raises(StepError) as failed:
        run_all(run, {"OVERRIDES": {"model_name_or_path": str(tmp_path / "nothing")}})
    message = str(failed.value)
    assert "notebook 01_setup stopped in cell" in message
    assert "the model 'nothing' does not exist" in message
    assert "Traceback" not in message
    copy = run.notebooks / "01_setup.ipynb"
    assert str(copy) in message and copy.is_file()
