"""Compares the planned memory with the measured memory of processes. ``make bench-memory``.

Trains a model of 3 million parameters and the default model for a few steps on two workers. Uses
each ZeRO stage (1, 2, 3) with each method: all weights, two layers (freeze) and LoRA. Compares each
worker's peak memory with the estimate of ``config.memory``. Writes
``benchmarks/results/memory.json`` and ``memory.md``.
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
KINDS: dict[str, dict[str, Any]] = {
    "full": {"finetuning_type": "full"},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 2},
    "lora": {"finetuning_type": "lora", "lora_rank": 8, "lora_target": "all"},
}
STEPS = 3


def measured(storage: Path, name: str, model: str, stage: int, kind: str) -> dict[str, Any]:
    """Trains with one ZeRO stage and method, or reuses the existing run; returns its row."""
    from cpt_helpers.config import memory, resolution
    from cpt_helpers.data import corpora, mixing
    from cpt_helpers.run import Run
    from cpt_helpers.setup import assets
    from cpt_helpers.train import launch

    run = Run.open(f"memory-{name}-z{stage}-{kind}", storage)
    overrides = KINDS[kind] | {
        "model_name_or_path": model,
        "deepspeed": f"deepspeed-configs/ds_z{stage}_config.json",
        "max_steps": STEPS,
        "eval_strategy": "no",
        "eval_on_start": False,
        "save_strategy": "no",
        "report_to": "none",
    }
    domain, general = corpora.prepare("ray_docs", storage), corpora.prepare("news", storage)
    recipe = recipes.read_recipe("cpt_cpu.yaml")[1] | overrides
    tokenizer = assets.tokenizer_of(model)
    made = mixing.for_recipe(recipe, [(domain, 1.0)], [domain, general], tokenizer)
    resolved = resolution.resolve(run, "cpt_cpu.yaml", overrides, domain.name, str(made.path))
    resolution.write(run, resolved)
    args = recipes.load(run)
    launch.train(run, args)
    events = run.events()
    start, last, end = events[0], events[-2], events[-1]
    expected = memory.of_worker(args, memory.shape_of(args))
    return {
        "model": name,
        "zero": stage,
        "kind": kind,
        "parameters": start["parameters"],
        "before": start["memory_before"],
        "steps": last["memory"],
        "workers": end["memory"],
        "predicted": expected.as_dict(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", default="", help="the storage folder of the runs")
    parser.add_argument(
        "--only", default="", help="only rows whose name contains this text, such as tiny or z3"
    )
    given = parser.parse_args()
    from cpt_helpers.run import storage_root
    from cpt_helpers.setup import assets, cluster
    from cpt_helpers.train import fault_demo

    storage = storage_root(given.storage)
    default = assets.fetch_model(recipes.model_of("cpt_cpu.yaml", {}, storage), storage)
    tiny = storage / "models" / "tiny"
    if not (tiny / "config.json").is_file():
        fault_demo.small_model(str(default), tiny)
    rows = []
    with cluster.ray_cluster():
        for name, model in (("tiny", tiny), ("default", default)):
            for stage in (1, 2, 3):
                for kind in KINDS:
                    if given.only and given.only not in f"{name}-z{stage}-{kind}":
                        continue
                    rows.append(measured(storage, name, str(model), stage, kind))
                    print(json.dumps(rows[-1]), flush=True)
                    write(rows, describe_machine())


def write(rows: list[dict[str, Any]], machine: str) -> None:
    """Writes the results and their table."""
    RESULTS.mkdir(exist_ok=True)
    result = {"date": str(date.today()), "machine": machine, "rows": rows}
    (RESULTS / "memory.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / "memory.md").write_text(table(result))


def table(result: dict[str, Any]) -> str:
    lines = [
        f"Predicted and measured peak resident memory per worker, in MiB, with two workers over "
        f"{STEPS} steps; {result['date']}, {result['machine']}.",
        "",
        "| model | ZeRO stage | method | predicted | rank 0 | rank 1 | predicted / mean of ranks |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        predicted = row["predicted"]["peak"] / 2**20
        seen = [row["steps"] / 2**20, row["workers"][1] / 2**20]  # before the final save
        lines.append(
            f"| {row['model']} | {row['zero']} | {row['kind']} | {predicted:,.0f} | "
            f"{seen[0]:,.0f} | {seen[1]:,.0f} | {2 * predicted / sum(seen):.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
