"""A notebook at work: its parameters, the step before it, what it promised, what it records."""

from __future__ import annotations

import ast
import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import ParameterError, RunExistsError, StepError, nearest
from .recipes import MAY_CHANGE
from .redact import has_token
from .run import Run

# These decide what a run trains; the rest of the parameters only decide what is shown.
_DEFINING = (
    "TRAIN_CONFIG",
    "CORPUS",
    "TEXT_COLUMN",
    "MAX_SAMPLES",
    "TOLERATE",
    "CLEAN",
    "REPLAY",
    "EPOCHS",
    "OVERRIDES",
)


@dataclass
class Step:
    """One notebook at work: made by :func:`begin`, ended by :meth:`finish`."""

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
        """Checks what the step promised, then records its results.

        Args:
            results: What to keep, merged with the other steps' into ``results.json``.
            checks: Each promise, and whether it was kept.
            shown: What a demonstration was to show, and whether it did. Where it did not, that is a
                warning: it is printed and recorded, and the next step can run.

        Raises:
            StepError: Some promise was not kept; the results are not recorded.
        """
        warnings = [what for what, seen in (shown or {}).items() if not seen]
        for promise, kept in {**checks, **(shown or {})}.items():
            print(("✓ " if kept else "⚠ not shown: " if promise in warnings else "✗ ") + promise)
        broken = [promise for promise, kept in checks.items() if not kept]
        if broken:
            raise StepError(
                f"{self.name} did not keep its promise: {'; '.join(broken)}",
                where=self.run.folder,
                do="see «If it fails» at the end of the notebook",
            )
        seconds = round(time.monotonic() - self._started, 1)
        timed = {"notebooks": {self.name: {"seconds": seconds, "warnings": warnings}}}
        self.run.record(self.name, {"parameters": self.parameters, **results, **timed})
        print(f"recorded in {self.run.step_json(self.name)} ({seconds:.0f} s)")


def begin(step: str, *, needs: str | None = None, **parameters: Any) -> Step:
    """Opens a step: refuses unknown parameters, a missing predecessor, and a run that is another's.

    Args:
        step: The notebook's name, ``"04_train"``.
        needs: The step that must have been run before.
        **parameters: Every parameter of the notebook by its own name, ``RUN_NAME`` among them.

    Raises:
        ParameterError: A parameter is unknown or of the wrong type.
        StepError: The step before has not been run.
        RunExistsError: This run has been trained with other settings.
    """
    _refuse_unknown(step, parameters)
    name, storage = parameters["RUN_NAME"], parameters.get("STORAGE")
    run = Run.open(name, storage)
    defining = defining_parameters(parameters)
    if needs:
        run.read_step(needs)
    refuse_other_settings(run, step, defining)
    return Step(step, run, defining)


def defining_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a step's parameters that decide what is trained, in one form to compare."""
    defining = {key: parameters[key] for key in _DEFINING if key in parameters}
    if "OVERRIDES" in defining:
        defining["OVERRIDES"] = as_overrides(defining["OVERRIDES"])
    for key, value in defining.items():
        if has_token(value):
            raise ParameterError(
                f"{key} holds a token",
                expected="secrets in the environment only: parameters stand in notebooks",
                do="`export HF_TOKEN=…` before starting, and take it out of the parameter",
            )
    return defining


def refuse_other_settings(run: Run, step: str, defining: Mapping[str, Any]) -> None:
    """A run that has begun to train keeps its settings.

    Raises:
        RunExistsError: A step of it was recorded with other ones.
    """
    if run.state == "new" or not run.step_json(step).is_file():
        return
    before = run.read_step(step)["parameters"]
    changed = [key for key, value in defining.items() if before.get(key) != value]
    if changed == ["OVERRIDES"] and run.state == "started":
        old, new = before["OVERRIDES"], defining["OVERRIDES"]
        if {k for k in old.keys() | new.keys() if old.get(k) != new.get(k)} <= MAY_CHANGE:
            return  # 03_config looks closer
    if changed:
        raise RunExistsError(
            f"the run '{run.name}' has been trained with other settings: "
            + ", ".join(f"{k} was {before.get(k)!r}, is now {defining[k]!r}" for k in changed),
            where=run.folder,
            expected="the same settings (to look at it again or resume it), or a new run",
            do="choose another RUN_NAME, or move that folder away; nothing was changed",
        )


def as_overrides(overrides: Any) -> dict[str, Any]:
    """OVERRIDES as a dict; a string (papermill's ``-p``) is read as YAML.

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
            do='in papermill: -y "OVERRIDES: {max_steps: 10}"',
        )
    return overrides


def _refuse_unknown(step: str, parameters: Mapping[str, Any]) -> None:
    """Papermill only warns of a parameter a notebook does not have; here it is an error."""
    for key in ("RUN_NAME", "STORAGE", "TRAIN_CONFIG", "TEXT_COLUMN"):
        value = parameters.get(key)
        if value is not None and not isinstance(value, str):
            raise ParameterError(
                f"{key} is {value!r}", where=step, expected="a string", do=f"quote it: {key}='…'"
            )
    try:
        from IPython import get_ipython
    except ImportError:
        return
    shell = get_ipython()
    if shell is None:
        return
    given = {name for name in shell.user_ns if name.isupper() and not name.startswith("_")}
    for cell in shell.user_ns.get("In", []):
        if cell.startswith("# Parameters\n"):  # the cell papermill injects
            for node in ast.walk(ast.parse(cell)):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    given.add(node.id)
    for name in sorted(given - set(parameters)):
        raise ParameterError(
            f"unknown parameter {name}",
            where=f"notebooks/{step}.ipynb",
            expected=f"one of {', '.join(parameters)} ({nearest(name, parameters)})",
            do="correct the name or leave it out",
        )
