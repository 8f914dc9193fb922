"""Size, perplexity and speed of quantized models. ``make bench-forms``.

Quantizes an exported model to W8A16 and W4A16. Measures the size, the perplexity on held-out domain
text and the speed of greedy generation in plain transformers on this machine. Writes
``benchmarks/results/forms.json`` and ``forms.md``.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from hardware import describe_machine

from cpt_helpers.export import evaluation

RESULTS = Path(__file__).parent / "results"
PROMPT = "ray.train.torch.TorchTrainer\n\nA Trainer for data parallel PyTorch training."


def measure(folder: Path, storage: Path, corpus: str, block: int, new: int) -> dict[str, Any]:
    """Size, perplexity, speed and peak memory of one format, measured in a separate process."""
    import torch

    from cpt_helpers.data import corpora
    from cpt_helpers.export import quantization
    from cpt_helpers.setup import models

    model, tokenizer = models.load(folder)
    texts = corpora.texts_of(corpora.load(corpus, storage).heldout)
    perplexity = evaluation.perplexity(model, tokenizer, texts, block)
    ids = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    ids.pop("token_type_ids", None)
    speeds = []
    for _ in range(3):  # the first run warms up; the fastest run counts
        start = time.monotonic()
        with torch.inference_mode():
            model.generate(**ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        speeds.append(new / (time.monotonic() - start))
    return {
        "bytes": quantization.size_of(folder),
        "weights": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "perplexity": round(perplexity, 3),
        "tokens_per_second": round(max(speeds), 1),
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="exported folder with full weights")
    parser.add_argument("--storage", default="", help="folder of the corpora")
    parser.add_argument("--corpus", default="ray_docs", help="name of the corpus")
    parser.add_argument("--block", type=int, default=256, help="tokens per block")
    parser.add_argument("--samples", type=int, default=128, help="calibration blocks of W4A16")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    from cpt_helpers.run import storage_root

    storage = storage_root(given.storage)
    if given.measure:
        print(json.dumps(measure(given.measure, storage, given.corpus, given.block, given.new)))
        return
    from cpt_helpers.data import corpora
    from cpt_helpers.export import quantization

    corpus, rows = corpora.load(given.corpus, storage), []
    with tempfile.TemporaryDirectory() as scratch:
        for form in ("full", *quantization.SCHEMES):
            folder, start = given.model, time.monotonic()
            if form != "full":
                folder = Path(scratch) / form
                texts = corpora.texts_of(corpus.train) if form == "W4A16" else None
                quantization.quantize(
                    given.model, folder, form, texts, samples=given.samples, block_size=given.block
                )
            seconds = round(time.monotonic() - start, 1)
            again = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--measure", folder]
            done = subprocess.run(again, check=True, capture_output=True, text=True)
            rows.append(
                {"form": form, "seconds": seconds} | json.loads(done.stdout.splitlines()[-1])
            )
            print(json.dumps(rows[-1]), flush=True)
    result = {"date": str(date.today()), "machine": describe_machine(), "rows": rows}
    result |= {"corpus": given.corpus, "samples": given.samples, "block": given.block}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "forms.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / "forms.md").write_text(table(result))


def table(result: dict[str, Any]) -> str:
    first = result["rows"][0]
    lines = [
        f"One model in three formats; {result['date']}, {result['machine']}. Perplexity on "
        f"held-out {result['corpus']}. The speed is that of plain transformers, which unpacks "
        "the weights before each product. A gain in speed needs a GPU and vLLM's kernels.",
        "",
        "| format | weights | perplexity | tokens/s | peak memory, with loading | time to make |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        change = row["perplexity"] / first["perplexity"] - 1
        full = row is first
        lines.append(
            f"| {row['form']} | {row['weights'] / 1e6:.0f} MB | {row['perplexity']:.2f}"
            + ("" if full else f" ({change:+.1%})")
            + f" | {row['tokens_per_second']:.1f} | {row['peak_memory'] / 2**30:.2f} GiB"
            + f" | {'' if full else str(row['seconds']) + ' s'} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
