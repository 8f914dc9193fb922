"""The beginning and the end of a notebook: parameters, preceding step, checks, results."""

from __future__ import annotations

import ast
import contextlib
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import ParameterError, RunExistsError, StepError, nearest
from .recipes import MAY_CHANGE
from .redact import has_token
from .run import Run

# These parameters decide what a run trains. The others decide what is shown.
_DEFINING = (
    "TRAIN_CONFIG", "CORPUS", "TEXT_COLUMN", "MAX_SAMPLES", "TOLERATE", "CLEAN", "REPLAY", "EPOCHS",
    "OVERRIDES",
)  # fmt: skip


@dataclass
class Step:
    """A notebook that is being run: :func:`begin` makes it, :meth:`finish` ends it."""

    name: str
    run: Run
    parameters: dict[str, Any]
    _started: float = field(default_factory=time.monotonic)

    def finish(
        self,
        results: Mapping[str, Any],
        checks: Mapping[str, bool],
        *,
        shown: Mapping[str, bool] | None = None,
    ) -> None:
        """Prints each check, then records the results.

        Args:
            results: The results to record, merged with the other steps' in ``results.json``.
            checks: Each statement to check, and whether it is true.
            shown: Each statement that a demonstration should show, and whether it did. One that it
                did not show is a warning: it is printed and recorded, and the step succeeds.

        Raises:
            StepError: A check failed; the results are not recorded.
        """
        shown = shown or {}
        warnings = [statement for statement, seen in shown.items() if not seen]
        failed = [statement for statement, true in checks.items() if not true]
        for statement in [*checks, *shown]:
            mark = "✗ " if statement in failed else "⚠ not shown: "
            print((mark if statement in failed + warnings else "✓ ") + statement)
        if failed:
            raise StepError(
                f"a check of {self.name} failed: {'; '.join(failed)}",
                where=self.run.folder,
                do="see 'If it fails' at the end of the notebook",
            )
        seconds = round(time.monotonic() - self._started, 1)
        timed = {"notebooks": {self.name: {"seconds": seconds, "warnings": warnings}}}
        self.run.record(self.name, {"parameters": self.parameters, **results, **timed})
        print(f"recorded in {self.run.step_json(self.name)} ({seconds:.0f} s)")


def begin(step: str, *, needs: str | None = None, **parameters: Any) -> Step:
    """Validates the parameters of a notebook and opens its run.

    Args:
        step: The notebook's name, such as ``"04_train"``.
        needs: The step that must have been run before.
        **parameters: All parameters of the notebook by name, with ``RUN_NAME``.

    Raises:
        ParameterError: A parameter is unknown or has the wrong type.
        StepError: The step before has not been run.
        RunExistsError: This run has been trained with other settings.
    """
    _validate_types(step, parameters)
    _validate_names(step, parameters)
    run = Run.open(parameters["RUN_NAME"], parameters.get("STORAGE"))
    defining = defining_parameters(parameters)
    if needs:
        run.read_step(needs)
    refuse_other_settings(run, step, defining)
    return Step(step, run, defining)


def defining_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters of a step that decide what is trained, ready to compare.

    Raises:
        ParameterError: One of them holds a token, or OVERRIDES is not a dict.
    """
    defining = {key: parameters[key] for key in _DEFINING if key in parameters}
    if "OVERRIDES" in defining:
        defining["OVERRIDES"] = as_overrides(defining["OVERRIDES"])
    for key, value in defining.items():
        if has_token(value):
            raise ParameterError(
                f"{key} holds a token",
                expected="secrets in the environment only: notebooks store their parameters",
                do="`export HF_TOKEN=…` before you start, and remove it from the parameter",
            )
    return defining


def refuse_other_settings(run: Run, step: str, defining: Mapping[str, Any]) -> None:
    """Checks that a run whose training has begun keeps its settings.

    Raises:
        RunExistsError: The step was recorded with other settings.
    """
    if run.state == "new" or not run.step_json(step).is_file():
        return
    before = run.read_step(step)["parameters"]
    changed = [key for key, value in defining.items() if before.get(key) != value]
    if changed == ["OVERRIDES"] and run.state == "started":
        old, new = before["OVERRIDES"], defining["OVERRIDES"]
        if {k for k in old.keys() | new.keys() if old.get(k) != new.get(k)} <= MAY_CHANGE:
            return  # 03_config compares the values
    if changed:
        raise RunExistsError(
            f"the run '{run.name}' has been trained with other settings: "
            + ", ".join(f"{k} was {before.get(k)!r}, is now {defining[k]!r}" for k in changed),
            where=run.folder,
            expected="the same settings, to read or resume this run, or a new run",
            do="choose another RUN_NAME, or move that folder away; nothing was changed",
        )


def as_overrides(overrides: Any) -> dict[str, Any]:
    """Returns OVERRIDES as a dict; a string (papermill's ``-p``) is read as YAML.

    Raises:
        ParameterError: It is neither a dict nor YAML of one.
    """
    if isinstance(overrides, str):
        import yaml

        with contextlib.suppress(yaml.YAMLError):
            overrides = yaml.safe_load(overrides)
    overrides = {} if overrides in (None, "") else overrides
    if not isinstance(overrides, dict) or not all(isinstance(key, str) for key in overrides):
        raise ParameterError(
            f"OVERRIDES is {overrides!r}",
            expected="a dict of LLaMA-Factory keys, such as {'max_steps': 10}",
            do='with papermill: -y "OVERRIDES: {max_steps: 10}"',
        )
    return overrides


def _validate_types(step: str, parameters: Mapping[str, Any]) -> None:
    for key in ("RUN_NAME", "STORAGE", "TRAIN_CONFIG", "TEXT_COLUMN"):
        value = parameters.get(key)
        if value is not None and not isinstance(value, str):
            raise ParameterError(
                f"{key} is {value!r}", where=step, expected="a string", do=f"quote it: {key}='…'"
            )


def _validate_names(step: str, parameters: Mapping[str, Any]) -> None:
    """Raises for a parameter that the notebook does not have; papermill only warns."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None:
        return
    given = {name for name in shell.user_ns if name.isupper() and not name.startswith("_")}
    for cell in shell.user_ns.get("In", []):
        if cell.startswith("# Parameters\n"):  # the cell that papermill adds
            for node in ast.walk(ast.parse(cell)):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    given.add(node.id)
    for name in sorted(given - set(parameters)):
        raise ParameterError(
            f"unknown parameter {name}",
            where=f"notebooks/{step}.ipynb",
            expected=f"one of {', '.join(parameters)} ({nearest(name, parameters)})",
            do="correct the name or remove it",
        )
