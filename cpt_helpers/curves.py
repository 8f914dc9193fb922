"""A run's curves: losses, perplexities, where its time went and what it cost."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def perplexities(run: Run, roles: dict[str, str]) -> dict[str, dict[str, float]]:
    """Held-out perplexity before the first and after the last step, by role.

    Args:
        run: Whose.
        roles: ``{"domain": <dataset>, "general": <dataset>}``.
    """
    found: dict[str, dict[str, float]] = {}
    for role, dataset in roles.items():
        curve = [(s, math.exp(loss)) for s, loss in held_out_curve(run, dataset)]
        if len(curve) > 1:
            found[role] = {"before": round(curve[0][1], 3), "after": round(curve[-1][1], 3)}
    return found


def held_out_curve(run: Run, dataset: str) -> list[tuple[int, float]]:
    """Step and loss of every measurement of one held-out dataset."""
    return [
        (event["step"], event["loss"])
        for event in run.events()
        if event["event"] == "eval" and event["dataset"] == dataset
    ]


def plot(run: Run, roles: dict[str, str]) -> Figure:
    """Training loss by step, and held-out perplexity beside it."""
    import matplotlib.pyplot as plt

    steps = [event for event in run.events() if event["event"] == "step"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    x = [event["step"] for event in steps]
    y = [event["loss"] for event in steps]
    left.plot(x, y, color="tab:blue", alpha=0.35, linewidth=1, label="a step")
    window = max(len(y) // 8, 1)
    smooth = [statistics.mean(y[max(i - window, 0) : i + window + 1]) for i in range(len(y))]
    left.plot(x, smooth, color="tab:blue", linewidth=2, label=f"mean over {2 * window + 1}")
    left.set(xlabel="step", ylabel="training loss", title="What it is trained on")
    left.legend(frameon=False)
    for (role, dataset), colour in zip(roles.items(), ("tab:green", "tab:gray"), strict=False):
        curve = held_out_curve(run, dataset)
        values = [math.exp(loss) for _, loss in curve]
        right.plot([s for s, _ in curve], values, "o-", color=colour, label=f"{role}: {dataset}")
        for (step, _), value in zip(curve, values, strict=True):
            right.annotate(
                f"{value:.1f}", (step, value), (0, 6), textcoords="offset points", ha="center"
            )
    right.set(xlabel="step", ylabel="perplexity", title="What it has never seen")
    right.margins(y=0.18)
    right.set_ylim(bottom=0)
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def time_spent(run: Run) -> dict[str, float]:
    """Where the last launch's wall clock went, in seconds: start-up (restarts too), steps, …."""
    launched = json.loads((run.logs / "launched.json").read_text("utf-8"))["launched"][-1]
    events = run.events()
    by = {kind: [e for e in events if e["event"] == kind] for kind in ("step", "eval", "save")}
    done = [0] + [e["step"] for e in by["step"]]
    times = [launched, *(e["time"] for e in events)]
    gaps = zip(events, times, strict=False)  # an event, and when the one before it was
    parts = {
        "start-up": sum(
            e["time"] - max(before, launched)
            for e, before in gaps
            if e["event"] == "start" and e["time"] >= launched
        ),
        "steps": sum(
            e["seconds"] * (e["step"] - before)
            for e, before in zip(by["step"], done, strict=False)
            if e["time"] >= launched
        ),
        "evaluation": sum(e["seconds"] for e in by["eval"] if e["time"] >= launched),
        "checkpoints": sum(e["seconds"] for e in by["save"] if e["time"] >= launched),
    }
    if events[-1]["event"] == "end":  # the final model, gathered and written
        parts["final save"] = events[-1]["time"] - events[-2]["time"]
    rest = events[-1]["time"] - launched - sum(parts.values())
    return {what: round(seconds, 1) for what, seconds in (parts | {"other": max(rest, 0)}).items()}


def costs(run: Run) -> dict[str, Any]:
    """What a training came to, from its events: what they do not tell is left out."""
    events = run.events()
    steps = [event for event in events if event["event"] == "step"]
    starts = [event for event in events if event["event"] == "start"]
    if not steps or not starts:
        return {}
    tokens = starts[-1]["tokens_per_step"]
    memory = [event["memory"] for event in steps if event.get("memory")]
    memory += events[-1].get("memory") or []
    mfu = [event["mfu"] for event in steps if event.get("mfu")]
    found = {
        "steps": steps[-1]["step"],
        "tokens": steps[-1]["step"] * tokens,
        "seconds": round(events[-1]["time"] - events[0]["time"], 1),
        "tokens_per_second": round(tokens / statistics.median(s["seconds"] for s in steps), 1),
        "workers": starts[-1]["world_size"],
        "trained_parameters": starts[-1]["parameters"]["trained"],
    }
    if memory:
        found["peak_memory"] = max(memory)
    if mfu:
        found["mfu"] = round(statistics.median(mfu), 4)
    return found


def save_figure(run: Run, figure: Figure, name: str) -> Path:
    """Keeps a figure in the run, as ``figures/<name>.png``."""
    run.figures.mkdir(parents=True, exist_ok=True)
    path = run.figures / f"{name}.png"
    figure.savefig(path, dpi=130)
    return path
