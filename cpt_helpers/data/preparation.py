"""The data that a recipe trains on and measures with, from its sources to its blocks.

Notebook 02 and ``python -m cpt_helpers train`` both use it: one recipe gives one training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import recipes
from ..recipes import Recipe
from . import corpora, mixing
from .cleaning import Cleaning
from .corpora import Corpus
from .mixing import Mix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainingData:
    """A recipe's corpora, read and cleaned.

    Attributes:
        recipe: LLaMA-Factory's keys, with the overrides.
        corpora: Each corpus to train on, by its source; the first one is the domain.
        weights: Each source's share of the tokens.
        general: The corpus of general text, which is measured too.
        epochs: How often a source may be seen, where several are mixed.
    """

    recipe: Recipe
    corpora: dict[str, Corpus]
    weights: dict[str, float]
    general: Corpus
    epochs: float

    @property
    def domain(self) -> Corpus:
        return next(iter(self.corpora.values()))

    @property
    def every(self) -> list[Corpus]:
        """Each corpus once, also the one that is only measured."""
        return list({c.name: c for c in (*self.corpora.values(), self.general)}.values())

    @property
    def datasets(self) -> str:
        """The recipe's ``dataset``: the names to train on, joined by commas."""
        return ",".join(corpus.name for corpus in self.corpora.values())

    def blocks(self, tokenizer: PreTrainedTokenizerBase) -> Mix:
        """The blocks that the workers load.

        Raises:
            DataError: A half that is trained on or measured fills no block, or a source has too
                little text for its share.
        """
        sources = [(self.corpora[name], weight) for name, weight in self.weights.items()]
        measured = {corpus.name: corpus for corpus in (self.domain, self.general)}
        return mixing.for_recipe(
            self.recipe, sources, list(measured.values()), tokenizer, epochs=self.epochs
        )


def prepare(
    train_config: str,
    overrides: dict[str, Any],
    storage: Path,
    *,
    corpus: str | dict[str, float] = "",
    replay: dict[str, float] | None = None,
    epochs: float = 1.0,
    column: str = "text",
    max_samples: int = 0,
    tolerate: float = 0.0,
    cleaning: Cleaning | None = None,
) -> TrainingData:
    """Reads and cleans the corpora of a recipe.

    Args:
        train_config: The recipe.
        overrides: LLaMA-Factory keys to set; ``None`` removes a key.
        storage: Where corpora are kept.
        corpus: A source, or several with weights; by default the recipe's ``dataset``.
        replay: Sources that are mixed into it, and their shares of all tokens.
        epochs: How often a source may be seen, where several are mixed.
        column: The field that holds the text.
        max_samples: Records of a source at most; 0 takes the recipe's ``max_samples``, or all.
        tolerate: Share of records that may be no documents.
        cleaning: What is dropped.

    Raises:
        ConfigError: The recipe is not there, or names no dataset.
        DataError: A corpus cannot be read or used.
    """
    merged = recipes.read_recipe(train_config)[1] | overrides
    recipe = Recipe({key: value for key, value in merged.items() if value is not None})
    recipes.numbers_as_such(recipe)
    weights = mixing.weights(corpus or recipes.corpus_of(train_config, overrides), replay or {})
    most = max_samples or recipe.get("max_samples")
    prepared = {
        name: corpora.prepare(
            name, storage, column=column, max_samples=most, tolerate=tolerate, cleaning=cleaning
        )
        for name in weights
    }
    general = prepared.get("news") or corpora.prepare("news", storage)
    return TrainingData(recipe, prepared, weights, general, epochs)
