"""Results and costs of full, freeze and LoRA training. ``make bench-methods``.

Trains the default model on the default corpus with each of the three CPU recipes, through Ray and
ZeRO-3. Each recipe trains on the same tokens. Writes ``benchmarks/results/methods.json`` and
``methods.md``. Reuses existing runs.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

from hardware import describe_machine

from cpt_helpers import recipes

RESULTS = Path(__file__).parent / "results"
RECIPES = {"full": "cpt_cpu.yaml", "freeze": "cpt_cpu_freeze.yaml", "lora": "cpt_cpu_lora.yaml"}


def trained(kind: str, storage: Path, steps: int | None) -> dict[str, Any]:
    """Trains with one method, or reuses the existing run; returns its row of the table."""
    from cpt_helpers import pipeline, plots
    from cpt_helpers.checkpoints import manifests
    from cpt_helpers.run import Run
    from cpt_helpers.train import launch

    run = Run.open(f"methods-{kind}", storage)
    overrides: dict[str, Any] = {"report_to": "none"}
    if steps:
        overrides |= {"max_steps": steps, "save_steps": steps, "eval_steps": steps}
    pipeline.configure(run, RECIPES[kind], "", overrides)
    args = recipes.load(run)
    train = launch.train(run, args)
    return {
        "method": kind,
        "learning_rate": args["learning_rate"],
        "trained": train["parameters"]["trained"],
        "parameters": train["parameters"]["all"],
        "tokens": train["tokens"],
        "perplexity": plots.perplexities(run, args.held_out),
        "seconds": train["seconds"],
        "tokens_per_second": train["tokens_per_second"],
        "peak_memory": train["peak_memory"],
        "checkpoint": manifests.latest(run).bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", default="", help="folder of the runs")
    parser.add_argument("--steps", type=int, help="number of steps (default: the recipes')")
    given = parser.parse_args()
    from cpt_helpers.run import storage_root

    storage = storage_root(given.storage)
    rows = []
    for kind in RECIPES:
        rows.append(trained(kind, storage, given.steps))
        print(json.dumps(rows[-1]), flush=True)
        result = {"date": str(date.today()), "machine": describe_machine(), "rows": rows}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "methods.json").write_text(json.dumps(result, indent=2) + "\n")
        (RESULTS / "methods.md").write_text(table(result))


def table(result: dict[str, Any]) -> str:
    heads = ["method", "parameters trained", "domain perplexity", "general perplexity"]
    heads += ["tokens/s", "seconds", "GiB per worker", "MB per checkpoint"]
    lines = [
        f"Each method trains on the same {result['rows'][0]['tokens']:,} tokens; {result['date']}, "
        f"{result['machine']}.",
        "",
        f"| {' | '.join(heads)} |",
        "|" + "---|" * len(heads),
    ]
    for row in result["rows"]:
        share = row["trained"] / row["parameters"]
        ppl = [
            f"{p['before']:.2f} → {p['after']:.2f} ({p['after'] / p['before'] - 1:+.1%})"
            for p in (row["perplexity"][role] for role in ("domain", "general"))
        ]
        cells = [
            row["method"],
            f"{row['trained']:,} ({share:.1%})",
            *ppl,
            f"{row['tokens_per_second']:.0f}",
            f"{row['seconds']:.0f}",
            f"{row['peak_memory'] / 2**30:.1f}",
            f"{row['checkpoint'] / 1e6:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
