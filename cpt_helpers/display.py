"""Output for a reader: tables, and the progress of a training while it runs."""

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
    """Makes a table without row numbers, which shows as HTML and as plain text.

    Args:
        rows: Tuples, or dicts with the columns' names.
        columns: The headings; by default ``""`` and ``"value"``, or the keys of the dicts.
    """
    import pandas as pd

    pd.set_option("display.max_colwidth", 120)
    pd.set_option("display.width", 250)
    rows = list(rows)
    if columns is None and not (rows and isinstance(rows[0], dict)):
        columns = ["", "value"]
    headings = None if columns is None else list(columns)
    return pd.DataFrame(rows, columns=headings, index=[""] * len(rows))


def progress(run: Run, attempt: str = "") -> tuple[int, int, str]:
    """Describes the state of a training: steps done, all steps, and a line of text.

    Args:
        run: The run that is trained.
        attempt: The name of the current launch or restart; until it starts, no step is new.
    """
    events = run.events()
    starts = [event for event in events if event["event"] == "start"]
    steps = [event for event in events if event["event"] == "step"]
    if not starts or (attempt and starts[-1].get("attempt") != attempt):
        done, total = (steps[-1]["step"], starts[-1]["max_steps"]) if steps else (0, 0)
        return done, total, "workers are starting (imports, model, data)"
    start, last = starts[-1], events[-1]
    total = start["max_steps"]
    if last["event"] == "end":
        return last["step"], total, "trained"
    if last["event"] == "save" and last["step"] == total:
        return last["step"], total, "writing the final model"
    if last["event"] == "start" and start["step"]:
        return start["step"], total, f"resumed from step {start['step']}"
    if not steps:
        before = "measuring held-out text, then " if start.get("eval_on_start") else ""
        return start["step"], total, f"{before}the first step"
    step = steps[-1]
    pace = statistics.median(event["seconds"] for event in steps[-5:])
    seconds_left = pace * (total - step["step"])
    line = f"loss {step['loss']:.3f}, {start['tokens_per_step'] / pace:.0f} tokens/s"
    if step.get("mfu"):
        line += f", {step['mfu']:.0%} of the peak"
    if seconds_left:
        line += f", {int(seconds_left // 60)}:{int(seconds_left % 60):02d} of steps left"
    elif last["event"] != "save":
        evaluates = start.get("eval_strategy") != "no"
        line += ", measuring held-out text" if evaluates else ", writing the final model"
    return step["step"], total, line


def say(line: str) -> None:
    """Prints a line above a changing progress line; credentials are hidden."""
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    print(redact(line), file=sys.stderr, flush=True)


@contextmanager
def follow(run: Run, attempts: list[str]) -> Iterator[None]:
    """Shows the progress of a training; a restart appends its name to ``attempts``."""
    with live(lambda: progress(run, attempts[-1])):
        yield


@contextmanager
def live(
    status: Callable[[], tuple[int, int, str]], *, label: str = "", unit: str = "step"
) -> Iterator[None]:
    """Shows one changing line while the block runs: a bar, the elapsed time and a text.

    Args:
        status: Returns the units done, all units (0 if unknown), and the text.
        label: The beginning of the line.
        unit: The name of a unit.
    """
    from tqdm import tqdm

    started, stopped = time.time(), threading.Event()
    show, close = _changing_line()

    def refresh() -> None:
        done, total, text = status()
        elapsed = time.time() - started
        bar = tqdm.format_meter(done, total or 1, elapsed, ncols=40, bar_format="{l_bar}{bar}|")
        position = f"{unit} {done}/{total or '?'} · {tqdm.format_interval(elapsed)}"
        show(f"{label}{bar} {position}", text)

    def watch() -> None:
        while not stopped.wait(_POLL_SECONDS):
            refresh()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        refresh()
        close()


def _changing_line() -> tuple[Callable[[str, str], None], Callable[[], None]]:
    """Returns functions that show and close a line: in a notebook cell, a terminal or a log."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None and "IPKernelApp" in shell.config:
        from IPython.display import display

        handle = display({"text/plain": "…"}, raw=True, display_id=True)
        return (
            lambda bar, text: handle.update({"text/plain": f"{bar} · {text}"}, raw=True),
            lambda: None,
        )
    if sys.stderr.isatty():

        def rewrite(bar: str, text: str) -> None:
            print(f"\r\033[K{bar} · {text}", end="", file=sys.stderr, flush=True)

        return rewrite, lambda: print(file=sys.stderr)
    shown = [""]

    def append(bar: str, text: str) -> None:  # a log gets a line when the text changes
        if text != shown[-1]:
            shown.append(text)
            print(f"{bar} · {text}", file=sys.stderr, flush=True)

    return append, lambda: None
