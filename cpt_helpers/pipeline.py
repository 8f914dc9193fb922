"""The six notebooks in order through papermill (``make run``), and the training alone."""

from __future__ import annotations

import ast
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from . import data, display, recipes
from .config import dry_run, planning, resolution
from .errors import ParameterError, RunExistsError, StepError
from .notebook import as_overrides, defining_parameters, refuse_other_settings
from .recipes import DEFAULT_RECIPE
from .run import PROJECT, STEPS, Run
from .setup import assets, machine
from .train import launch, tracking

NOTEBOOKS = PROJECT / "notebooks"
_PROBE = {"save_strategy": "no", "eval_strategy": "no", "eval_on_start": False, "report_to": "none"}


def run_all(run: Run, parameters: dict[str, Any]) -> dict[str, Any]:
    """Runs the notebooks into ``<run>/notebooks/``, each with the parameters it declares.

    Args:
        run: The run; every notebook gets its name and storage.
        parameters: Other parameters, such as ``TRAIN_CONFIG``, ``CORPUS`` and ``OVERRIDES``.

    Returns:
        The run's results.

    Raises:
        ParameterError: No notebook has a parameter of that name.
        RunExistsError: The run has been trained with other settings.
        StepError: A notebook failed; with its last error and the path of its copy.
    """
    import papermill

    logging.getLogger("papermill").setLevel(logging.ERROR)
    quiet = {"PYDEVD_DISABLE_FILE_VALIDATION": "1", "JUPYTER_PLATFORM_DIRS": "1"}
    for name, value in {**quiet, **machine.kept_memory()}.items():
        os.environ.setdefault(name, value)  # before the kernels start
    declared = {step: papermill.inspect_notebook(_source(step)) for step in STEPS}
    known = set().union(*declared.values())
    for name in parameters:
        if name not in known:
            raise ParameterError(f"unknown parameter {name}", expected=", ".join(sorted(known)))
    given = {"RUN_NAME": run.name, "STORAGE": str(run.storage), **parameters}
    if "TRAIN_CONFIG" in given or given.get("OVERRIDES"):
        recipe = given.get("TRAIN_CONFIG", DEFAULT_RECIPE)
        resolution.check_keys(recipe, as_overrides(given.get("OVERRIDES", {})))
    for step, defaults in declared.items():  # before the copies of an earlier run are replaced
        values = {name: ast.literal_eval(default["default"]) for name, default in defaults.items()}
        values |= {name: value for name, value in given.items() if name in defaults}
        refuse_other_settings(run, step, defining_parameters(values))
    run.notebooks.mkdir(parents=True, exist_ok=True)
    for step in STEPS:
        started = time.monotonic()
        _execute(run, step, {name: given[name] for name in declared[step] if name in given})
        print(f"{_number(step)} {step:<15} {time.monotonic() - started:6.0f} s", flush=True)
    return run.results()


def summary_table(run: Run) -> str:
    """Returns the results of a finished run as a few lines for a terminal."""
    results = run.results()
    train = results["train"]
    minutes = sum(step["seconds"] for step in results["notebooks"].values()) / 60
    rows = {}
    for role, values in results.get("perplexity", {}).items():
        before, after = values["before"], values["after"]
        rows[f"perplexity, {role}"] = f"{before:.1f} → {after:.1f} ({after / before - 1:+.0%})"
    rows |= {
        "trained": f"{train['tokens']:,} tokens in {train['steps']} steps",
        "speed": f"{train['tokens_per_second']:.0f} tokens/s",
        "minutes": f"{minutes:.1f} in all, {train['seconds'] / 60:.1f} of training",
        "model": results["export"]["path"],
        "notebooks": str(run.notebooks),
        "results": str(run.results_json),
    }
    for step, recorded in results["notebooks"].items():
        if recorded.get("warnings"):
            rows[f"warning of {step}"] = f"not shown: {', '.join(recorded['warnings'])}"
    if results.get("tracking"):
        rows["MLflow"] = tracking.how_to_open(results["tracking"])
    width = max(map(len, rows))
    return "\n".join(f"  {label:<{width}}  {value}" for label, value in rows.items())


def main(arguments: Any) -> int:
    """``python -m cpt_helpers run``: runs the six notebooks and prints the results."""
    given = {
        "TRAIN_CONFIG": arguments.config,
        "CORPUS": arguments.corpus,
        "OVERRIDES": as_overrides(arguments.overrides),
    }
    parameters = as_overrides(arguments.parameters)
    parameters |= {name: value for name, value in given.items() if value}
    run = Run.open(arguments.run, arguments.storage)
    print(f"run '{run.name}' in {run.folder}", flush=True)
    run_all(run, parameters)
    print("\n" + summary_table(run))
    return 0


def configure(run: Run, train_config: str, corpus: str, overrides: dict[str, Any]) -> None:
    """Does the work of notebooks 01 to 03: model, corpus and resolved recipe.

    Raises:
        ConfigError: The recipe cannot be used, or the corpus has too few blocks for its steps.
        DataError: A corpus cannot be used.
    """
    resolution.check_keys(train_config, overrides)
    model = assets.fetch_model(recipes.model_of(train_config, overrides, run.storage), run.storage)
    chosen = data.prepare(train_config, overrides, run.storage, corpus=corpus)
    made = chosen.blocks(assets.tokenizer_of(model))
    resolved = resolution.resolve(run, train_config, overrides, chosen.datasets, str(made.path))
    planning.plan(resolved.args, made.blocks, sum(source.dropped for source in made.drawn))
    resolution.write(run, resolved)


def plan(arguments: Any) -> int:
    """``python -m cpt_helpers plan``: prints the plan of a recipe, with ``--probe`` measured."""
    speed = arguments.tokens_per_second
    if arguments.probe:
        recipe = arguments.recipe or arguments.config or DEFAULT_RECIPE
        run = Run.open(arguments.run, arguments.storage)
        overrides = as_overrides(arguments.overrides)
        speed = probe(run, recipe, overrides, arguments.corpus, arguments.probe)
    return dry_run.plan(arguments, speed)


def probe(run: Run, recipe: str, overrides: dict[str, Any], corpus: str, steps: int) -> float:
    """Trains a few steps of a recipe in a run of its own, and measures the speed.

    Returns:
        Tokens per second over all workers, the median of the steps.
    """
    short = Run.open(f"{run.name}-probe-{steps}", run.storage)
    configure(short, recipe, corpus, overrides | _PROBE | {"max_steps": steps})
    trained = launch.train(short, recipes.load(short))
    memory = max(event["memory"] for event in short.events() if event["event"] == "step")
    print(
        f"probe: {steps} steps, {trained['tokens_per_second']:.0f} tokens/s, "
        f"{memory / 2**30:.2f} GiB peak memory of rank 0, "
        f"{trained['seconds_to_first_step']:.0f} s to the first step\n"
    )
    return trained["tokens_per_second"]


def train(arguments: Any) -> int:
    """``python -m cpt_helpers train``: trains or resumes a run, without the notebooks."""
    run = Run.open(arguments.run, arguments.storage)
    given = arguments.config or arguments.corpus or arguments.overrides
    if given and run.train_yaml.is_file() and not arguments.config:
        raise ParameterError(
            f"the run '{run.name}' has a recipe, and the new settings name none",
            where=run.train_yaml,
            expected="--config together with --corpus and --overrides, or none of the three",
            do="add --config with the recipe of the run",
        )
    if given or not run.train_yaml.is_file():
        overrides = as_overrides(arguments.overrides)
        configure(run, arguments.config or DEFAULT_RECIPE, arguments.corpus, overrides)
    if run.state == "started" and not arguments.resume:
        raise RunExistsError(
            f"the run '{run.name}' was interrupted",
            where=run.folder,
            do="add --resume to continue from its newest checkpoint, or choose another --run",
        )
    trained = launch.train(
        run, recipes.load(run), retries=arguments.retries, workers=arguments.workers
    )
    print(
        f"trained: {trained['steps']} steps, {trained['tokens']:,} tokens, "
        f"loss {trained['first_loss']:.3f} → {trained['last_loss']:.3f}, model in {run.output}"
    )
    return 0


def _source(step: str) -> Path:
    return NOTEBOOKS / f"{step}.ipynb"


def _number(step: str) -> str:
    return f"[{STEPS.index(step) + 1}/{len(STEPS)}]"


def _execute(run: Run, step: str, parameters: dict[str, Any]) -> None:
    """Runs one notebook; the terminal shows its cells, and in step 4 the training."""
    import papermill
    from papermill.exceptions import PapermillExecutionError

    copy = run.notebooks / f"{step}.ipynb"
    copy.unlink(missing_ok=True)  # the cells of an older copy would count as progress
    cells = len(_cells(_source(step)))

    def status() -> tuple[int, int, str]:
        states = [cell["metadata"].get("papermill", {}).get("status") for cell in _cells(copy)]
        line = ""
        if step == "04_train" and run.events():
            done, total, text = display.progress(run)
            line = f"training step {done}/{total}: {text}"
        return states.count("completed"), cells, line

    try:
        with display.live(status, label=f"{_number(step)} {step} ", unit="cell"):
            papermill.execute_notebook(
                _source(step),
                copy,
                parameters,
                kernel_name="python3",
                progress_bar=False,
                autosave_cell_every=5,
                extra_arguments=["--log-level=ERROR"],
            )
    except PapermillExecutionError as error:
        message = str(error.evalue).strip() or "(no message)"
        ours = any(f"\n  {label}:" in message for label in ("where", "expected", "do"))
        lines = message.splitlines() if ours else message.splitlines()[-3:]
        raise StepError(
            f"notebook {step} stopped in cell {error.cell_index}: {error.ename}: "
            + "\n".join(lines),
            where=f"{copy} (executed up to this cell)",
            do="fix the cause and repeat the command",
        ) from None


def _cells(notebook: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(notebook.read_text("utf-8"))["cells"]
    except (OSError, ValueError):  # not written yet
        return []
