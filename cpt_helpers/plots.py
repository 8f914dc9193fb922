"""The measurements of a run as plots: losses, perplexities, time and cost."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PARTS = {  # the part of the wall clock that ends with an event
    "start": ("start-up", "tab:gray"),
    "step": ("steps", "tab:blue"),
    "eval": ("evaluation", "tab:green"),
    "save": ("checkpoints", "tab:orange"),
    "end": ("final save", "tab:red"),
}


def perplexities(run: Run, roles: dict[str, str]) -> dict[str, dict[str, float]]:
    """Returns the first and last held-out perplexity of ``{"domain": <dataset>, …}``, by role."""
    measured = {}
    for role, dataset in roles.items():
        values = [math.exp(loss) for _, loss in held_out_curve(run, dataset)]
        if len(values) > 1:
            measured[role] = {"before": round(values[0], 3), "after": round(values[-1], 3)}
    return measured


def held_out_curve(run: Run, dataset: str) -> list[tuple[int, float]]:
    """Returns step and loss of each evaluation of one held-out dataset."""
    return [
        (event["step"], event["loss"])
        for event in run.events()
        if event["event"] == "eval" and event["dataset"] == dataset
    ]


def plot(run: Run, roles: dict[str, str]) -> Figure:
    """Plots the training loss, and next to it the held-out perplexity."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    steps = [event for event in run.events() if event["event"] == "step"]
    x = [event["step"] for event in steps]
    y = [event["loss"] for event in steps]
    left.plot(x, y, color="tab:blue", alpha=0.35, linewidth=1, label="one step")
    window = max(len(y) // 8, 1)
    smooth = [statistics.mean(y[max(i - window, 0) : i + window + 1]) for i in range(len(y))]
    left.plot(x, smooth, color="tab:blue", linewidth=2, label=f"mean over {2 * window + 1}")
    left.set(xlabel="step", ylabel="loss", title="Training text")
    for (role, dataset), colour in zip(roles.items(), ("tab:green", "tab:gray"), strict=False):
        curve = held_out_curve(run, dataset)
        x, y = [step for step, _ in curve], [math.exp(loss) for _, loss in curve]
        right.plot(x, y, "o-", color=colour, label=f"{role}: {dataset}")
        offset = 6 if colour == "tab:green" else -14  # above one curve, below the other
        for step, value in zip(x, y, strict=True):
            right.annotate(
                f"{value:.1f}", (step, value), (0, offset), textcoords="offset points", ha="center"
            )
    right.set(xlabel="step", ylabel="perplexity", title="Held-out text")
    right.margins(y=0.18)
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def time_spent(run: Run) -> dict[str, float]:
    """Divides the wall clock of the last launch, up to its last event, into parts.

    The time before an event belongs to the event's part. A start closes the start-up, and a
    restart's start also the work that was lost. The parts therefore add up to the whole.

    Returns:
        Seconds of ``start-up``, ``steps``, ``evaluation``, ``checkpoints`` and ``final save``.
    """
    launched = json.loads((run.logs / "launched.json").read_text("utf-8"))["launched"][-1]
    spent = {part: 0.0 for part, _ in _PARTS.values()}
    pace, before = 0.0, {"step": 0, "time": launched}
    for event in run.events():
        if event["event"] not in _PARTS:  # "diverged": its time belongs to the restart
            continue
        if event["time"] >= launched:
            seconds = event["time"] - max(before["time"], launched)
            if event["event"] in ("eval", "save"):  # after steps that were not logged
                steps = min(pace * (event["step"] - before["step"]), seconds)
                spent["steps"] += steps
                seconds -= steps
            spent[_PARTS[event["event"]][0]] += seconds
        pace, before = event["seconds"] if event["event"] == "step" else pace, event
    return {part: round(seconds, 1) for part, seconds in spent.items()}


def plot_time(spent: dict[str, float]) -> Figure:
    """Plots the result of :func:`time_spent` as one bar: seconds and share of each part."""
    import matplotlib.pyplot as plt

    whole, left = sum(spent.values()), 0.0
    figure, axes = plt.subplots(figsize=(9, 2.0), layout="constrained")
    for part, colour in _PARTS.values():
        seconds = spent[part]
        label = f"{part}\n{seconds:.0f} s · {seconds / (whole or 1):.0%}"
        axes.barh([0], seconds, left=left, color=colour, label=label)
        left += seconds
    axes.set(yticks=[], xlim=(0, whole or 1))
    axes.set_xlabel(f"seconds since the launch, {whole:.0f} in all")
    figure.legend(ncols=len(spent), loc="outside upper center", frameon=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def costs(run: Run) -> dict[str, Any]:
    """Returns the steps, tokens, time and memory of a training, as far as its events have them."""
    events = run.events()
    steps = [event for event in events if event["event"] == "step"]
    starts = [event for event in events if event["event"] == "start"]
    if not steps or not starts:
        return {}
    tokens = starts[-1]["tokens_per_step"]
    memory = [event["memory"] for event in steps if event.get("memory")]
    memory += events[-1].get("memory") or []
    mfu = [event["mfu"] for event in steps if event.get("mfu")]
    measured = {
        "steps": steps[-1]["step"],
        "tokens": steps[-1]["step"] * tokens,
        "seconds": round(events[-1]["time"] - events[0]["time"], 1),
        "tokens_per_second": round(tokens / statistics.median(s["seconds"] for s in steps), 1),
        "workers": starts[-1]["world_size"],
        "trained_parameters": starts[-1]["parameters"]["trained"],
    }
    if memory:
        measured["peak_memory"] = max(memory)
    if mfu:
        measured["mfu"] = round(statistics.median(mfu), 4)
    return measured


def save_figure(run: Run, figure: Figure, name: str) -> Path:
    """Saves a figure in the run, as ``figures/<name>.png``."""
    run.figures.mkdir(parents=True, exist_ok=True)
    path = run.figures / f"{name}.png"
    figure.savefig(path, dpi=130)
    return path
