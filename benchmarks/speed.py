"""Training speed of the default recipe, compared with three other setups. ``make bench``.

Measures four setups with the same model, blocks, batch and precision:

- the guide's settings, through Ray and ZeRO-3
- our recipe, through Ray and ZeRO-3
- LLaMA-Factory alone, under torchrun with DDP
- a plain PyTorch loop (:mod:`plain`)

Also measures the speed of matrix products alone. The setups run in turns, so that a drift of the
machine's speed affects all of them. Writes ``benchmarks/results/speed.json``, ``speed.md`` and
``speed.png``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import yaml
from hardware import describe_machine

from cpt_helpers import recipes

RESULTS = Path(__file__).parent / "results"
STEPS, STEADY = 6, 3  # steps per turn; only the last ones count, as the first are slower
WORKERS = 2
# The guide's settings that a CPU supports: a micro-batch of one block with gradient accumulation,
# gradient checkpointing, the unfused AdamW, and DeepSpeed's default bucket sizes.
GUIDE: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "disable_gradient_checkpointing": None,
    "optim": "adamw_torch",
}
SHORT = {
    "max_steps": STEPS,
    "save_steps": STEPS,
    "eval_strategy": "no",
    "eval_on_start": False,
    "report_to": "none",
}
NAMES = {
    "guide": "the guide's settings, Ray + ZeRO-3",
    "default": "our recipe, Ray + ZeRO-3",
    "ddp": "LLaMA-Factory alone, torchrun + DDP",
    "plain": "a plain PyTorch loop",
}


def through_ray(kind: str, turn: int, storage: Path) -> dict[str, Any]:
    """Trains through Ray with the guide's settings or our recipe, and returns the measurements."""
    from cpt_helpers import pipeline
    from cpt_helpers.run import Run
    from cpt_helpers.train import launch

    run = Run.open(f"bench-{kind}-{turn}", storage)
    shutil.rmtree(run.folder, ignore_errors=True)
    recipe = recipes.read_recipe("cpt_cpu.yaml")[1]
    own: dict[str, Any] = {}
    if kind == "guide":
        blocks = recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"]
        settings = json.loads((recipes.DEEPSPEED_CONFIGS / "ds_z3_config.json").read_text())
        settings["zero_optimization"]["reduce_bucket_size"] = "auto"
        file = storage / "bench-guide-ds.json"
        file.write_text(json.dumps(settings, indent=2))
        own = GUIDE | {"gradient_accumulation_steps": blocks, "deepspeed": str(file)}
    pipeline.configure(run, "cpt_cpu.yaml", "", SHORT | own)
    args = recipes.load(run)
    called = time.time()
    launch.train(run, args)
    events = run.events()
    steps = [event for event in events if event["event"] == "step"]
    (start,) = [event for event in events if event["event"] == "start"]
    (save,) = [event for event in events if event["event"] == "save"]
    copied = plain_copy(Path(save["path"]))
    row = {
        "seconds": [event["seconds"] for event in steps],
        "losses": [event["loss"] for event in steps],
        "memory": max(event["memory"] for event in steps),
        "start_up": round(start["time"] - called, 1),
        "checkpoint": {"bytes": save["bytes"], "seconds": save["seconds"], "copies": copied},
        "flops_per_token": start["flops_per_token"],
    }
    shutil.rmtree(run.folder)
    return row


def plain_copy(folder: Path) -> dict[str, float]:
    """Copies a checkpoint to the same disk twice, and returns the seconds of each copy.

    Returns:
        ``new``: seconds of a copy into memory that was not used recently, as for a checkpoint.
        ``again``: seconds of a second copy, into the memory that the first copy released.
    """
    took, target = {}, folder.parent / "copy"
    for kind, pause in (("new", 10), ("again", 0)):
        time.sleep(pause)
        since = time.perf_counter()
        shutil.copytree(folder, target)
        took[kind] = round(time.perf_counter() - since, 2)
        shutil.rmtree(target)
    return took


def _alone(command: list[str], own: dict[str, str], log: Path, watch: Any) -> int:
    """Runs a command and calls ``watch`` ten times per second.

    Returns:
        The peak resident memory of any one of its processes, in bytes.
    """
    from cpt_helpers.setup import machine

    most = 0
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=os.environ | machine.KEEP_MEMORY | own
        )
        seen = psutil.Process(process.pid)
        while process.poll() is None:
            time.sleep(0.1)
            watch()
            for child in (seen, *seen.children(recursive=True)):
                try:
                    most = max(most, child.memory_info().rss)
                except psutil.Error:
                    continue
    if process.returncode:
        sys.exit(f"{' '.join(command[:4])} … failed:\n{log.read_text(errors='replace')[-3000:]}")
    return most


def ddp(turn: int, storage: Path) -> dict[str, Any]:
    """Trains with LLaMA-Factory's own launcher: one process per core, no DeepSpeed, no Ray."""
    import llamafactory

    args, _ = recipe_for_others(storage)
    with tempfile.TemporaryDirectory() as scratch:
        file, output = Path(scratch, "train.yaml"), Path(scratch, "output")
        args |= {"output_dir": str(output), "ddp_backend": "gloo"}
        file.write_text(yaml.safe_dump(args))
        launcher = Path(llamafactory.__file__).with_name("launcher.py")
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(WORKERS)]
        lines, times = output / "trainer_log.jsonl", []

        def watch() -> None:
            done = len(lines.read_text().splitlines()) if lines.is_file() else 0
            times.extend([time.perf_counter()] * (done - len(times)))

        memory = _alone(
            [sys.executable, *torchrun, str(launcher), str(file)],
            {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            Path(scratch, "log"),
            watch,
        )
        watch()
        logged = [json.loads(line) for line in lines.read_text().splitlines()]
    losses = [line["loss"] for line in logged if "loss" in line]
    between = [b - a for a, b in itertools.pairwise(times[:STEPS])]
    return {"seconds": [round(s, 3) for s in between], "losses": losses, "memory": memory}


def plain(turn: int, storage: Path) -> dict[str, Any]:
    """Trains with the plain PyTorch loop of :mod:`plain`."""
    args, _ = recipe_for_others(storage)
    blocks = WORKERS * args["per_device_train_batch_size"] * args["gradient_accumulation_steps"]
    file = str(Path(__file__).with_name("plain.py"))
    command = [sys.executable, file, args["model_name_or_path"], args["tokenized_path"]]
    command += ["--steps", str(STEPS), "--blocks", str(blocks), "--at-once", str(blocks)]
    command += ["--learning-rate", str(args["learning_rate"])] + ["--bf16"] * bool(args["bf16"])
    command += ["--schedule", args["lr_scheduler_type"]]
    command += ["--schedule-settings", json.dumps(args["lr_scheduler_kwargs"])]
    command += ["--warmup", str(math.ceil(args["warmup_ratio"] * STEPS))]
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch, "log")
        memory = _alone(command, {}, log, lambda: None)
        rows = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    return {
        "seconds": [round(row["seconds"], 3) for row in rows],
        "losses": [round(row["loss"], 4) for row in rows],
        "memory": memory,
    }


def recipe_for_others(storage: Path) -> tuple[dict[str, Any], Path]:
    """Returns our recipe without the settings of Ray and DeepSpeed, and a folder for its files."""
    from cpt_helpers import pipeline
    from cpt_helpers.run import Run

    run = Run.open("bench-others", storage)
    shutil.rmtree(run.folder, ignore_errors=True)
    pipeline.configure(run, "cpt_cpu.yaml", "", SHORT)
    args = recipes.load(run)
    other = {"deepspeed", "resources_per_worker", "eval_dataset", "eval_on_each_dataset"}
    args = {k: v for k, v in args.items() if k not in other and not k.startswith("ray_")}
    args["tokenized_path"] = str(training_only(Path(args["tokenized_path"]), run.folder))
    return args | {"save_strategy": "no", "overwrite_output_dir": True}, run.folder


def training_only(tokenised: Path, folder: Path) -> Path:
    """Copies the tokenised corpus without its held-out sets, since no setup evaluates."""
    from datasets import DatasetDict, load_from_disk

    target = folder / "tokenised"
    DatasetDict({"train": load_from_disk(str(tokenised))["train"]}).save_to_disk(str(target))
    return target


def matrix_products(bf16: bool) -> float:
    """Measures the FLOP/s of matrix products on all cores, in a separate process."""
    code = (
        "import torch, sys; from cpt_helpers.config import flops;"
        "torch.set_num_threads(int(sys.argv[1]));"
        "print(flops.peak_flops(False, sys.argv[2])[1])"
    )
    precision = "bfloat16" if bf16 else "float32"
    done = subprocess.run(
        [sys.executable, "-c", code, str(WORKERS), precision],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.split()[-1])


def summary(turns: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """Medians over the steady steps of all turns, and the ratios of the setups."""
    peak = statistics.median(turn["peak"] for turn in turns)
    flops = turns[0]["default"]["flops_per_token"]
    found: dict[str, Any] = {}
    for kind in NAMES:
        rows = [turn[kind] for turn in turns]
        steady = [tokens / s for row in rows for s in row["seconds"][-STEADY:]]
        rate = statistics.median(steady)
        found[kind] = {
            "tokens_per_second": round(rate, 1),
            "spread": [round(min(steady), 1), round(max(steady), 1)],
            "mfu": round(rate * flops / peak, 3),
            "memory": max(row["memory"] for row in rows),
            "loss": round(statistics.mean(x for row in rows for x in row["losses"]), 4),
        }
    for kind in ("guide", "default"):
        rows = [turn[kind] for turn in turns]
        saves = [row["checkpoint"] for row in rows]
        found[kind] |= {
            "start_up": statistics.median(row["start_up"] for row in rows),
            "checkpoint_bytes": saves[0]["bytes"],
            "checkpoint_seconds": statistics.median(save["seconds"] for save in saves),
            "copy_new": statistics.median(save["copies"]["new"] for save in saves),
            "copy_again": statistics.median(save["copies"]["again"] for save in saves),
        }
    ours = found["default"]["tokens_per_second"]
    return {
        "peak_flops": peak,
        "kinds": found,
        "default / plain": round(ours / found["plain"]["tokens_per_second"], 3),
        "default / guide": round(ours / found["guide"]["tokens_per_second"], 3),
        "default / ddp": round(ours / found["ddp"]["tokens_per_second"], 3),
    }


def table(result: dict[str, Any]) -> str:
    found, said = result["summary"], result["machine"]
    lines = [
        f"{result['tokens']:,} tokens per step; medians of the last {STEADY} steps of each of "
        f"{len(result['turns'])} turn(s); {result['date']}, {said}. The peak is the measured speed "
        f"of matrix products alone, {found['peak_flops'] / 1e9:.0f} GFLOP/s.",
        "",
        "| setup | tokens/s | lowest – highest | share of the peak | mean loss | GiB per process |",
        "|---|---|---|---|---|---|",
    ]
    for kind, name in NAMES.items():
        row = found["kinds"][kind]
        low, high = row["spread"]
        lines.append(
            f"| {name} | {row['tokens_per_second']:.0f} | {low:.0f} – {high:.0f} "
            f"| {row['mfu']:.0%} | {row['loss']:.3f} | {row['memory'] / 2**30:.1f} |"
        )
    ours = found["kinds"]["default"]
    ratios = [f"{found[f'default / {k}']:.2f} × {NAMES[k]}" for k in ("plain", "guide", "ddp")]
    lines += [
        "",
        f"Speed of our recipe: {'; '.join(ratios)}. The first step begins "
        f"{ours['start_up']:.0f} s after the launch call. A checkpoint of "
        f"{ours['checkpoint_bytes'] / 1e9:.2f} GB stops the training for "
        f"{ours['checkpoint_seconds']:.1f} s. A plain copy of it takes {ours['copy_new']:.1f} s "
        f"into new memory, and {ours['copy_again']:.1f} s into memory that another copy has just "
        "released.",
    ]
    return "\n".join(lines) + "\n"


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    kinds = result["summary"]["kinds"]
    figure, axes = plt.subplots(figsize=(8, 2.6), layout="constrained")
    names, rates = list(NAMES.values()), [kinds[kind]["tokens_per_second"] for kind in NAMES]
    off = [
        [rate - kinds[kind]["spread"][0] for kind, rate in zip(NAMES, rates, strict=True)],
        [kinds[kind]["spread"][1] - rate for kind, rate in zip(NAMES, rates, strict=True)],
    ]
    colours = ["tab:blue" if kind == "default" else "lightsteelblue" for kind in NAMES]
    axes.barh(names, rates, xerr=off, color=colours, ecolor="gray", height=0.6)
    for i, rate in enumerate(rates):
        axes.text(2, i, f"{rate:.0f}", va="center", color="white", weight="bold")
    axes.invert_yaxis()
    axes.set(xlabel="tokens/s in steady steps (bar: median, line: lowest to highest)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", default="", help="folder of the runs")
    parser.add_argument("--turns", type=int, default=2, help="number of turns")
    given = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # avoids a warning at each fork
    from cpt_helpers.run import storage_root

    storage = storage_root(given.storage)
    args, _ = recipe_for_others(storage)
    tokens = args | {"ray_num_workers": WORKERS}.global_batch * args["cutoff_len"]
    turns: list[dict[str, Any]] = []
    for turn in range(given.turns):
        kinds = list(NAMES) if turn % 2 == 0 else list(reversed(NAMES))
        row: dict[str, Any] = {"peak": matrix_products(bool(args["bf16"]))}
        for kind in kinds:
            if kind in ("guide", "default"):
                row[kind] = through_ray(kind, turn, storage)
            else:
                row[kind] = {"ddp": ddp, "plain": plain}[kind](turn, storage)
            print(f"turn {turn}: {kind} {json.dumps(row[kind])}", flush=True)
        turns.append(row)
        result = {
            "date": str(date.today()),
            "machine": describe_machine(),
            "tokens": tokens,
            "turns": turns,
            "summary": summary(turns, tokens),
        }
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "speed.json").write_text(json.dumps(result, indent=2) + "\n")
        (RESULTS / "speed.md").write_text(table(result))
        draw(result, RESULTS / "speed.png")
    shutil.rmtree(storage / "bench-others", ignore_errors=True)
    (storage / "bench-guide-ds.json").unlink(missing_ok=True)
    print((RESULTS / "speed.md").read_text())


if __name__ == "__main__":
    main()
