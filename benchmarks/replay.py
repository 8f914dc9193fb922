"""The effect of replaying general text on domain and general perplexity. ``make bench-replay``.

Trains the default model on the default corpus with 0, 5 and 25 % of news, with the same number of
tokens each time. Measures the perplexity in plain transformers, on held-out domain text, held-out
news and film reviews. No run trains on reviews. Writes ``benchmarks/results/replay.json`` and
``replay.md``.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from hardware import describe_machine

from cpt_helpers import recipes
from cpt_helpers.export import evaluation

RESULTS = Path(__file__).parent / "results"
SHARES = (0.0, 0.05, 0.25)


def reviews() -> list[str]:
    """Film reviews from gensim's test data, as general text other than news."""
    from cpt_helpers.setup import assets

    members = {
        "pang_lee_polarity.cor": "662c1b7c3bd0612eaaaf3f0c694cbd3897e30c0d87d2940b46c9fd0d15ed70c1",
        "alldata-id-10.txt": "a93bf009f1eaf82ad84cea42ef67847f8cc037db9f6f1931b738e415b3206bb3",
    }
    texts = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, digest in members.items():
            asset = assets.WheelFile(
                "gensim==4.3.3", f"gensim/test/test_data/{name}", digest, "see gensim's repository"
            )
            for line in _text(assets.fetch_file(asset, Path(scratch))).splitlines():
                texts.append(re.sub(r"^(__label__\w+|_\*\d+)\s+", "", line).strip())
    return [text for text in texts if text]


def _text(path: Path) -> str:
    return path.read_bytes().decode("cp1252", "replace")  # these files are not UTF-8


def measure(folder: Path | str, sets: dict[str, list[str]], block: int) -> dict[str, float]:
    """The perplexity of a model on each set of texts, in blocks of ``block`` tokens."""
    from cpt_helpers.setup import models

    model, tokenizer = models.load(folder, dtype="float32")
    return {n: round(evaluation.perplexity(model, tokenizer, t, block), 3) for n, t in sets.items()}


def trained(share: float, storage: Path, steps: int | None) -> tuple[Path, dict[str, Any]]:
    """Trains with one share of news, or reuses the existing run; returns its model and costs."""
    from cpt_helpers.config import resolution
    from cpt_helpers.data import corpora, mixing
    from cpt_helpers.run import Run
    from cpt_helpers.setup import assets
    from cpt_helpers.train import launch

    run = Run.open(f"replay-{share:.0%}".replace("%", ""), storage)
    overrides: dict[str, Any] = {"eval_strategy": "no", "eval_on_start": False}
    overrides |= {"save_strategy": "no", "report_to": "none"}
    if steps:
        overrides["max_steps"] = steps
    recipe = recipes.read_recipe("cpt_cpu.yaml")[1] | overrides
    model = assets.fetch_model(recipes.model_of("cpt_cpu.yaml", overrides, storage), storage)
    weights = mixing.weights("ray_docs", {"news": share} if share else {})
    sources = [(corpora.prepare(name, storage), weight) for name, weight in weights.items()]
    measured = [corpora.load("ray_docs", storage), corpora.prepare("news", storage)]
    mix = mixing.for_recipe(recipe, sources, measured, assets.tokenizer_of(model))
    names = ",".join(corpus.name for corpus, _ in sources)
    resolution.write(run, resolution.resolve(run, "cpt_cpu.yaml", overrides, names, str(mix.path)))
    train = launch.train(run, recipes.load(run))
    return run.output, {"tokens": train["tokens"], "seconds": train["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", default="", help="folder of the runs")
    parser.add_argument("--steps", type=int, help="number of steps (default: the recipe's)")
    given = parser.parse_args()
    from cpt_helpers.data import corpora
    from cpt_helpers.run import storage_root

    storage = storage_root(given.storage)
    rows = []
    for share in SHARES:
        folder, facts = trained(share, storage, given.steps)
        sets = {
            name: list(corpora.texts_of(corpora.load(name, storage).heldout))
            for name in ("ray_docs", "news")
        } | {"reviews": reviews()}
        block = recipes.read_recipe("cpt_cpu.yaml")[1]["cutoff_len"]
        if not rows:
            model = recipes.model_of("cpt_cpu.yaml", {}, storage)
            rows.append({"replay": "before", "perplexity": measure(model, sets, block)})
        rows.append({"replay": share, **facts, "perplexity": measure(folder, sets, block)})
        print(json.dumps(rows[-1]), flush=True)
        result = {"date": str(date.today()), "machine": describe_machine(), "rows": rows}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "replay.json").write_text(json.dumps(result, indent=2) + "\n")
        (RESULTS / "replay.md").write_text(table(result))


def table(result: dict[str, Any]) -> str:
    first = result["rows"][0]["perplexity"]
    lines = [
        f"Perplexity by the share of replayed news; {result['date']}, {result['machine']}.",
        "",
        "| share of news | tokens | " + " | ".join(first) + " |",
        "|---|---|" + "---|" * len(first),
    ]
    for row in result["rows"]:
        name = row["replay"] if isinstance(row["replay"], str) else f"{row['replay']:.0%}"
        cells = [
            f"{value:.2f}"
            + ("" if row["replay"] == "before" else f" ({value / first[key] - 1:+.1%})")
            for key, value in row["perplexity"].items()
        ]
        lines.append(f"| {name} | {row.get('tokens', 0):,} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
