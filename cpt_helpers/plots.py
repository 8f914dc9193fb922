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

_PARTS = {  # what the time before an event went into
    "start": "start-up",
    "step": "steps",
    "eval": "evaluation",
    "save": "checkpoints",
    "end": "final save",
}
_COLOURS = ("tab:gray", "tab:blue", "tab:green", "tab:orange", "tab:red")


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
    """Where the last launch's wall clock went, in seconds, to its last event.

    Each event closes the time since the one before it: a start the start-up (what a restart cost
    too), a save the checkpoint from its first byte on, the end the final model. So the parts come
    to the whole, whatever was measured within them.

    Returns:
        Seconds of ``start-up``, ``steps``, ``evaluation``, ``checkpoints`` and ``final save``.
    """
    launched = json.loads((run.logs / "launched.json").read_text("utf-8"))["launched"][-1]
    spent = dict.fromkeys(_PARTS.values(), 0.0)
    pace, before = 0.0, {"step": 0, "time": launched}
    for event in run.events():
        if event["time"] >= launched:
            since = event["time"] - max(before["time"], launched)
            if event["event"] in ("eval", "save"):  # after steps that were not logged
                steps = min(pace * (event["step"] - before["step"]), since)
                spent["steps"] += steps
                since -= steps
            spent[_PARTS[event["event"]]] += since
        pace, before = event["seconds"] if event["event"] == "step" else pace, event
    return {what: round(seconds, 1) for what, seconds in spent.items()}


def plot_time(spent: dict[str, float]) -> Figure:
    """The wall clock as one bar: each part with its seconds and its share.

    Args:
        spent: As :func:`time_spent` finds it.
    """
    import matplotlib.pyplot as plt

    whole, left = sum(spent.values()), 0.0
    figure, axes = plt.subplots(figsize=(9, 2.0), layout="constrained")
    for (what, seconds), colour in zip(spent.items(), _COLOURS, strict=True):
        share = seconds / (whole or 1)
        label = f"{what}\n{seconds:.0f} s · {share:.0%}"
        axes.barh([0], seconds, left=left, color=colour, label=label)
        left += seconds
    axes.set(yticks=[], xlim=(0, whole or 1))
    axes.set_xlabel(f"seconds since the launch, {whole:.0f} in all")
    figure.legend(ncols=len(spent), loc="outside upper center", frameon=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def costs(run: Run) -> dict[str, Any]:
    """A training's steps, tokens, time and memory, from its events; what they lack is left out."""
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
