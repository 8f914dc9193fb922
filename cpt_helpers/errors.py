"""The exceptions: each message says what is wrong, where, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from .redact import redact


class CptError(Exception):
    """A problem that the reader can fix.

    Args:
        what: The problem, in one sentence.
        where: The file and line, key, path or notebook of the problem.
        expected: A correct value.
        do: How to fix it.
    """

    def __init__(self, what: str, *, where: object = "", expected: str = "", do: str = "") -> None:
        # Messages quote exceptions and URIs of other libraries, which can hold credentials.
        self.what, self.where, self.expected, self.do = map(redact, (what, where, expected, do))
        parts = [("where", self.where), ("expected", self.expected), ("do", self.do)]
        lines = [self.what]
        for label, text in parts:
            if text:
                lines.append(f"  {label + ':':<10}" + text.replace("\n", "\n" + " " * 12))
        super().__init__("\n".join(lines))

    def _render_traceback_(self) -> list[str]:
        # IPython calls this: a notebook shows the message without a traceback.
        return [f"{type(self).__name__}: {self}"]


class ParameterError(CptError):
    """A notebook or command-line parameter that is unknown or has an impossible value."""


class StorageError(CptError):
    """Storage that is missing, not writable or too small."""


class UnreadyError(CptError):
    """A machine, cluster or set of packages that the run cannot use."""


class AssetError(CptError):
    """A model or corpus that cannot be downloaded, or has the wrong contents."""


class DataError(CptError):
    """A corpus that cannot be trained on."""


class ConfigError(CptError):
    """A recipe that LLaMA-Factory or DeepSpeed cannot run, or that does not fit the corpus."""


class RunExistsError(CptError):
    """A run of this name exists and has other settings or another process."""


class StepError(CptError):
    """A step whose predecessor is missing, whose record is damaged, or whose check failed."""


class TrackingError(CptError):
    """An MLflow store that does not answer, or has no record of the run."""


class TrainingError(CptError):
    """A training that a worker's failure ended."""


class WeightsError(TrainingError):
    """Weights in memory or in an export that differ from their source files."""


class DivergedError(TrainingError):
    """A training whose loss or gradient is not a finite number."""


class Interrupted(TrainingError):
    """A training that Ctrl-C stopped; it can be resumed."""


class CheckpointError(CptError):
    """A checkpoint that is missing or cannot be used."""


class ExportError(CptError):
    """An export that cannot be written, or differs from the trained model."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns the known name nearest to a mistyped one, as a clause for ``expected``."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close:  # difflib does not find a name in the wrong case
        close = [other for other in known if other.lower() == name.lower()]
    return f"nearest known: {close[0]}" if close else f"known: {', '.join(known[:12])}"
