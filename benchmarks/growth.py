"""Speed and memory by number of workers, model size and block length. ``make bench-growth``.

Runs short trainings through Ray and ZeRO-3, and varies one setting at a time: 1, 2 and 4 workers,
models of 3, 30 and 135 million parameters, and blocks of 128 to 1024 tokens. Fits an exponent to
the model sizes and to the block lengths. Then estimates the speed on 8, 64 and 512 GPUs, which were
not measured. Writes ``benchmarks/results/growth.json`` and ``growth.md``.
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
STEPS, TOKENS = 7, 2048  # optimizer steps (the last four count); tokens per step
SIZES = ("3M", "30M", "135M")
WORKERS, LENGTHS = (1, 2, 4), (128, 256, 512, 1024)
MIDDLE = {"model": "30M", "workers": 2, "length": 256}

# The estimate: Gemma-3-4B, all weights, ZeRO-3, bf16, four blocks of 4,096 tokens per H100.
PARAMETERS, AT_ONCE, MFU, PEAK = 4.3e9, 4 * 4096, 0.40, 989e12
# From the data sheet of NVIDIA's DGX H100: 8 GPUs per node, NVLink with 450 GB/s per GPU and
# direction, and a network card of 400 Gb/s per GPU.
NODE = 8
NVLINK, NETWORK = 450e9, 50e9


def cases() -> Iterator[dict[str, Any]]:
    """The settings of each training: :data:`MIDDLE` with one value changed."""
    yield from (MIDDLE | {"model": size} for size in SIZES)
    yield from (MIDDLE | {"workers": n} for n in WORKERS if n != MIDDLE["workers"])
    yield from (MIDDLE | {"length": n} for n in LENGTHS if n != MIDDLE["length"])


def model_of(size: str, default: Path, storage: Path) -> Path:
    """Folder of the default model, or of a smaller one of its architecture with random weights."""
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
    """Trains with the settings of one case, and returns its row of the table."""
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
    """Fits a power law to the points, and returns its exponent. With 1, y is proportional to x."""
    return round(statistics.linear_regression([*map(math.log, x)], [*map(math.log, y)]).slope, 2)


def fitted(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The exponents of time and memory by model size and by block length."""
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
    """Estimates the speed of ZeRO-3 on H100s from one micro-batch per GPU.

    A micro-batch needs its computation, two gathers of the weights and one scatter of the
    gradients. ``hidden`` assumes that communication overlaps with computation completely, and
    ``not_hidden`` that it does not overlap.
    """
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
        f"{TOKENS:,} tokens per step; medians of the last four steps; {result['date']}, "
        f"{result['machine']}. The peak is that of matrix products on one core per worker. Four "
        "workers share two cores, so their share of the peak is too low.",
        "",
        "| parameters | workers | block length | tokens/s | share of the peak | GiB per worker |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['parameters']:,} | {row['workers']} | {row['length']} "
            f"| {row['tokens_per_second']:,.0f} | {row['mfu']:.0%} | {row['memory'] / 2**30:.2f} |"
        )
    lines += ["", "| fitted relation | exponent |", "|---|---|"]
    lines += [f"| {name} | {value:.2f} |" for name, value in result["slopes"].items()]
    lines += [
        "",
        "The table below is an estimate; nothing in it was measured. It assumes "
        f"{PARAMETERS / 1e9:.1f} billion parameters, ZeRO-3 in bf16, {AT_ONCE:,} tokens per "
        f"micro-batch on each H100 and {MFU:.0%} of its peak. It assumes {NVLINK / 1e9:.0f} GB/s "
        f"within a node of {NODE} GPUs and {NETWORK / 1e9:.0f} GB/s per GPU between nodes.",
        "",
        "| GPUs | computation, s | communication, s | tokens/s, full overlap "
        "| tokens/s, no overlap | tokens per step |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["paper"]:
        lines.append(
            f"| {row['gpus']} | {row['compute']:.2f} | {row['communicate']:.2f} "
            f"| {row['hidden']:,.0f} | {row['not_hidden']:,.0f} | {row['batch']:,} |"
        )
    lines += [
        "",
        "The assumption that fails first is that the batch can grow with the number of GPUs. With "
        "512 GPUs, a step takes 8.4 million tokens. A corpus of a billion tokens then gives 119 "
        "steps, too few to learn from. With a fixed batch, each GPU computes less, and the "
        "communication between nodes no longer overlaps completely. Below 8,000 tokens per GPU, "
        "communication takes longer than computation. Then use ZeRO-2, or ZeRO-3 within each node, "
        "if the states fit.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", default="", help="folder of the runs")
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
