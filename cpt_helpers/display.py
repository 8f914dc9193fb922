"""What a reader sees: tables, and a training's progress while it runs."""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .redact import redact
from .run import Run

if TYPE_CHECKING:
    from pandas import DataFrame

_POLL_SECONDS = 1.0


def table(rows: Iterable[Any], columns: Iterable[str] | None = None) -> DataFrame:
    """Rows as a table without row numbers, readable as HTML and as plain text.

    Args:
        rows: Tuples, or dicts with the columns' names.
        columns: Their headings; by default ``""`` and ``"value"``, or the dicts' keys.
    """
    import pandas as pd

    pd.set_option("display.max_colwidth", 120, "display.width", 250)
    rows = list(rows)
    if columns is None and not (rows and isinstance(rows[0], dict)):
        columns = ["", "value"]
    return pd.DataFrame(rows, columns=columns, index=[""] * len(rows))


def progress(run: Run, attempt: str = "") -> tuple[int, int, str]:
    """Where a training is: steps done, steps in all, and a line about it.

    Args:
        run: Whose.
        attempt: The name of the current launch or restart; before it starts, nothing progresses.
    """
    events = run.events()
    starts = [event for event in events if event["event"] == "start"]
    steps = [event for event in events if event["event"] == "step"]
    if not starts or (attempt and starts[-1].get("attempt") != attempt):
        done, of = (steps[-1]["step"], starts[-1]["max_steps"]) if steps else (0, 0)
        return done, of, "workers are starting (imports, model, data)"
    start = starts[-1]
    last = events[-1]
    if last["event"] == "end":
        return last["step"], start["max_steps"], "trained"
    if last["event"] == "save" and last["step"] == start["max_steps"]:
        return last["step"], start["max_steps"], "the final model is being written"
    if last["event"] == "start" and start["step"]:
        return start["step"], start["max_steps"], f"resumed from step {start['step']}"
    if not steps:
        measures = "measuring held-out text, then " if start.get("eval_on_start") else ""
        return start["step"], start["max_steps"], f"{measures}the first step"
    pace = statistics.median(event["seconds"] for event in steps[-5:])
    left = pace * (start["max_steps"] - steps[-1]["step"])
    line = f"loss {steps[-1]['loss']:.3f}, {start['tokens_per_step'] / pace:.0f} tokens/s"
    if steps[-1].get("mfu"):
        line += f", {steps[-1]['mfu']:.0%} of the peak"
    if left:
        line += f", {int(left // 60)}:{int(left % 60):02d} of steps left"
    elif last["event"] != "save":
        measures = start.get("eval_strategy") != "no"
        line += ", measuring held-out text" if measures else ", the final model is being written"
    return steps[-1]["step"], start["max_steps"], line


def say(line: str) -> None:
    """Prints a line that stays, next to a progress line that changes; credentials are hidden."""
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    print(redact(line), file=sys.stderr, flush=True)


@contextmanager
def follow(run: Run, attempts: list[str]) -> Iterator[None]:
    """Shows a training's progress while the block runs: one line that changes.

    Args:
        run: Whose.
        attempts: The names of its launch and restarts; a restart adds to it.
    """
    done = threading.Event()
    show, close = _display()

    def watch() -> None:
        from tqdm import tqdm

        since = time.time()
        while not done.wait(_POLL_SECONDS):
            step, steps, line = progress(run, attempts[-1])
            bar = tqdm.format_meter(
                step, steps or 1, time.time() - since, ncols=40, bar_format="{l_bar}{bar}|"
            )
            elapsed = tqdm.format_interval(time.time() - since)
            show(f"{bar} step {step}/{steps or '?'} · {elapsed} · {line}")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        step, steps, line = progress(run)
        show(f"step {step}/{steps or '?'} · {line}")
        close()


def _display() -> tuple[Callable[[str], None], Callable[[], None]]:
    """How to show a line that changes: an output of the notebook cell, or a terminal line."""
    try:
        from IPython import get_ipython

        in_notebook = get_ipython() is not None and "IPKernelApp" in get_ipython().config
    except ImportError:
        in_notebook = False
    if in_notebook:
        from IPython.display import TextDisplayObject, display

        class Line(TextDisplayObject):
            def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, str]:
                return {"text/plain": self.data}

        handle = display(Line("…"), display_id=True)
        return lambda line: handle.update(Line(line)), lambda: None
    if sys.stderr.isatty():
        return (
            lambda line: print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True),
            lambda: print(file=sys.stderr),
        )
    said: list[str] = []

    def each_change(line: str) -> None:  # a log file: a line a step, not a line a second
        key = line.split(" · ")[-1]
        if not said or said[-1] != key:
            said.append(key)
            print(line, file=sys.stderr, flush=True)

    return each_change, lambda: None
