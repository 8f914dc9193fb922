"""Did it help? One HTML file that says so, made from an assessment and the run's own records.

The file needs nothing beside it: styles and figures are inside, no address is loaded. Its form is
in ``report.html.jinja``, what stands in it is gathered here.
"""

from __future__ import annotations

import base64
import io
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import plots, recipes
from ..config import resolution
from ..recipes import Recipe
from ..redact import has_token
from ..run import Run
from . import cloze, evaluation
from .assessment import Measured
from .cloze import Outcome
from .evaluation import percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = "report.html"
TEMPLATE = Path(__file__).with_name("report.html.jinja")
_SHOWN_ITEMS = 4


def write(run: Run, measured: Measured) -> Path:
    """Writes ``<run>/report.html``, in one piece.

    Args:
        run: Whose.
        measured: From :func:`assessment.measure`.

    Returns:
        The file.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"percent": percent, "signed": _signed}
    page = environment.from_string(TEMPLATE.read_text("utf-8")).render(**_contents(run, measured))
    path = run.folder / FILE
    part = path.with_name(f".{FILE}")
    part.write_text(page, "utf-8")
    part.replace(path)
    return path


def _contents(run: Run, measured: Measured) -> dict[str, Any]:
    """All that stands in the page, as text and numbers; the template escapes it."""
    args, results = recipes.load(run), run.results()
    events, roles = run.events(), args.held_out
    when = events[-1]["time"] if events else time.time()
    with _plain_figures():
        pictures = {"changes": _picture(_changes(measured))}
        if any(event["event"] == "step" for event in events):
            pictures["training"] = _picture(plots.plot(run, roles))
    spent = plots.time_spent(run) if (run.logs / "launched.json").is_file() and events else {}
    return {
        "run": run.name,
        "measured": measured,
        "resamples": evaluation.RESAMPLES,
        "facts": [
            ("base model", measured.base),
            ("corpus", ", ".join(resolution.names_of(args.get("dataset")))),
            ("recipe", results.get("config", {}).get("recipe", "its own")),
            ("trained", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(when))),
        ],
        "pictures": pictures,
        "spent": [(what, seconds, seconds / sum(spent.values())) for what, seconds in spent.items()]
        if sum(spent.values())
        else [],
        "costs": [*_costs_in_words(plots.costs(run)), *_incidents(events)],
        "cloze": _cloze_contents(measured.outcome),
        "versions": results.get("versions", {}),
        "settings": list(_settings(run, args)),
    }


def _cloze_contents(outcome: Outcome | None) -> dict[str, Any]:
    if outcome is None:
        return {}
    rows = [
        (when, outcome.accuracy(picks), *cloze.wilson(outcome.cloze, picks))
        for when, picks in (("base", outcome.before), ("trained", outcome.after))
    ]
    items = list(zip(outcome.cloze.items, outcome.before, outcome.after, strict=True))
    changed = [one for one in items if (one[1] == one[0].right) != (one[2] == one[0].right)]
    same = [one for one in items if one not in changed]
    draw = random.Random(0)  # those whose answer changed come first
    shown = draw.sample(changed, len(changed)) + draw.sample(same, len(same))
    examples = [
        {
            "title": item.title,
            "prompt": item.prompt[-240:],
            "cut": len(item.prompt) > 240,
            "after": item.after,
            "options": item.options,
            "right": item.right,
            "base": base,
            "trained": trained,
        }
        for item, base, trained in shown[:_SHOWN_ITEMS]
    ]
    both = [(base == i.right, trained == i.right) for i, base, trained in items]
    return {
        "rows": rows,
        "examples": examples,
        "learnt": both.count((False, True)),
        "forgot": both.count((True, False)),
    }


def _costs_in_words(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if not found:
        return
    yield "tokens trained on", f"{found['tokens']:,} in {found['steps']:,} steps"
    yield "parameters trained", f"{found['trained_parameters']:,}"
    yield "workers", str(found["workers"])
    yield "from the first worker's start to the end", f"{found['seconds']:,.0f} s"
    yield "speed, median of the steps", f"{found['tokens_per_second']:,.1f} tokens/s"
    if "mfu" in found:
        yield "share of the device's peak (MFU), median", f"{found['mfu']:.0%}"
    if "peak_memory" in found:
        yield "peak memory of a worker", f"{found['peak_memory'] / 2**30:.2f} GiB"


def _incidents(events: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Restarts of the training, and each time it diverged."""
    starts = [event["step"] for event in events if event["event"] == "start"]
    if len(starts) > 1:
        yield "restarts", ", ".join(f"from step {step}" for step in starts[1:])
    for event in events:
        if event["event"] == "diverged":
            yield "diverged", f"at step {event['step']}, rank {event['rank']}: {event['reason']}"


def _settings(run: Run, args: Recipe) -> Iterator[tuple[str, str]]:
    """The resolved recipe without this machine's folders, and without anything like a token."""
    for key, value in args.items():
        if has_token({key: value}) or key.endswith(("token", "password", "secret")):
            yield key, "(not shown)"
            continue
        said = str(value).replace(f"{run.folder}/", "").replace(f"{run.storage}/", "")
        yield key, Path(said).name if said.startswith("/") else said


def _changes(measured: Measured) -> Figure:
    """A dot a document: how its bits per byte changed, one line a corpus."""
    import matplotlib.pyplot as plt

    rows = len(measured.comparisons)
    figure, axes = plt.subplots(figsize=(10, 1.1 + 0.65 * rows), layout="constrained")
    draw = random.Random(0)
    for row, comparison in enumerate(measured.comparisons):
        moved = [
            after.bits_per_byte - before.bits_per_byte
            for before, after in zip(
                comparison.before.documents, comparison.after.documents, strict=True
            )
        ]
        heights = [row + draw.uniform(-0.22, 0.22) for _ in moved]
        colours = ["#2a7f62" if value < 0 else "#b5482f" for value in moved]
        axes.scatter(moved, heights, c=colours, alpha=0.6, s=28, linewidths=0)
    axes.axvline(0, color="#555", linewidth=1)
    axes.set_yticks(range(rows), [c.corpus for c in measured.comparisons])
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_xlabel("change in bits per byte; left of the line is better, a dot is a document")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


def _picture(figure: Figure) -> str:
    """A figure as the source of an ``img``."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    plt.close(figure)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@contextmanager
def _plain_figures() -> Iterator[None]:
    """Figures without a display, and without a notebook showing them once more."""
    import matplotlib.pyplot as plt

    with plt.ioff(), plt.rc_context({"font.size": 11, "axes.edgecolor": "#777"}):
        yield


def _signed(value: float, digits: int = 3) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")
