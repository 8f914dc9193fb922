"""Mixing: the corpora of a recipe, and the blocks drawn from them in the shares asked for.

Notebook 02 and ``python -m cpt_helpers train`` both use :func:`prepare`, so that one recipe gives
the same training data in both.
"""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import recipes
from ..errors import DataError
from ..recipes import Recipe
from ..run import in_one_piece, write_json
from ..setup import assets
from . import corpora
from .cleaning import Cleaning
from .corpora import Corpus
from .packing import FORMAT, Blocks, digest_of, tokenise

if TYPE_CHECKING:
    from pandas import DataFrame
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Drawn:
    """What one corpus gives to a mix."""

    name: str
    share: float  # of tokens, as asked for
    blocks: int
    tokens: int
    documents: int  # estimated from the blocks
    epochs: float  # how often the corpus is seen
    dropped: int  # its tokens that fill no block


@dataclass(frozen=True)
class Mix:
    """The blocks that the workers train on and evaluate."""

    path: Path  # the recipe's ``tokenized_path``
    block_size: int  # tokens per block
    blocks: int  # to train on
    drawn: list[Drawn]
    held_out: dict[str, int]  # blocks by dataset
    sources: list[Blocks] = field(repr=False, compare=False)  # of which the blocks are drawn

    def as_dict(self) -> dict[str, Any]:
        """What a run's results keep of it."""
        return {
            "tokenized_path": str(self.path),
            "block_size": self.block_size,
            "blocks": self.blocks,
            "mix": [asdict(source) for source in self.drawn],
            "heldout_blocks": self.held_out,
            "tokens": sum(source.tokens for source in self.sources),
            "dropped_tokens": sum(source.dropped for source in self.sources),
        }

    def tokens(self) -> DataFrame:
        """The tokens and full blocks of each corpus."""
        import pandas as pd

        table = pd.DataFrame(map(asdict, self.sources)).rename(columns={"dropped": "left over"})
        return table.set_index("name")[["documents", "tokens", "blocks", "left over"]]

    def shares(self) -> DataFrame:
        """What was drawn of each corpus."""
        import pandas as pd

        table = pd.DataFrame(map(asdict, self.drawn)).set_index("name").drop(columns="dropped")
        return table.assign(share=table["share"].map("{:.1%}".format))


@dataclass(frozen=True, repr=False)
class TrainingData:
    """The corpora of a recipe, read and cleaned. A notebook shows it as a table."""

    recipe: Recipe  # with the overrides
    model: str  # its folder or name; its tokenizer makes the blocks
    corpora: dict[str, Corpus]  # by source; the first one is the domain
    weights: dict[str, float]  # each source's share of the tokens
    general: Corpus  # general text, which is evaluated too
    epochs: float  # how often a source may be seen, if several are mixed

    def __repr__(self) -> str:
        return self.summary().to_string()

    def _repr_html_(self) -> str:
        return self.summary().to_html()

    def summary(self) -> DataFrame:
        """Each corpus: its records, and how many were rejected, dropped, kept and held out."""
        import pandas as pd

        rows = [
            {
                "corpus": corpus.name,
                "source": corpus.source,
                "records": corpus.records,
                "invalid": sum(corpus.rejected.values()),
                "dropped": sum(corpus.dropped.values()),
                "training documents": corpus.documents,
                "held-out documents": corpus.heldout_documents,
            }
            for corpus in self.every
        ]
        return pd.DataFrame(rows).set_index("corpus")

    def dropped(self) -> DataFrame:
        """Why records were rejected or documents dropped, with the first examples."""
        import pandas as pd

        rows = [
            (corpus.name, reason, count, where, " ".join(text.split())[:60])
            for corpus in self.every
            for reason, count in (corpus.rejected | corpus.dropped).items()
            for where, text in corpus.examples.get(reason, [["", ""]])
        ]
        table = pd.DataFrame(rows, columns=["corpus", "reason", "count", "record", "text"])
        return table.set_index(["corpus", "reason", "count", "record"])

    @property
    def domain(self) -> Corpus:
        return next(iter(self.corpora.values()))

    @property
    def every(self) -> list[Corpus]:
        """Each corpus once, also one that is only evaluated."""
        return list({c.name: c for c in (*self.corpora.values(), self.general)}.values())

    @property
    def datasets(self) -> str:
        """The recipe's ``dataset``: the names to train on, joined by commas."""
        return ",".join(corpus.name for corpus in self.corpora.values())

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return assets.tokenizer_of(self.model)

    def blocks(self, tokenizer: PreTrainedTokenizerBase | None = None) -> Mix:
        """The blocks that the workers load, by the model's tokenizer or another one.

        Raises:
            DataError: A half fills no block, or a source has too little text for its share.
        """
        sources = [(self.corpora[name], weight) for name, weight in self.weights.items()]
        held_out = list({corpus.name: corpus for corpus in (self.domain, self.general)}.values())
        tokenizer = tokenizer or self.tokenizer
        return for_recipe(self.recipe, sources, held_out, tokenizer, epochs=self.epochs)

    def as_dict(self, mix: Mix) -> dict[str, Any]:
        """What a run's results keep of the data."""
        names = {"datasets": self.datasets, "general": self.general.name}
        return {**self.domain.as_dict(), **mix.as_dict(), **names}


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
    clean: dict[str, Any] | None = None,
) -> TrainingData:
    """Reads and cleans the corpora of a recipe.

    The arguments are the parameters of notebook 02, which explains them. By default the corpus and
    the largest number of samples are the recipe's.

    Raises:
        ConfigError: The recipe does not exist, or names no dataset.
        DataError: A corpus cannot be read or used.
    """
    merged = recipes.read_recipe(train_config)[1] | overrides
    recipe = Recipe({key: value for key, value in merged.items() if value is not None})
    recipes.numbers_as_such(recipe)
    source_weights = weights(corpus or recipes.corpus_of(train_config, overrides), replay or {})
    cleaning, limit = Cleaning.from_settings(clean or {}), max_samples or recipe.get("max_samples")
    prepared = {
        name: corpora.prepare(
            name, storage, column=column, max_samples=limit, tolerate=tolerate, cleaning=cleaning
        )
        for name in source_weights
    }
    general = prepared.get("news") or corpora.prepare("news", storage)
    model = recipes.model_of(train_config, overrides, storage)
    return TrainingData(recipe, model, prepared, source_weights, general, epochs)


def weights(corpus: str | dict[str, float], replay: dict[str, float]) -> dict[str, float]:
    """Each source's share of the tokens: the corpus is scaled down to make room for the replay.

    Raises:
        DataError: A weight is not a positive number, or the replay takes all tokens.
    """
    given = {corpus: 1.0} if isinstance(corpus, str) else dict(corpus)
    for name, value in [*given.items(), *replay.items()]:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            raise DataError(
                f"'{name}' has the weight {value!r}",
                expected="a number above zero",
                do="correct the weight, or remove the source",
            )
    if both := set(given) & set(replay):
        raise DataError(
            f"'{', '.join(sorted(both))}' is in both CORPUS and REPLAY",
            expected="each source in one of the two",
            do="remove it from REPLAY, or from CORPUS",
        )
    left = 1 - sum(replay.values())
    if left <= 0 or not given:
        raise DataError(
            f"the replay takes {1 - left:.0%} of all tokens",
            where=str(replay),
            expected="shares that add up to less than 1, such as {'news': 0.05}",
            do="lower the shares",
        )
    whole = sum(given.values())
    return {name: value / whole * left for name, value in given.items()} | replay


def for_recipe(
    recipe: Recipe,
    sources: list[tuple[Corpus, float]],
    held_out: list[Corpus],
    tokenizer: PreTrainedTokenizerBase,
    *,
    epochs: float = 1.0,
) -> Mix:
    """Writes the blocks of a recipe: all of one source, or of several what its steps need.

    Blocks are drawn without repetition until a source was seen as a whole, then again, up to
    ``epochs`` times. Such replay of general text keeps what a model knew (Ibrahim et al. 2024,
    arXiv 2403.08763).

    The recipe gives the block size, the seed, the steps, and whether held-out text is evaluated.
    The weights of the sources are scaled to add up to one.

    Raises:
        DataError: A half fills no block, or a source has too little text for its share.
    """
    size, seed = recipe.block_size, recipe.get("seed", 42)
    needed = max(recipe.max_steps, 0) * recipe.global_batch
    shares = [weight / sum(weight for _, weight in sources) for _, weight in sources]
    parts = [tokenise(corpus, tokenizer, size, held_out=False) for corpus, _ in sources]
    evaluated = held_out if evaluates(recipe) else []
    held = [tokenise(corpus, tokenizer, size, held_out=True) for corpus in evaluated]
    _require_blocks(parts, shares, held, needed)
    total = needed if needed and len(sources) > 1 else int(parts[0].blocks * epochs / shares[0])
    counts = _round_shares(shares, total)
    drawn = [_draw(*draw, total, epochs) for draw in zip(parts, shares, counts, strict=True)]
    pairs = [(part.folder.name, d.blocks) for part, d in zip(parts, drawn, strict=True)]
    key = [FORMAT, seed, pairs, [part.folder.name for part in held]]
    name = "+".join(part.name for part in parts)
    folder = parts[0].folder.parent / f"mix-{name[:60]}-{digest_of(key)}"
    mix = Mix(folder, size, total, drawn, {p.name: p.blocks for p in held}, parts)
    if not folder.is_dir():
        _save(mix, held, seed)
    return mix


def evaluates(recipe: Recipe) -> bool:
    """Whether a training by this recipe evaluates held-out text."""
    flags = [str(recipe.get(key, False)).lower() for key in ("do_eval", "eval_on_start")]
    return "true" in flags or str(recipe.get("eval_strategy", "no")) != "no"


def _require_blocks(
    parts: list[Blocks], shares: list[float], held: list[Blocks], needed: int
) -> None:
    """Raises for a half without a block: a worker would fail minutes after the launch."""
    needs = [
        (part, max(math.ceil(share * needed), 1)) for part, share in zip(parts, shares, strict=True)
    ]
    needs += [(part, 1) for part in held]
    if empty := [part.name for part, _ in needs if not part.blocks]:
        largest = min(part.tokens // blocks for part, blocks in needs)
        raise DataError(
            f"no block of {parts[0].block_size:,} tokens is full in {', '.join(empty)}",
            where="\n".join(f"{part.name}: {part.tokens:,} tokens" for part, _ in needs),
            expected=f"cutoff_len of at most {largest:,}",
            do="lower cutoff_len, or give more text",
        )


def _draw(part: Blocks, share: float, count: int, total: int, epochs: float) -> Drawn:
    if count > part.blocks * epochs:
        raise DataError(
            f"'{part.name}' is too small for {share:.1%} of {total:,} blocks: it has "
            f"{part.blocks:,}, {count:,} are needed",
            where=f"blocks of {part.block_size} tokens, each seen at most {epochs:g} times",
            expected=f"a share of at most {part.blocks * epochs / total:.1%}",
            do="give more text, lower its share, or raise EPOCHS to repeat it",
        )
    seen = count / max(part.blocks, 1)
    return Drawn(
        name=part.name,
        share=round(share, 4),
        blocks=count,
        tokens=count * part.block_size,
        documents=round(part.documents * min(seen, 1)),
        epochs=round(seen, 4),
        dropped=part.dropped,
    )


def _round_shares(shares: list[float], total: int) -> list[int]:
    """Whole numbers in those shares that add up to the total (largest remainder)."""
    counts = [int(share * total) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i] * total)
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _save(mix: Mix, held: list[Blocks], seed: int) -> None:
    """Writes the drawn blocks, shuffled, in the form that LLaMA-Factory loads."""
    import numpy as np
    from datasets import Dataset, DatasetDict, concatenate_datasets, disable_progress_bars

    disable_progress_bars()
    trained = []
    for number, (part, source) in enumerate(zip(mix.sources, mix.drawn, strict=True)):
        random = np.random.default_rng([seed, number])
        rounds = [
            random.permutation(part.blocks)
            for _ in range(math.ceil(source.blocks / max(part.blocks, 1)))
        ]
        rows = np.concatenate([*rounds, np.zeros(0, int)])[: source.blocks]
        trained.append(Dataset.from_file(part.file).select(rows))
    order = np.random.default_rng(seed).permutation(mix.blocks)
    halves = {"train": concatenate_datasets(trained).select(order)}
    halves |= {f"validation_{part.name}": Dataset.from_file(part.file) for part in held}
    with in_one_piece(mix.path) as new:
        DatasetDict(halves).save_to_disk(new)
        write_json(new / "mix.json", mix.as_dict())
