"""Measures the duplicates that cleaning finds, its memory and its time. ``make bench-data``.

Makes corpora of 10 MB, 100 MB and 1 GB from real sentences (docstrings of installed packages, and
news). Adds exact duplicates, near duplicates and broken lines to them. Prepares each corpus in a
separate process. Writes ``benchmarks/results/data.json``.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from hardware import describe_machine

RESULTS = Path(__file__).parent / "results" / "data.json"
PACKAGES = ("ray", "torch", "transformers", "numpy", "scipy", "pandas", "datasets", "mlflow")
EXACT, NEAR, BROKEN = 0.02, 0.02, 0.001  # shares of the documents


def sentences() -> list[str]:
    """The distinct sentences of the news and of the packages' docstrings."""
    from cpt_helpers.setup import assets

    texts = assets.news()
    for package in PACKAGES:
        texts += assets.docstrings(package)
    found = re.split(r"(?<=[.!?])\s+|\n\n+", "\n\n".join(texts))
    return sorted({s.strip() for s in found if 30 < len(s.strip()) < 400})


def make(path: Path, megabytes: float, pool: list[str], seed: int) -> dict[str, Any]:
    """Writes a corpus; returns the counts of added lines and the pairs of near duplicates."""
    from cpt_helpers.data.cleaning import shingles

    rng = random.Random(seed)
    size, planted = 0, {"exact": 0, "near": [], "broken": 0, "documents": 0}
    recent: list[str] = []
    with path.open("w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            text = " ".join(rng.choice(pool) for _ in range(rng.randint(6, 18)))
            lines = [json.dumps({"text": text}, ensure_ascii=False)]
            planted["documents"] += 1
            recent = [*recent[-500:], text]
            draw = rng.random()
            if draw < EXACT:
                lines.append(json.dumps({"text": rng.choice(recent)}, ensure_ascii=False))
                planted["exact"] += 1
            elif draw < EXACT + NEAR:
                like = rng.choice(recent)
                words = like.split(" ")
                for at in rng.sample(range(len(words)), max(len(words) // rng.randint(30, 90), 1)):
                    words[at] = rng.choice(("indeed", "perhaps", "cluster", "value"))
                copy = " ".join(words)
                one, other = shingles(like), shingles(copy)
                if copy != like and len(one & other) / len(one | other) >= 0.8:
                    lines.append(json.dumps({"text": copy}, ensure_ascii=False))
                    planted["near"].append((like, copy))
            elif draw < EXACT + NEAR + BROKEN:
                lines.append('{"text": "cut off in the mid')
                planted["broken"] += 1
            for line in lines:
                size += file.write(line + "\n")
    return planted


def measured(work: Path, corpus: Path) -> dict[str, Any]:
    """Prepares a corpus in a separate process.

    Returns:
        The seconds, and the peak memory of the process and its children together, in MiB.
    """
    import psutil

    code = (
        "import sys\nfrom pathlib import Path\nfrom cpt_helpers.data import corpora\n"
        "if __name__ == '__main__':\n"
        "    corpora.prepare(sys.argv[1], Path(sys.argv[2]), tolerate=0.01, fraction=0.01)\n"
    )
    script = work / "prepare.py"
    script.write_text(code)
    since, peak = time.monotonic(), 0
    process = subprocess.Popen([sys.executable, str(script), str(corpus), str(work / "storage")])
    tree = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            every = [tree, *tree.children(recursive=True)]
            peak = max(peak, sum(p.memory_info().rss for p in every))
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit("the preparation of the corpus failed; see the error above")
    return {"seconds": round(time.monotonic() - since, 1), "peak_mib": round(peak / 2**20)}


def found(work: Path, name: str, planted: dict[str, Any]) -> dict[str, Any]:
    """Counts the added lines that cleaning found, and the clean documents that it dropped."""
    from cpt_helpers.data import corpora

    corpus = corpora.load(name, work / "storage")
    kept: set[int] = set()
    documents = 0
    for half in (corpus.train, corpus.heldout):
        for text in corpora.texts_of(half):
            kept.add(hash(text))
            documents += 1
    near = [(hash(like) in kept, hash(copy) in kept) for like, copy in planted["near"]]
    missing = planted["documents"] - (documents - sum(a and b for a, b in near))
    return {
        "records": corpus.records,
        "exact_planted": planted["exact"],
        "exact_left": documents - len(kept),
        "near_planted": len(near),
        "near_found": round(1 - sum(a and b for a, b in near) / len(near), 4),
        "broken_planted": planted["broken"],
        "broken_found": sum(corpus.rejected.values()),
        "clean_dropped": round(max(missing, 0) / planted["documents"], 5),
    }


def tokenising(work: Path, name: str, model: str, repeats: int = 3) -> dict[str, Any]:
    """Tokens per second of packing onto the storage, and of `tokenizers` alone on the same text."""
    from cpt_helpers.data import corpora, packing
    from cpt_helpers.setup import assets

    corpus = corpora.load(name, work / "storage")
    tokenizer = assets.tokenizer_of(model)
    texts = list(corpora.texts_of(corpus.train))[:40_000]
    alone, ours = [], []
    for number in range(repeats):  # in turns, so that drift affects both
        since = time.monotonic()
        encode = tokenizer._tokenizer.encode_batch_fast
        tokens = sum(len(e.ids) for e in encode(texts, add_special_tokens=False))
        alone.append(tokens / (time.monotonic() - since))
        packer = packing.Packer(tokenizer, 256)
        since = time.monotonic()
        packing.write_arrow(work / f"{number}.arrow", packer.blocks(texts))
        ours.append((packer.tokens - len(texts)) / (time.monotonic() - since))
    rate, reference = statistics.median(ours), statistics.median(alone)
    return {
        "tokens_per_second": round(rate),
        "tokenizers_alone": round(reference),
        "ratio": round(rate / reference, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="10,100,1000", help="sizes of the corpora in megabytes")
    parser.add_argument("--storage", default="", help="folder of the model")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of the results")
    given = parser.parse_args()
    from cpt_helpers.run import storage_root
    from cpt_helpers.setup import assets

    pool, rows, speed = sentences(), [], {}
    model = str(assets.embedded_model("SmolLM2-135M-Instruct", storage_root(given.storage)))
    for megabytes in map(float, given.sizes.split(",")):
        with tempfile.TemporaryDirectory(dir=storage_root(given.storage)) as folder:
            work = Path(folder)
            name = f"made_{megabytes:g}mb"
            planted = make(work / f"{name}.jsonl", megabytes, pool, seed=int(megabytes))
            row = {"megabytes": megabytes, **measured(work, work / f"{name}.jsonl")}
            row |= found(work, name, planted)
            rows.append(row)
            print(json.dumps(row), flush=True)
            if megabytes == 100 or not speed:
                speed = tokenising(work, name, model)
                print(json.dumps(speed), flush=True)
            shutil.rmtree(work / "storage")
    result = {
        "date": str(date.today()),
        "machine": describe_machine(),
        "sizes": rows,
        "tokenising": speed,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
