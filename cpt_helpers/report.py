"""Did it help? One HTML file that says so, with everything it was measured by.

The file needs nothing beside it: styles and figures are inside, no address is loaded.
"""

from __future__ import annotations

import base64
import io
import random
import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import cloze, config, curves, data, evaluation, export
from .checks import has_token
from .cloze import Outcome
from .errors import ConfigError, DataError
from .evaluation import Comparison, percent
from .registry import HELD_OUT
from .run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = "report.html"
_SHOWN_ITEMS = 4


@dataclass(frozen=True)
class Continued:
    """A prompt, and what the two models add to it."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class Measured:
    """What two models were measured by.

    Attributes:
        base: The base model's name.
        comparisons: Domain, general text, and any other corpus, in this order.
        outcome: The cloze test; ``None`` where none can be made, and ``no_cloze`` says why.
        no_cloze: Empty where there is one.
        continued: Continuations side by side.
        seconds: How long measuring took.
    """

    base: str
    comparisons: tuple[Comparison, ...] = field(repr=False)
    outcome: Outcome | None = field(repr=False)
    no_cloze: str
    continued: tuple[Continued, ...] = field(repr=False)
    seconds: float

    @property
    def sentences(self) -> list[str]:
        """Whether it helped, whether general ability was kept, what it knows."""
        said = [comparison.sentence for comparison in self.comparisons]
        return said + ([self.outcome.sentence] if self.outcome else [])

    def as_dict(self) -> dict[str, Any]:
        """What to keep of it in a run's results."""
        return {
            "corpora": {c.role or c.corpus: c.as_dict() for c in self.comparisons},
            "cloze": self.outcome.as_dict() if self.outcome else self.no_cloze,
            "sentences": self.sentences,
            "seconds": self.seconds,
        }


def measure(
    run: Run,
    *,
    base: str | Path | None = None,
    trained: Path | None = None,
    others: Sequence[str] = (),
    documents: int = 200,
    items: int = 60,
    prompts: int = 2,
    tolerance: float = evaluation.TOLERANCE,
    seed: int = 0,
) -> Measured:
    """Measures the base model and the trained one, one after the other, by the same texts.

    Args:
        run: Whose recipe names the corpora and the base model.
        base: The base model; default the recipe's.
        trained: The trained one's folder; default the run's export, else its output.
        others: Names of further corpora on the storage, measured beside domain and general text.
        documents: Of each corpus at most, drawn by the seed; the domain's make the cloze test.
        items: Of the cloze test at most.
        prompts: Held-out documents whose beginnings are continued.
        tolerance: Relative rise in general perplexity that is not called a loss.
        seed: Of every draw.

    Raises:
        ConfigError: The recipe names no held-out set.
        DataError: A corpus is not on the storage.
    """
    started = time.monotonic()
    args = config.load(run)
    roles = {name.removesuffix(HELD_OUT): role for role, name in config.held_out_of(args).items()}
    roles |= {name: "" for name in others if name not in roles}
    if not roles:
        raise ConfigError(
            "the recipe names no held-out set, and there is nothing to measure by",
            where=run.train_yaml,
            expected="eval_dataset, as notebook 03_config writes it",
            do="give corpora by name in `others`",
        )
    texts = {}
    for name in roles:
        half = data.load(name, run.storage).heldout
        texts[name] = evaluation.sample(data.texts_of(half), documents, seed=seed)
    domain = next((name for name, role in roles.items() if role == "domain"), next(iter(roles)))
    test, no_cloze = None, ""
    try:
        test = cloze.make(texts[domain], most=items, seed=seed)
    except DataError as error:
        no_cloze = error.what
    begun = [beginning(text) for text in evaluation.sample(texts[domain], prompts, seed=seed)]
    base = base or args["model_name_or_path"]
    trained = trained or (run.export if run.export.is_dir() else run.output)
    seen = [_ask(model, texts, test, begun, args["cutoff_len"]) for model in (base, trained)]
    (losses, picks, said), (losses_after, picks_after, said_after) = seen
    compared = [
        evaluation.compare(
            losses[name], losses_after[name], role=role, tolerance=tolerance, seed=seed
        )
        for name, role in roles.items()
    ]
    return Measured(
        base=Path(base).name if Path(base).is_absolute() else str(base),
        comparisons=tuple(compared),
        outcome=cloze.compare(test, picks, picks_after, seed=seed) if test else None,
        no_cloze=no_cloze,
        continued=tuple(map(Continued, begun, said, said_after)),
        seconds=round(time.monotonic() - started, 1),
    )


def write(run: Run, measured: Measured) -> Path:
    """Writes ``<run>/report.html``, in one piece.

    Args:
        run: Whose.
        measured: From :func:`measure`.

    Returns:
        The file.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"percent": percent, "signed": _signed}
    page = environment.from_string(_PAGE).render(**_contents(run, measured))
    path = run.folder / FILE
    part = path.with_name(f".{FILE}")
    part.write_text(page, "utf-8")
    part.replace(path)
    return path


def costs(run: Run) -> dict[str, Any]:
    """What a training came to, from its events: what they do not tell is left out."""
    events = run.events()
    steps = [event for event in events if event["event"] == "step"]
    starts = [event for event in events if event["event"] == "start"]
    if not steps or not starts:
        return {}
    tokens = starts[-1]["tokens_per_step"]
    memory = [event["memory"] for event in steps if event.get("memory")]
    memory += events[-1].get("memory") or []
    mfu = [event["mfu"] for event in steps if event.get("mfu")]
    found = {
        "steps": steps[-1]["step"],
        "tokens": steps[-1]["step"] * tokens,
        "seconds": round(events[-1]["time"] - events[0]["time"], 1),
        "tokens_per_second": round(tokens / statistics.median(s["seconds"] for s in steps), 1),
        "workers": starts[-1]["world_size"],
        "trained_parameters": starts[-1]["parameters"]["trained"],
    }
    if memory:
        found["peak_memory"] = max(memory)
    if mfu:
        found["mfu"] = round(statistics.median(mfu), 4)
    return found


def beginning(text: str, words: int = 12) -> str:
    """The first words of a document, as they stand there."""
    found = re.match(rf"\s*(?:\S+\s+){{0,{words - 1}}}\S+", text)
    return found[0] if found else text


def _ask(
    folder: str | Path,
    texts: Mapping[str, list[str]],
    test: cloze.Cloze | None,
    prompts: Sequence[str],
    block_size: int,
) -> tuple[dict[str, evaluation.Losses], tuple[int, ...], list[str]]:
    """Everything one model is asked. It is gone when the next one is loaded."""
    import torch

    # Both in one precision; CPUs without bf16 instructions are eight times slower in it.
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    model, tokenizer = export.load(folder, dtype=dtype)
    losses = evaluation.measure(model, tokenizer, texts, block_size)
    picks = cloze.answer(model, tokenizer, test) if test else ()
    return losses, picks, [export.continuation(model, tokenizer, prompt) for prompt in prompts]


def _contents(run: Run, measured: Measured) -> dict[str, Any]:
    """All that stands in the page, as text and numbers; the template escapes it."""
    args, results = config.load(run), run.results()
    events, roles = run.events(), config.held_out_of(args)
    when = events[-1]["time"] if events else time.time()
    with _plain_figures():
        pictures = {"changes": _picture(_changes(measured))}
        if any(event["event"] == "step" for event in events):
            pictures["training"] = _picture(curves.plot(run, roles))
    spent = curves.time_spent(run) if (run.logs / "launched.json").is_file() and events else {}
    return {
        "run": run.name,
        "measured": measured,
        "resamples": evaluation.RESAMPLES,
        "facts": [
            ("base model", measured.base),
            ("corpus", ", ".join(config.names_of(args.get("dataset")))),
            ("recipe", results.get("config", {}).get("recipe", "its own")),
            ("trained", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(when))),
        ],
        "pictures": pictures,
        "spent": [(what, seconds, seconds / sum(spent.values())) for what, seconds in spent.items()]
        if sum(spent.values())
        else [],
        "costs": list(_costs_in_words(costs(run))),
        "cloze": _cloze_contents(measured.outcome),
        "versions": results.get("versions", {}),
        "settings": list(_settings(run, args)),
    }


def _cloze_contents(outcome: Outcome | None) -> dict[str, Any]:
    if outcome is None:
        return {}
    rows = [
        (when, outcome.accuracy(picks), *cloze.wilson(outcome.cloze, picks))
        for when, picks in (("base", outcome.before), ("trained", outcome.after))
    ]
    items = list(zip(outcome.cloze.items, outcome.before, outcome.after, strict=True))
    changed = [one for one in items if (one[1] == one[0].right) != (one[2] == one[0].right)]
    same = [one for one in items if one not in changed]
    draw = random.Random(0)  # those whose answer changed come first
    shown = draw.sample(changed, len(changed)) + draw.sample(same, len(same))
    examples = [
        {
            "title": item.title,
            "prompt": item.prompt[-240:],
            "cut": len(item.prompt) > 240,
            "after": item.after,
            "options": item.options,
            "right": item.right,
            "base": base,
            "trained": trained,
        }
        for item, base, trained in shown[:_SHOWN_ITEMS]
    ]
    both = [(base == i.right, trained == i.right) for i, base, trained in items]
    return {
        "rows": rows,
        "examples": examples,
        "learnt": both.count((False, True)),
        "forgot": both.count((True, False)),
    }


def _costs_in_words(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if not found:
        return
    yield "tokens trained on", f"{found['tokens']:,} in {found['steps']:,} steps"
    yield "parameters trained", f"{found['trained_parameters']:,}"
    yield "workers", str(found["workers"])
    yield "from the first worker's start to the end", f"{found['seconds']:,.0f} s"
    yield "speed, median of the steps", f"{found['tokens_per_second']:,.1f} tokens/s"
    if "mfu" in found:
        yield "share of the device's peak (MFU), median", f"{found['mfu']:.0%}"
    if "peak_memory" in found:
        yield "peak memory of a worker", f"{found['peak_memory'] / 2**30:.2f} GiB"


def _settings(run: Run, args: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The resolved recipe without this machine's folders, and without anything like a token."""
    for key, value in args.items():
        if has_token({key: value}) or key.endswith(("token", "password", "secret")):
            yield key, "(not shown)"
            continue
        said = str(value).replace(f"{run.folder}/", "").replace(f"{run.storage}/", "")
        yield key, Path(said).name if said.startswith("/") else said


def _changes(measured: Measured) -> Figure:
    """A dot a document: how its bits per byte changed, one line a corpus."""
    import matplotlib.pyplot as plt

    rows = len(measured.comparisons)
    figure, axes = plt.subplots(figsize=(10, 1.1 + 0.65 * rows), layout="constrained")
    draw = random.Random(0)
    for row, comparison in enumerate(measured.comparisons):
        moved = [
            after.bits_per_byte - before.bits_per_byte
            for before, after in zip(
                comparison.before.documents, comparison.after.documents, strict=True
            )
        ]
        heights = [row + draw.uniform(-0.22, 0.22) for _ in moved]
        colours = ["#2a7f62" if value < 0 else "#b5482f" for value in moved]
        axes.scatter(moved, heights, c=colours, alpha=0.6, s=28, linewidths=0)
    axes.axvline(0, color="#555", linewidth=1)
    axes.set_yticks(range(rows), [c.corpus for c in measured.comparisons])
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_xlabel("change in bits per byte; left of the line is better, a dot is a document")
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


@contextmanager
def _plain_figures() -> Iterator[None]:
    """Figures without a display, and without a notebook showing them once more."""
    import matplotlib.pyplot as plt

    with plt.ioff(), plt.rc_context({"font.size": 11, "axes.edgecolor": "#777"}):
        yield


def _signed(value: float, digits: int = 3) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Did it help? {{ run }}</title>
<style>
:root { --ink: #1d2327; --soft: #5c666d; --line: #dde2e5; --good: #2a7f62; --bad: #b5482f; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 60rem; background: #fff;
  color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .6rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .5rem; padding-top: .9rem;
  border-top: 1px solid var(--line); }
p { margin: .5rem 0; }
.note { color: var(--soft); font-size: .9rem; }
dl.facts { display: flex; flex-wrap: wrap; gap: .3rem 2.2rem; margin: 0 0 1.4rem; }
dl.facts dt { color: var(--soft); font-size: .8rem; }
dl.facts dd { margin: 0; font-weight: 600; }
.said { margin: .5rem 0; padding: .6rem 1rem; border-left: 5px solid #98a2a8; background: #f5f7f8; }
.said.better, .said.kept { border-color: var(--good); background: #eff7f3; }
.said.lost, .said.worse { border-color: var(--bad); background: #fbf1ee; }
table { border-collapse: collapse; width: 100%; margin: .7rem 0; font-size: .93rem; }
th, td { padding: .35rem .7rem .35rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); font-size: .82rem; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.title, td.text { overflow-wrap: anywhere; }
td.text { white-space: pre-wrap; width: 50%; }
img { width: 100%; height: auto; display: block; margin: .6rem 0; }
.bar { display: block; height: .75rem; background: #7fa8bd; min-width: 1px; }
td.wide { width: 55%; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .4rem 0; padding: .6rem .8rem;
  background: #f5f7f8; font: .85rem/1.45 ui-monospace, Consolas, monospace; }
.gap { background: #fff; border: 1px solid #98a2a8; padding: 0 .6rem; color: var(--soft); }
.right { color: var(--good); } .wrong { color: var(--bad); }
code { font: .88em ui-monospace, Consolas, monospace; overflow-wrap: anywhere; }
.small { font-size: .82rem; columns: 2; column-gap: 2.5rem; }
.small div { break-inside: avoid; border-bottom: 1px solid var(--line); padding: .15rem 0;
  overflow-wrap: anywhere; }
.small b { font-weight: 500; color: var(--soft); }
@media (max-width: 40rem) { .small { columns: 1; } }
@media print {
  body { padding: 0; max-width: none; font-size: 10.5pt; }
  h2 { break-after: avoid; } tr, img, .said, .item { break-inside: avoid; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
</style>
</head>
<body>
<h1>Did it help? {{ run }}</h1>
<dl class="facts">
{% for name, value in facts %}
<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
</dl>
{% for c in measured.comparisons %}
<p class="said {{ c.verdict }}">{{ c.sentence }}</p>
{% endfor %}
{% if measured.outcome %}
<p class="said {{ measured.outcome.verdict }}">{{ measured.outcome.sentence }}</p>
{% endif %}

<h2>Before and after</h2>
<table>
<tr><th>held-out text</th><th class="n">documents</th><th class="n">tokens</th>
<th class="n">perplexity</th><th class="n">change</th><th class="n">95 % interval</th>
<th class="n">bits per byte</th></tr>
{% for c in measured.comparisons %}
<tr><td>{{ c.role or "other" }}: {{ c.corpus }}</td>
<td class="n">{{ c.after.documents|length }}</td>
<td class="n">{{ "{:,}".format(c.after.tokens) }}</td>
<td class="n">{{ "%.2f"|format(c.before.perplexity) }} →
{{ "%.2f"|format(c.after.perplexity) }}</td>
<td class="n">{{ c.change|percent }}</td>
<td class="n">{{ c.low|percent(sign="") }} to {{ c.high|percent }}</td>
<td class="n">{{ "%.3f"|format(c.before.bits_per_byte) }} →
{{ "%.3f"|format(c.after.bits_per_byte) }}</td></tr>
{% endfor %}
</table>
<p class="note">None of these documents was trained on. Each is measured on its own, so that the
perplexities are not those of the training curve, which runs over documents joined into blocks. The
interval is of the change, by drawing documents again {{ "{:,}".format(resamples) }} times. Bits per
byte do not depend on the tokenizer.</p>
<img alt="Change in bits per byte, by document" src="{{ pictures.changes }}">

<h2>Documents that gained and lost most</h2>
{% for c in measured.comparisons %}
<table>
<tr><th>{{ c.corpus }}</th><th class="n">bits per byte</th><th class="n">change</th></tr>
{% for one in c.gained|list + c.lost|reverse|list %}
<tr><td class="title">{{ one.title }}</td>
<td class="n">{{ "%.3f"|format(one.before) }} → {{ "%.3f"|format(one.after) }}</td>
<td class="n {{ 'right' if one.after < one.before else 'wrong' }}">
{{- (one.after - one.before)|signed }}</td></tr>
{% endfor %}
</table>
{% endfor %}

<h2>What it knows: a cloze test</h2>
{% if measured.outcome %}
<p>{{ measured.outcome.cloze.items|length }} gaps in held-out documents
({{ measured.outcome.cloze.form }}). A model takes the option to which it gives the highest mean log
likelihood a token; the wrong options are of other held-out documents.</p>
<table>
<tr><th>model</th><th class="n">right</th><th class="n">95 % interval</th>
<th class="n">by guessing</th></tr>
{% for when, share, low, high in cloze.rows %}
<tr><td>{{ when }}</td><td class="n">{{ "%.0f %%"|format(100 * share) }}</td>
<td class="n">{{ "%.0f"|format(100 * low) }} to {{ "%.0f %%"|format(100 * high) }}</td>
<td class="n">{{ "%.0f %%"|format(100 * measured.outcome.cloze.chance) }}</td></tr>
{% endfor %}
</table>
<p class="note">{{ cloze.learnt }} gaps only the trained model fills rightly,
{{ cloze.forgot }} only the base model. Some items, those first in which the two differ:</p>
{% for item in cloze.examples %}
<div class="item">
<pre>{{ "…" if item.cut }}{{ item.prompt }}<span class="gap">?</span>{{ item.after }}</pre>
<p class="note">{% for option in item.options %}
{% if loop.index0 == item.right %}<b><code>{{ option }}</code></b>{% else %}
<code>{{ option }}</code>{% endif %}{{ " · " if not loop.last }}{% endfor %}<br>
base: <code class="{{ 'right' if item.base == item.right else 'wrong' }}">
{{- item.options[item.base] }}</code>,
trained: <code class="{{ 'right' if item.trained == item.right else 'wrong' }}">
{{- item.options[item.trained] }}</code></p>
</div>
{% endfor %}
{% else %}
<p>None: {{ measured.no_cloze }}.</p>
{% endif %}

{% if measured.continued %}
<h2>Continuations, greedily</h2>
{% for one in measured.continued %}
<div class="item">
<pre>{{ one.prompt }}</pre>
<table><tr><th>base</th><th>trained</th></tr>
<tr><td class="text">{{ one.before.strip() }}</td><td class="text">{{ one.after.strip() }}</td></tr>
</table>
</div>
{% endfor %}
{% endif %}

{% if pictures.training is defined %}
<h2>How it trained</h2>
<img alt="Training loss and held-out perplexity by step" src="{{ pictures.training }}">
{% endif %}

{% if costs %}
<h2>What it cost</h2>
<table>
{% for name, value in costs %}
<tr><td>{{ name }}</td><td class="n">{{ value }}</td></tr>
{% endfor %}
<tr><td>measuring for this report</td>
<td class="n">{{ "%.0f s"|format(measured.seconds) }}</td></tr>
</table>
{% endif %}
{% if spent %}
<h2>Where the time went</h2>
<table>
{% for name, seconds, share in spent %}
<tr><td>{{ name }}</td><td class="n">{{ "{:,.0f} s".format(seconds) }}</td>
<td class="wide"><span class="bar" style="width: {{ '%.1f'|format(100 * share) }}%"></span></td>
</tr>
{% endfor %}
</table>
{% endif %}

<h2>Settings</h2>
<div class="small">
{% for name, value in settings %}
<div><b>{{ name }}</b> {{ value }}</div>
{% endfor %}
</div>
{% if versions %}
<h2>Versions</h2>
<p>{% for name, value in versions.items() %}{{ name }} {{ value }}{{ " · " if not loop.last }}
{%- endfor %}</p>
{% endif %}
</body>
</html>
"""
