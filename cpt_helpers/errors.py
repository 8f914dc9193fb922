"""The one exception family: every message says what, where, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from .redact import redact


class CptError(Exception):
    """A problem the reader can act on.

    Args:
        what: What is wrong, in one sentence.
        where: File and line, key, path or notebook it was found at.
        expected: What would have been right.
        do: What to do about it.
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
        # IPython asks for this: a reader of a notebook sees the message, not our frames.
        return [f"{type(self).__name__}: {self}"]


class ParameterError(CptError):
    """A notebook or command-line parameter that is unknown or has an impossible value."""


class StorageError(CptError):
    """Storage that is missing, not writable or too small."""


class UnreadyError(CptError):
    """A machine, cluster or set of packages the run cannot use."""


class AssetError(CptError):
    """A model or corpus that cannot be fetched, or is not what it should be."""


class DataError(CptError):
    """A corpus that cannot be trained on."""


class ConfigError(CptError):
    """A recipe that LLaMA-Factory, DeepSpeed or the corpus cannot serve."""


class RunExistsError(CptError):
    """A run of this name exists and means something else."""


class StepError(CptError):
    """A step of the walkthrough whose predecessor is missing, or whose check failed."""


class TrackingError(CptError):
    """MLflow does not answer, or does not know the run."""


class TrainingError(CptError):
    """Training that ended in a worker's failure."""


class WeightsError(TrainingError):
    """Weights in memory or in an export that differ from the files they come from."""


class DivergedError(TrainingError):
    """Training whose loss or gradient is no longer a usable number."""


class Interrupted(TrainingError):
    """Training that was stopped by hand; it can go on."""


class CheckpointError(CptError):
    """A checkpoint that is missing or cannot be used."""


class ExportError(CptError):
    """An export that cannot be written or does not equal what was trained."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Says which known name comes nearest to a mistyped one, as a clause for ``expected``."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close:  # a name in the wrong case is nearest of all, and difflib does not know it
        close = [other for other in known if other.lower() == name.lower()]
    return f"nearest known: {close[0]}" if close else f"known: {', '.join(known[:12])}"
