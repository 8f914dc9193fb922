"""What a look at a recipe or a cluster found, on three levels: error, warning, note."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .. import display
from ..errors import CptError

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: What.
        said: What was found.
        error: Why it cannot work, and what to do; ``None`` where it can.
        warning: Why it is probably not what was meant, and what to do. It stops nothing.
    """

    subject: str
    said: str
    error: CptError | None = None
    warning: CptError | None = None

    @property
    def level(self) -> str:
        """``"error"``, ``"warning"`` or ``"note"``."""
        return "error" if self.error else "warning" if self.warning else "note"

    def __str__(self) -> str:
        mark = {"error": "✗", "warning": "!", "note": "✓"}[self.level]
        return f"{mark} {self.subject}: {self.error or self.warning or self.said}"


def table(findings: list[Finding]) -> DataFrame:
    """Findings as a table, the worst first: level, subject, what was found, what to do."""
    order = ("error", "warning", "note")
    rows = [
        (f.level, f.subject, f.said, getattr(f.error or f.warning, "do", "").replace("\n", "; "))
        for f in sorted(findings, key=lambda finding: order.index(finding.level))
    ]
    return display.table(rows, columns=["level", "subject", "found", "do"])


def warned(warnings: Iterable[CptError]) -> list[Finding]:
    """The warnings about a recipe as findings."""
    return [Finding("recipe", warning.what, warning=warning) for warning in warnings]


def raise_if_wrong(findings: list[Finding]) -> None:
    """Raises what was found wrong; several things in one error.

    Raises:
        CptError: Of the first finding's kind.
    """
    wrong = [finding.error for finding in findings if finding.error is not None]
    if len(wrong) == 1:
        raise wrong[0]
    if wrong:
        told = "\n".join(f"{n}. {error}" for n, error in enumerate(wrong, 1))
        raise type(wrong[0])(f"{len(wrong)} things keep this run from training\n{told}")
