"""Evaluation of a run: the base model and the trained model compared, and an HTML report.

:func:`evaluate` measures held-out documents, a cloze test and continuations of prompts.
:func:`write` makes ``<run>/report.html`` from it, one file without external parts. Its layout is
in ``report.html.jinja``.
"""

from __future__ import annotations

import base64
import io
import random
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import plots, recipes
from ..data import corpora
from ..errors import ConfigError, DataError
from ..recipes import HELD_OUT, Recipe
from ..redact import has_token
from ..run import Run
from ..setup import models
from . import cloze, evaluation
from .evaluation import Comparison, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


class Continuations(list[tuple[str, str, str]]):
    """Prompts, each with the text that the base model and the trained model add to it."""

    def __repr__(self) -> str:
        lines = [(prompt, *(" ".join(text.split()) for text in texts)) for prompt, *texts in self]
        return "\n".join(f"{p}\n  base:    {b}\n  trained: {t}\n" for p, b, t in lines)

    def _repr_html_(self) -> str:
        pre = '<pre style="white-space: pre-wrap; text-align: left">'
        cells = [[f"<td>{pre}{escape(text.strip())}</pre></td>" for text in row] for row in self]
        body = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
        heads = "".join(f"<th>{name}</th>" for name in ("prompt", "base model", "trained model"))
        return f"<table><tr>{heads}</tr>{body}</table>"


@dataclass(frozen=True)
class Evaluation:
    """The measurements of the base model and the trained model.

    Attributes:
        base: The base model's name.
        comparisons: Domain text, general text, then any other corpus.
        outcome: The cloze test; ``None`` where there is none.
        no_cloze: The reason why there is no cloze test.
        continuations: Continuations of prompts by both models.
        seconds: The duration of the measurements.
    """

    base: str
    comparisons: tuple[Comparison, ...]
    outcome: cloze.Outcome | None
    no_cloze: str
    continuations: Continuations
    seconds: float

    @property
    def results(self) -> list[Comparison | cloze.Outcome]:
        """The comparisons and the cloze test."""
        return [*self.comparisons, *([self.outcome] if self.outcome else [])]

    @property
    def sentences(self) -> list[str]:
        """One sentence per result."""
        return [result.sentence for result in self.results]

    @property
    def table(self) -> DataFrame:
        """One row per result: both models, the change with its 95 % interval, the conclusion."""
        import pandas as pd

        rows = []
        for result in self.results:
            if isinstance(result, Comparison):
                name = f"perplexity, {result.role or 'other'}: {result.corpus}"
                before, after, unit = *map("{:.2f}".format, result.perplexity), " %"
            else:
                name = f"cloze test, {len(result.cloze.items)} items"
                before, after, unit = *map("{:.0%}".format, result.accuracy), " points"
            rows.append((name, before, after, result.change.text(unit), result.conclusion))
        heads = ["measurement", "base model", "trained model", "change", "conclusion"]
        return pd.DataFrame(rows, columns=heads)

    def __repr__(self) -> str:
        return "\n".join(self.sentences)

    def _repr_html_(self) -> str:
        return self.table.to_html(index=False)

    def as_dict(self) -> dict[str, Any]:
        """The values for a run's results."""
        return {
            "corpora": {c.role or c.corpus: c.as_dict() for c in self.comparisons},
            "cloze": self.outcome.as_dict() if self.outcome else self.no_cloze,
            "sentences": self.sentences,
            "seconds": self.seconds,
        }


def evaluate(
    run: Run,
    trained: Path | None = None,
    *,
    others: Sequence[str] = (),
    documents: int = 200,
    items: int = 60,
    prompts: Sequence[str] = (),
) -> Evaluation:
    """Measures the run's base model and its trained model on the same held-out texts.

    Args:
        run: Its recipe names the corpora and the base model.
        trained: The trained model's folder; default the run's export, else its output.
        others: Names of further corpora on the storage to measure.
        documents: Maximum number of documents of each corpus.
        items: Maximum number of items of the cloze test.
        prompts: Texts to continue, before the beginnings of two held-out documents.
    """
    started = time.monotonic()
    recipe = recipes.load(run)
    roles = {name.removesuffix(HELD_OUT): role for role, name in recipe.held_out.items()}
    roles |= {name: "" for name in others if name not in roles}
    texts = _held_out_texts(run, roles, documents)
    domain = next((name for name, role in roles.items() if role == "domain"), next(iter(roles)))
    test, no_cloze = None, ""
    try:
        test = cloze.make(texts[domain], most=items)
    except DataError as error:
        no_cloze = error.what
    asked = [*prompts, *map(beginning, evaluation.sample(texts[domain], 2))]
    base = recipe["model_name_or_path"]
    trained = trained or (run.export if run.export.is_dir() else run.output)
    results = []
    for model in (base, trained):
        models.release()  # the model of the caller, or the previous one
        results.append(_measure(model, texts, test, asked, recipe.block_size))
    models.release()
    (losses, answers, added), (losses_after, answers_after, added_after) = results
    return Evaluation(
        Path(base).name if Path(base).is_absolute() else str(base),
        tuple(
            evaluation.compare(name, losses[name], losses_after[name], role=role)
            for name, role in roles.items()
        ),
        cloze.compare(test, answers, answers_after) if test else None,
        no_cloze,
        Continuations(zip(asked, added, added_after, strict=True)),
        round(time.monotonic() - started, 1),
    )


def _held_out_texts(run: Run, names: Iterable[str], documents: int) -> dict[str, list[str]]:
    """A sample of the held-out documents of each corpus."""
    halves = {name: corpora.load(name, run.storage).heldout for name in names}
    if not halves:
        raise ConfigError(
            "the recipe names no held-out set to measure",
            where=run.train_yaml,
            expected="eval_dataset, as notebook 03_config writes it",
            do="name corpora in `others`",
        )
    return {n: evaluation.sample(corpora.texts_of(half), documents) for n, half in halves.items()}


def beginning(text: str, words: int = 12) -> str:
    """The first words of a document, with their white space."""
    match = re.match(rf"\s*(?:\S+\s+){{0,{words - 1}}}\S+", text)
    return match[0] if match else text


def _measure(
    folder: str | Path,
    texts: Mapping[str, list[str]],
    test: cloze.Cloze | None,
    prompts: Sequence[str],
    block_size: int,
) -> tuple[dict[str, DataFrame], tuple[int, ...], list[str]]:
    """Losses, answers and continuations of one model, which is released on return."""
    import torch

    # The same precision for both models; CPUs without bf16 instructions are eight times slower.
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    model, tokenizer = models.load(folder, dtype=dtype)
    losses = {
        name: evaluation.document_losses(model, tokenizer, documents, block_size)
        for name, documents in texts.items()
    }
    answers = cloze.answer(model, tokenizer, test) if test else ()
    return losses, answers, [models.continuation(model, tokenizer, prompt) for prompt in prompts]


def write(run: Run, measured: Evaluation) -> Path:
    """Writes ``<run>/report.html`` and returns its path."""
    return render(run.folder / "report.html", **_contents(run, measured))


def render(path: Path, **values: Any) -> Path:
    """Fills the template ``<name of the file>.jinja`` and writes the file in one piece."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=jinja2.select_autoescape(["html.jinja"]),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "percent": percent,
        "signed": lambda value: f"{value:+.3f}".replace("-", "−"),
        "date": lambda seconds: time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds)),
    }
    part = path.with_name(f".{path.name}")
    part.write_text(environment.get_template(f"{path.name}.jinja").render(**values) + "\n", "utf-8")
    return part.replace(path)


def _contents(run: Run, measured: Evaluation) -> dict[str, Any]:
    """The text and numbers of the page; the template escapes them."""
    import matplotlib.pyplot as plt

    recipe, results, events = recipes.load(run), run.results(), run.events()
    with plt.ioff(), plt.rc_context({"font.size": 11, "axes.edgecolor": "#777"}):
        pictures = {"changes": _picture(_changes(measured))}
        if any(event["event"] == "step" for event in events):
            pictures["training"] = _picture(plots.plot(run, recipe.held_out))
    spent = plots.time_spent(run) if (run.logs / "launched.json").is_file() and events else {}
    total = sum(spent.values())
    return {
        "run": run.name,
        "measured": measured,
        "resamples": evaluation.RESAMPLES,
        "facts": {
            "base model": measured.base,
            "corpus": recipe.get("dataset", ""),
            "recipe": results.get("config", {}).get("recipe", "not recorded"),
        },
        "trained": events[-1]["time"] if events else time.time(),
        "pictures": pictures,
        "spent": [(part, s, s / total) for part, s in spent.items()] if total else [],
        "costs": plots.costs(run),
        "restarts": [event["step"] for event in events if event["event"] == "start"][1:],
        "divergences": [event for event in events if event["event"] == "diverged"],
        "items": _items(measured.outcome) if measured.outcome else [],
        "versions": results.get("versions", {}),
        "settings": dict(_settings(run, recipe)),
    }


def _items(outcome: cloze.Outcome) -> list[dict[str, Any]]:
    """The items with both answers, in random order; those with a changed result come first."""
    answers = zip(outcome.cloze.items, outcome.before, outcome.after, strict=True)
    items: list[dict[str, Any]] = [
        {
            "item": item,
            "base": base,
            "trained": trained,
            "base_right": base == item.right,
            "trained_right": trained == item.right,
        }
        for item, base, trained in answers
    ]
    random.Random(0).shuffle(items)
    return sorted(items, key=lambda one: one["base_right"] == one["trained_right"])


def _settings(run: Run, recipe: Recipe) -> Iterator[tuple[str, str]]:
    """The resolved recipe without this machine's folders and without tokens."""
    for key, value in recipe.items():
        if has_token({key: value}) or key.endswith(("token", "password", "secret")):
            yield key, "(not shown)"
            continue
        text = str(value).replace(f"{run.folder}/", "").replace(f"{run.storage}/", "")
        yield key, Path(text).name if text.startswith("/") else text


def _changes(measured: Evaluation) -> Figure:
    """The change in bits per byte of each document, one line of dots per corpus."""
    import matplotlib.pyplot as plt

    rows = len(measured.comparisons)
    figure, axes = plt.subplots(figsize=(10, 1.1 + 0.65 * rows), layout="constrained")
    draw = random.Random(0)
    for row, comparison in enumerate(measured.comparisons):
        changes = comparison.documents["change"]
        heights = [row + draw.uniform(-0.22, 0.22) for _ in changes]
        colours = ["#2a7f62" if value < 0 else "#b5482f" for value in changes]
        axes.scatter(changes, heights, c=colours, alpha=0.6, s=28, linewidths=0)
    axes.axvline(0, color="#555", linewidth=1)
    axes.set_yticks(range(rows), [c.corpus for c in measured.comparisons])
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_xlabel("change in bits per byte of each document (below zero is better)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


def _picture(figure: Figure) -> str:
    """A figure as the source of an ``img``."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    plt.close(figure)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
