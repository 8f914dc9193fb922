"""Parts of the time from the launch call to the first step. ``make bench-start``.

Trains the default recipe for one step, through Ray and ZeRO-3, in several turns. Skips the
evaluation before the first step. Writes ``benchmarks/results/start.json`` and ``start.md``. Also
writes Ray's timeline of the last turn to ``start.trace.json``, which git ignores. Open it at
https://ui.perfetto.dev.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

from hardware import describe_machine

from cpt_helpers import recipes

RESULTS = Path(__file__).parent / "results"
ONE_STEP = {
    "max_steps": 1,
    "save_strategy": "no",
    "eval_strategy": "no",
    "eval_on_start": False,
    "report_to": "none",
}
PARTS = {
    "launched": "checks of disk space and model, start of Ray, checks on every node",
    "entered": "start of Tune's actor and the workers, import of torch in each",
    "imported": "import of DeepSpeed and LLaMA-Factory",
    "start": "loading of data, tokenizer and model, set-up of DeepSpeed",
}


def measured(storage: Path) -> dict[str, float]:
    """Trains one step, and returns the seconds from the launch call to the end of each part."""
    from cpt_helpers import pipeline
    from cpt_helpers.run import Run
    from cpt_helpers.train import launch

    run = Run.open("bench-start", storage)
    shutil.rmtree(run.folder, ignore_errors=True)
    pipeline.configure(run, "cpt_cpu.yaml", "", ONE_STEP)
    args = recipes.load(run)
    threading.Thread(target=_timeline, args=[run], daemon=True).start()
    called = time.time()
    launch.train(run, args)
    (start,) = [event for event in run.events() if event["event"] == "start"]
    launched = json.loads((run.logs / "launched.json").read_text())["launched"][0]
    shutil.rmtree(run.folder)
    ends = [launched, start["entered"], start["imported"], start["time"]]
    return {name: round(end - called, 1) for name, end in zip(PARTS, ends, strict=True)}


def _timeline(run: Any) -> None:
    """Writes Ray's timeline after the training has begun."""
    import ray

    while not run.events():
        time.sleep(0.2)
    ray.timeline(str(RESULTS / "start.trace.json"))


def table(result: dict[str, Any]) -> str:
    turns = result["turns"]
    lines = [
        f"Seconds of each part in {len(turns)} turns; {result['date']}, {result['machine']}.",
        "",
        "| part | " + " | ".join(f"turn {i + 1}" for i in range(len(turns))) + " |",
        "|---" * (len(turns) + 1) + "|",
    ]
    before = [0.0] * len(turns)
    for name, said in PARTS.items():
        ends = [turn[name] for turn in turns]
        took = [f"{end - start:.1f}" for end, start in zip(ends, before, strict=True)]
        lines.append(f"| {said} | " + " | ".join(took) + " |")
        before = ends
    lines.append(
        "| **total, to the first step** | " + " | ".join(f"**{t['start']}**" for t in turns) + " |"
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", default="", help="folder of the run")
    parser.add_argument("--turns", type=int, default=3, help="number of turns")
    given = parser.parse_args()
    from cpt_helpers.run import storage_root

    storage = storage_root(given.storage)
    RESULTS.mkdir(exist_ok=True)
    turns = [measured(storage) for _ in range(given.turns)]
    result = {
        "date": str(date.today()),
        "machine": describe_machine(),
        "turns": turns,
        "median": statistics.median(turn["start"] for turn in turns),
    }
    (RESULTS / "start.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / "start.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
