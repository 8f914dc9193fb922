"""The six notebooks in order, headless, through papermill: what ``make run`` does."""

from __future__ import annotations

import ast
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from . import data, display, recipes
from .config import dry_run, planning, resolution
from .errors import ParameterError, RunExistsError, StepError
from .notebook import as_overrides, defining_parameters, refuse_other_settings
from .recipes import DEFAULT_RECIPE
from .run import PROJECT, STEPS, Run
from .setup import assets, environment
from .train import launch, tracking

NOTEBOOKS = PROJECT / "notebooks"
_PROBE = {"save_strategy": "no", "eval_strategy": "no", "eval_on_start": False, "report_to": "none"}


def run_all(run: Run, parameters: dict[str, Any]) -> dict[str, Any]:
    """Runs the notebooks into ``<run>/notebooks/``, each with the parameters it declares.

    Args:
        run: The run; its name and storage are given to every notebook.
        parameters: ``TRAIN_CONFIG``, ``CORPUS``, ``OVERRIDES``, where given.

    Returns:
        The run's results.

    Raises:
        ParameterError: No notebook has a parameter of that name.
        RunExistsError: The run has been trained with other settings.
        StepError: A notebook failed; with its last error in plain words and its copy's path.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    _tame_jupyter()
    for name, value in environment.kept_memory().items():
        os.environ.setdefault(name, value)  # the notebooks' kernels start with them
    declared = {step: papermill.inspect_notebook(_source(step)) for step in STEPS}
    for name in parameters:
        if not any(name in names for names in declared.values()):
            raise ParameterError(
                f"unknown parameter {name}",
                expected=", ".join(sorted(set().union(*declared.values()))),
            )
    given = {"RUN_NAME": run.name, "STORAGE": str(run.storage), **parameters}
    if "TRAIN_CONFIG" in given or given.get("OVERRIDES"):  # ours has none mistyped
        recipe = given.get("TRAIN_CONFIG", DEFAULT_RECIPE)
        resolution.check_keys(recipe, as_overrides(given.get("OVERRIDES", {})))
    for step, own in declared.items():  # before the copies of an earlier run are replaced
        values = {name: ast.literal_eval(parameter["default"]) for name, parameter in own.items()}
        values |= {name: value for name, value in given.items() if name in own}
        refuse_other_settings(run, step, defining_parameters(values))
    run.notebooks.mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(STEPS, 1):
        copy = run.notebooks / f"{step}.ipynb"
        own = {name: value for name, value in given.items() if name in declared[step]}
        cells = len(json.loads(_source(step).read_text("utf-8"))["cells"])
        started = time.monotonic()
        with _bar(
            f"[{number}/{len(STEPS)}] {step}", cells, copy, run if step == "04_train" else None
        ):
            try:
                papermill.execute_notebook(
                    _source(step),
                    copy,
                    own,
                    kernel_name="python3",
                    progress_bar=False,
                    autosave_cell_every=5,
                    extra_arguments=["--log-level=ERROR"],  # the kernel's, about its own transport
                )
            except PapermillExecutionError as error:
                raise _plain(step, copy, error) from None
        print(f"[{number}/{len(STEPS)}] {step:<15} {time.monotonic() - started:6.0f} s", flush=True)
    return run.results()


def summary_table(run: Run) -> str:
    """What a finished run came to, in a few lines for a terminal."""
    results = run.results()
    rows = []
    for role, values in results.get("perplexity", {}).items():
        change = values["after"] / values["before"] - 1
        rows.append(
            (
                f"perplexity, {role}",
                f"{values['before']:.1f} → {values['after']:.1f} ({change:+.0%})",
            )
        )
    train = results["train"]
    minutes = sum(step["seconds"] for step in results["notebooks"].values()) / 60
    rows += [
        ("trained", f"{train['tokens']:,} tokens in {train['steps']} steps"),
        ("speed", f"{train['tokens_per_second']:.0f} tokens/s"),
        ("minutes", f"{minutes:.1f} in all, {train['seconds'] / 60:.1f} of training"),
        ("model", results["export"]["path"]),
        ("notebooks", str(run.notebooks)),
        ("results", str(run.results_json)),
    ]
    for step, own in results["notebooks"].items():
        rows += [(f"warning of {step}", f"not shown: {what}") for what in own.get("warnings", [])]
    if results.get("tracking"):
        rows.append(("MLflow", tracking.how_to_open(results["tracking"])))
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"  {label:<{width}}  {value}" for label, value in rows)


def main(arguments: Any) -> int:
    """``python -m cpt_helpers run``: all six notebooks, then the table."""
    parameters: dict[str, Any] = as_overrides(arguments.parameters)
    if arguments.config:
        parameters["TRAIN_CONFIG"] = arguments.config
    if arguments.corpus:
        parameters["CORPUS"] = arguments.corpus
    if arguments.overrides:
        parameters["OVERRIDES"] = as_overrides(arguments.overrides)
    run = Run.open(arguments.run, arguments.storage)
    print(f"run '{run.name}' in {run.folder}", flush=True)
    run_all(run, parameters)
    print("\n" + summary_table(run))
    return 0


def configure(run: Run, train_config: str, corpus: str, overrides: dict[str, Any]) -> None:
    """What notebooks 01 to 03 leave for the training, without them: model, corpus, recipe.

    Raises:
        ConfigError: The recipe cannot be used, or the corpus lasts fewer steps than it asks for.
        DataError: A corpus cannot be used.
    """
    resolution.check_keys(train_config, overrides)
    model = assets.obtain(recipes.model_of(train_config, overrides, run.storage), run.storage)
    chosen = data.prepare(train_config, overrides, run.storage, corpus=corpus)
    made = chosen.blocks(assets.tokenizer_of(model))
    resolved = resolution.resolve(run, train_config, overrides, chosen.datasets, str(made.path))
    planning.plan(resolved.args, made.blocks, sum(source.dropped for source in made.drawn))
    resolution.write(run, resolved)


def plan(arguments: Any) -> int:
    """``python -m cpt_helpers plan``: the plan of a recipe, with a measured speed where asked."""
    speed = arguments.tokens_per_second
    if arguments.probe:
        recipe = arguments.recipe or arguments.config or DEFAULT_RECIPE
        run = Run.open(arguments.run, arguments.storage)
        overrides = as_overrides(arguments.overrides)
        speed = probe(run, recipe, overrides, arguments.corpus, arguments.probe)
    return dry_run.plan(arguments, speed)


def probe(run: Run, recipe: str, overrides: dict[str, Any], corpus: str, steps: int) -> float:
    """Trains a few steps of a recipe beside the run, and measures its speed.

    Returns:
        Tokens a second over all workers, the median of the steps.
    """
    beside = Run.open(f"{run.name}-probe-{steps}", run.storage)
    configure(beside, recipe, corpus, overrides | _PROBE | {"max_steps": steps})
    trained = launch.train(beside, recipes.load(beside))
    seen = max(event["memory"] for event in beside.events() if event["event"] == "step")
    print(
        f"probe: {steps} steps, {trained['tokens_per_second']:.0f} tokens/s, "
        f"{seen / 2**30:.2f} GiB at the peak of rank 0, "
        f"{trained['seconds_to_first_step']:.0f} s to the first step\n"
    )
    return trained["tokens_per_second"]


def train(arguments: Any) -> int:
    """``python -m cpt_helpers train``: the training alone, also to take it up again."""
    run = Run.open(arguments.run, arguments.storage)
    given = arguments.config or arguments.corpus or arguments.overrides
    if given and run.train_yaml.is_file() and not arguments.config:
        raise ParameterError(
            f"the run '{run.name}' has a recipe, and other settings were given without one",
            where=run.train_yaml,
            expected="--config beside --corpus and --overrides, or none of the three",
            do="say --config with the recipe it was made from",
        )
    if given or not run.train_yaml.is_file():
        overrides = as_overrides(arguments.overrides)
        configure(run, arguments.config or DEFAULT_RECIPE, arguments.corpus, overrides)
    if run.state == "started" and not arguments.resume:
        raise RunExistsError(
            f"the run '{run.name}' was interrupted",
            where=run.folder,
            expected="--resume, to go on from its newest checkpoint",
            do="add --resume, or choose another --run",
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


def _tame_jupyter() -> None:
    """Quiets what papermill and Jupyter say that no reader can act on."""
    import logging

    logging.getLogger("papermill").setLevel(logging.ERROR)
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")


class _bar:
    """A notebook's progress on the terminal: cells done, and the training while it runs."""

    def __init__(self, label: str, cells: int, copy: Path, training: Run | None) -> None:
        self.label, self.cells, self.copy, self.training = label, cells, copy, training
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self.copy.unlink(missing_ok=True)  # an older copy would be counted as progress
        self.thread.start()

    def __exit__(self, *_: Any) -> None:
        self.done.set()
        self.thread.join()

    def _watch(self) -> None:
        from tqdm import tqdm

        tty = sys.stderr.isatty()
        options = {"bar_format": "{desc} |{bar}| cell {n_fmt}/{total_fmt} {elapsed} {postfix}"}
        with tqdm(
            total=self.cells, desc=self.label, leave=False, disable=not tty, **options
        ) as bar:
            said = ""
            while not self.done.wait(1.0):
                bar.n = self._cells_done()
                line = self._training_line()
                bar.set_postfix_str(line, refresh=True)
                if line and not tty and line != said:  # a log file: a line when something changed
                    print(f"{self.label}: {line}", file=sys.stderr, flush=True)
                said = line

    def _cells_done(self) -> int:
        try:
            cells = json.loads(self.copy.read_text("utf-8"))["cells"]
        except (OSError, ValueError):
            return 0
        states = [cell["metadata"].get("papermill", {}).get("status") for cell in cells]
        return sum(state == "completed" for state in states)

    def _training_line(self) -> str:
        if self.training is None or not self.training.events():
            return ""
        step, steps, line = display.progress(self.training)
        return f"step {step}/{steps}: {line}"


def _plain(step: str, copy: Path, error: Any) -> StepError:
    """A papermill failure as the last error of the notebook, without the traceback."""
    message = str(error.evalue).strip()
    known = "\n  where:" in message or "\n  expected:" in message or "\n  do:" in message
    lines = message.splitlines() if known else message.splitlines()[-3:]
    return StepError(
        f"notebook {step} stopped in cell {error.cell_index}: {error.ename}: "
        + "\n".join(lines or ["(no message)"]),
        where=f"{copy} (executed up to there)",
        do="mend the cause and give the same command again",
    )
