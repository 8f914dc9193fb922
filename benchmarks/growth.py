"""How do speed and memory grow? ``make bench-growth``.

Short trainings through Ray and ZeRO-3: with 1, 2 and 4 workers, models of 3, 30 and 135 million
parameters, blocks of 128 to 1024 tokens, each with its slope; then, on paper, what 8, 64 and 512
GPUs would give. Writes ``benchmarks/results/growth.json`` and ``growth.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from hardware import describe_machine

from cpt_helpers import recipes

RESULTS = Path(__file__).parent / "results"
STEPS, TOKENS = 7, 2048  # optimizer steps, of which the last four count; tokens in each
SIZES = ("3M", "30M", "135M")
WORKERS, LENGTHS = (1, 2, 4), (128, 256, 512, 1024)
MIDDLE = {"model": "30M", "workers": 2, "length": 256}

# On paper: Gemma-3-4B, all weights, ZeRO-3, bf16, four blocks of 4,096 at once on H100s.
PARAMETERS, AT_ONCE, MFU, PEAK = 4.3e9, 4 * 4096, 0.40, 989e12
NODE = 8  # GPUs in a node; NVIDIA DGX H100's data sheet: NVLink 450 GB/s a direction and GPU,
NVLINK, NETWORK = 450e9, 50e9  # and a network card of 400 Gb/s for each GPU


def cases() -> Iterator[dict[str, Any]]:
    yield from (MIDDLE | {"model": size} for size in SIZES)
    yield from (MIDDLE | {"workers": n} for n in WORKERS if n != MIDDLE["workers"])
    yield from (MIDDLE | {"length": n} for n in LENGTHS if n != MIDDLE["length"])


def model_of(size: str, default: Path, storage: Path) -> Path:
    """The default model, or a random one of its kind."""
    if size == "135M":
        return default
    from transformers import AutoModelForCausalLM, LlamaConfig

    from cpt_helpers.setup import assets

    folder = storage / "models" / f"growth-{size}"
    if not (folder / "config.json").is_file():
        widths = {"3M": (64, 128, 2, 4), "30M": (320, 864, 12, 5)}[size]
        tokenizer = assets.tokenizer_of(str(default))
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        settings = LlamaConfig.from_pretrained(default).to_dict() | dict(
            zip(names, widths, strict=True)
        )
        settings |= {"num_key_value_heads": 1, "head_dim": None}
        model = AutoModelForCausalLM.from_config(LlamaConfig(**settings))
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


def measured(case: dict[str, Any], default: Path, storage: Path) -> dict[str, Any]:
    from cpt_helpers import pipeline
    from cpt_helpers.run import Run
    from cpt_helpers.train import launch

    run = Run.open(f"growth-{case['model']}-{case['workers']}-{case['length']}", storage)
    shutil.rmtree(run.folder, ignore_errors=True)
    overrides = {
        "model_name_or_path": str(model_of(case["model"], default, storage)),
        "ray_num_workers": case["workers"],
        "resources_per_worker": {"CPU": min(1, 2 / case["workers"])},
        "cutoff_len": case["length"],
        "per_device_train_batch_size": TOKENS // case["length"] // case["workers"],
        "max_steps": STEPS,
        "save_strategy": "no",
        "eval_strategy": "no",
        "eval_on_start": False,
        "report_to": "none",
    }
    pipeline.configure(run, "cpt_cpu.yaml", "", overrides)
    launch.train(run, recipes.load(run))
    events = run.events()
    steps = [event for event in events if event["event"] == "step"]
    start = events[0]
    seconds = statistics.median(event["seconds"] for event in steps[-4:])
    shutil.rmtree(run.folder)
    return case | {
        "parameters": start["parameters"]["all"],
        "flops_per_token": start["flops_per_token"],
        "tokens_per_second": round(TOKENS / seconds, 1),
        "mfu": steps[-1]["mfu"],
        "memory": steps[-1]["memory"],
        "before": start["memory_before"],
    }


def slope(x: list[float], y: list[float]) -> float:
    """The exponent of the power law through the points: 1 where y grows as x does."""
    return round(statistics.linear_regression([*map(math.log, x)], [*map(math.log, y)]).slope, 2)


def fitted(rows: list[dict[str, Any]]) -> dict[str, float]:
    sizes = [r for r in rows if (r["workers"], r["length"]) == (2, 256)]
    lengths = sorted(
        (r for r in rows if (r["workers"], r["model"]) == (2, "30M")), key=lambda r: r["length"]
    )
    own = [r["memory"] - r["before"] for r in sizes]
    return {
        "seconds a token by FLOPs a token": slope(
            [r["flops_per_token"] for r in sizes], [1 / r["tokens_per_second"] for r in sizes]
        ),
        "memory (libraries taken off) by parameters": slope([r["parameters"] for r in sizes], own),
        "seconds a token by length of a block": slope(
            [r["length"] for r in lengths], [1 / r["tokens_per_second"] for r in lengths]
        ),
        "FLOPs a token by length of a block": slope(
            [r["length"] for r in lengths], [r["flops_per_token"] for r in lengths]
        ),
        "memory (libraries taken off) by length of a block": slope(
            [r["length"] for r in lengths], [r["memory"] - r["before"] for r in lengths]
        ),
    }


def on_paper(gpus: int) -> dict[str, float]:
    """A micro-step of ZeRO-3: its computing, and its two gathers and one scatter of the weights."""
    compute = 6 * PARAMETERS * AT_ONCE / (MFU * PEAK)
    moved = 3 * 2 * PARAMETERS * (gpus - 1) / gpus
    communicate = moved / (NVLINK if gpus <= NODE else NETWORK)
    return {
        "gpus": gpus,
        "compute": compute,
        "communicate": communicate,
        "hidden": gpus * AT_ONCE / max(compute, communicate),
        "not_hidden": gpus * AT_ONCE / (compute + communicate),
        "batch": gpus * AT_ONCE,
    }


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{TOKENS:,} tokens a step, medians of four; {result['date']}, {result['machine']}. "
        "Four workers share two cores, each counted with a whole core's peak.",
        "",
        "| parameters | workers | tokens a block | tokens/s | of the peak | GiB a worker |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['parameters']:,} | {row['workers']} | {row['length']} "
            f"| {row['tokens_per_second']:,.0f} | {row['mfu']:.0%} | {row['memory'] / 2**30:.2f} |"
        )
    lines += ["", "| fitted | exponent |", "|---|---|"]
    lines += [f"| {name} | {value:.2f} |" for name, value in result["slopes"].items()]
    lines += [
        "",
        f"On paper only, nothing of it was run: {PARAMETERS / 1e9:.1f} billion parameters, ZeRO-3 "
        f"in bf16, {AT_ONCE:,} tokens at once on each H100, {MFU:.0%} of its peak, "
        f"{NVLINK / 1e9:.0f} GB/s within a node of {NODE}, {NETWORK / 1e9:.0f} GB/s a GPU between.",
        "",
        "| GPUs | computing, s | communicating, s | tokens/s, all hidden | tokens/s, none hidden "
        "| tokens a step |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["paper"]:
        lines.append(
            f"| {row['gpus']} | {row['compute']:.2f} | {row['communicate']:.2f} "
            f"| {row['hidden']:,.0f} | {row['not_hidden']:,.0f} | {row['batch']:,} |"
        )
    lines += [
        "",
        "What breaks first is that the batch may grow with the GPUs: 512 of them take 8.4 million "
        "tokens a step, and a corpus of a billion tokens is then 119 steps, too few to learn in. "
        "With the batch held, each GPU gets less at once, and the same bytes between nodes are no "
        "longer hidden: below 8,000 tokens a GPU communicating takes longer than computing. Then "
        "ZeRO-2, or ZeRO-3 within a node only, where the states fit.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", default="", help="where the runs lie")
    given = parser.parse_args()
    from cpt_helpers.run import storage_root
    from cpt_helpers.setup import assets, cluster

    storage = storage_root(given.storage)
    default = assets.fetch_model(recipes.model_of("cpt_cpu.yaml", {}, storage), storage)
    rows = []
    with cluster.ray_cluster():
        for case in cases():
            rows.append(measured(case, Path(default), storage))
            print(json.dumps(rows[-1]), flush=True)
    result = {
        "date": str(date.today()),
        "machine": describe_machine(),
        "rows": rows,
        "slopes": fitted(rows),
        "paper": [on_paper(gpus) for gpus in (8, 64, 512)],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "growth.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / "growth.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
