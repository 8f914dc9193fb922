"""Did it help? The base model and the trained one, asked the same, one after the other.

Held-out documents by their losses, a cloze test over the domain's facts, prompts to continue.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import recipes
from ..data import corpora
from ..errors import ConfigError, DataError
from ..recipes import HELD_OUT
from ..run import Run
from ..setup import models
from . import cloze, evaluation
from .cloze import Outcome
from .evaluation import Comparison


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
    also: Sequence[str] = (),
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
        also: Other prompts to continue, before those.
        tolerance: Relative rise in general perplexity that is not called a loss.
        seed: Of every draw.

    Raises:
        ConfigError: The recipe names no held-out set.
        DataError: A corpus is not on the storage.
    """
    started = time.monotonic()
    args = recipes.load(run)
    roles = {name.removesuffix(HELD_OUT): role for role, name in args.held_out.items()}
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
        half = corpora.load(name, run.storage).heldout
        texts[name] = evaluation.sample(corpora.texts_of(half), documents, seed=seed)
    domain = next((name for name, role in roles.items() if role == "domain"), next(iter(roles)))
    test, no_cloze = None, ""
    try:
        test = cloze.make(texts[domain], most=items, seed=seed)
    except DataError as error:
        no_cloze = error.what
    drawn = evaluation.sample(texts[domain], prompts, seed=seed)
    begun = [*also, *(beginning(text) for text in drawn)]
    base = base or args["model_name_or_path"]
    trained = trained or (run.export if run.export.is_dir() else run.output)
    seen = []
    for model in (base, trained):
        seen.append(_ask(model, texts, test, begun, args.block_size))
        models.release()
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
    model, tokenizer = models.load(folder, dtype=dtype)
    losses = evaluation.measure(model, tokenizer, texts, block_size)
    picks = cloze.answer(model, tokenizer, test) if test else ()
    return losses, picks, [models.continuation(model, tokenizer, prompt) for prompt in prompts]
