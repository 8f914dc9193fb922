"""Several sources in the shares asked for, drawn from their blocks; what the workers load."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from ..recipes import Recipe
from ..run import in_one_piece, write_json
from .corpora import Corpus
from .packing import FORM, Blocks, key_of, tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Drawn:
    """What one source gives to a mix.

    Attributes:
        name: The corpus.
        share: The share of tokens asked for.
        blocks: Blocks taken.
        tokens: The same in tokens.
        documents: Documents these are of, in proportion.
        epochs: How often the source is seen.
        dropped: Tokens of it that fill no block.
    """

    name: str
    share: float
    blocks: int
    tokens: int
    documents: int
    epochs: float
    dropped: int


@dataclass(frozen=True)
class Mix:
    """What the workers train on and measure with.

    Attributes:
        path: The recipe's ``tokenized_path``.
        block_size: Tokens in a block.
        blocks: Blocks to train on.
        drawn: What came from where.
        held_out: Blocks to measure with, by dataset.
    """

    path: Path
    block_size: int
    blocks: int
    drawn: list[Drawn]
    held_out: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        drawn = [asdict(source) for source in self.drawn]
        return {
            "tokenized_path": str(self.path),
            "block_size": self.block_size,
            "blocks": self.blocks,
            "mix": drawn,
            "heldout_blocks": self.held_out,
        }


def mix(
    sources: list[tuple[Corpus, float]],
    measured: list[Corpus],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    *,
    blocks: int | None = None,
    epochs: float = 1.0,
    seed: int = 42,
    least: int = 0,
) -> Mix:
    """Blocks of several sources in the shares asked for, and the held-out ones to measure with.

    Blocks are drawn without repetition until a source was seen whole, then again, up to ``epochs``
    times. Replaying general text so keeps what a model knew (Ibrahim et al. 2024, arXiv
    2403.08763).

    Args:
        sources: Each corpus and its weight, above nought; they are made to add up to one.
        measured: Corpora whose held-out halves are measured.
        tokenizer: The model's.
        block_size: ``cutoff_len``, in tokens.
        blocks: Blocks to draw in all; by default as many as the first source lasts for.
        epochs: How often a source may be seen.
        seed: Of the drawing.
        least: Blocks that the training needs; an error names the block size that gives them.

    Raises:
        DataError: A half fills no block, or a source has too little text for its share.
    """
    import numpy as np

    whole = sum(weight for _, weight in sources)
    parts = [
        (tokenise(corpus, tokenizer, block_size, held_out=False), weight / whole)
        for corpus, weight in sources
    ]
    held = [tokenise(corpus, tokenizer, block_size, held_out=True) for corpus in measured]
    _require_blocks(parts, held, block_size, least)
    first, share = parts[0]
    total = blocks or int(first.blocks * epochs / share)
    counts = _shares([share for _, share in parts], total)
    drawn, indices = [], []
    for number, ((part, share), count) in enumerate(zip(parts, counts, strict=True)):
        if count > part.blocks * epochs:
            most = part.blocks * epochs / total
            raise DataError(
                f"'{part.name}' is too small for {share:.1%} of {total:,} blocks: it has "
                f"{part.blocks:,}, {count:,} are wanted",
                where=f"blocks of {block_size} tokens, each seen {epochs:g} times at most",
                expected=f"a share of at most {most:.1%}",
                do="give more text, lower its share, or repeat it on purpose: EPOCHS",
            )
        random = np.random.default_rng([seed, number])
        rounds = [
            random.permutation(part.blocks) for _ in range(math.ceil(count / max(part.blocks, 1)))
        ]
        indices.append(np.concatenate([*rounds, np.zeros(0, int)])[:count])
        drawn.append(
            Drawn(
                name=part.name,
                share=round(share, 4),
                blocks=count,
                tokens=count * block_size,
                documents=round(part.documents * min(count / max(part.blocks, 1), 1)),
                epochs=round(count / max(part.blocks, 1), 4),
                dropped=part.dropped,
            )
        )
    what = [FORM, seed, [(p.folder.name, n) for (p, _), n in zip(parts, counts, strict=True)]]
    what.append([part.folder.name for part in held])
    storage = sources[0][0].folder.parent.parent
    name = "+".join(part.name for part, _ in parts)
    folder = storage / "tokenised" / f"mix-{name[:60]}-{key_of(what)}"
    found = Mix(folder, block_size, total, drawn, {part.name: part.blocks for part in held})
    if not folder.is_dir():
        _save(folder, parts, indices, held, seed, found)
    return found


def for_recipe(
    recipe: Recipe,
    sources: list[tuple[Corpus, float]],
    measured: list[Corpus],
    tokenizer: PreTrainedTokenizerBase,
    *,
    epochs: float = 1.0,
) -> Mix:
    """The blocks a recipe trains on: of one source all; of several as many as its steps take.

    Args:
        recipe: LLaMA-Factory's keys; ``cutoff_len``, ``seed``, ``max_steps`` and the batch count.
        sources: As for :func:`mix`.
        measured: As for :func:`mix`.
        tokenizer: The model's.
        epochs: As for :func:`mix`.

    Raises:
        DataError: As for :func:`mix`. A recipe that does not evaluate needs no held-out blocks.
    """
    wanted = max(recipe.max_steps, 0) * recipe.global_batch
    return mix(
        sources,
        measured if evaluates(recipe) else [],
        tokenizer,
        recipe.block_size,
        blocks=wanted if wanted and len(sources) > 1 else None,
        epochs=epochs,
        seed=recipe.get("seed", 42),
        least=wanted,
    )


def evaluates(recipe: Recipe) -> bool:
    """Whether a training by this recipe measures held-out text."""
    on = [str(recipe.get(key, False)).lower() == "true" for key in ("do_eval", "eval_on_start")]
    return any(on) or str(recipe.get("eval_strategy", "no")) != "no"


def _require_blocks(
    trained: list[tuple[Blocks, float]], held: list[Blocks], block_size: int, least: int
) -> None:
    """The trainer fails in a worker where a half fills no block, minutes after the launch."""
    needs = [(part, max(math.ceil(share * least), 1)) for part, share in trained]
    needs += [(part, 1) for part in held]
    empty = [part for part, _ in needs if not part.blocks]
    if empty:
        most = min(part.tokens // blocks for part, blocks in needs)
        raise DataError(
            f"no block of {block_size:,} tokens is full in {', '.join(p.name for p in empty)}",
            where="\n".join(f"{part.name}: {part.tokens:,} tokens" for part, _ in needs),
            expected=f"cutoff_len of at most {most:,}",
            do="lower cutoff_len, or give more text",
        )


def weights(corpus: str | dict[str, float], replay: dict[str, float]) -> dict[str, float]:
    """Sources and their weights: the domain's, scaled down to make room for what is replayed.

    Args:
        corpus: One source, or several with weights.
        replay: Sources and their shares of all tokens, such as ``{"news": 0.05}``.

    Raises:
        DataError: A weight is no positive number, or the shares leave nothing to the domain.
    """
    given = {corpus: 1.0} if isinstance(corpus, str) else dict(corpus)
    for name, value in [*given.items(), *replay.items()]:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            raise DataError(
                f"'{name}' has the weight {value!r}",
                expected="a number above nought",
                do="leave a source out rather than giving it no weight",
            )
    if both := set(given) & set(replay):
        raise DataError(
            f"'{', '.join(sorted(both))}' is both the corpus and replayed into it",
            expected="a source in one of the two",
            do="leave it out of REPLAY, or out of CORPUS",
        )
    left = 1 - sum(replay.values())
    if left <= 0 or not given:
        raise DataError(
            f"the replay takes {1 - left:.0%} of all tokens",
            where=str(replay),
            expected="shares that leave something to the domain, such as {'news': 0.05}",
            do="lower them",
        )
    whole = sum(given.values())
    return {name: value / whole * left for name, value in given.items()} | replay


def _shares(shares: list[float], total: int) -> list[int]:
    """Whole numbers in those shares that add up (largest remainder)."""
    counts = [int(share * total) for share in shares]
    rests = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i] * total)
    for i in rests[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _save(
    folder: Path, parts: Any, indices: Any, held: list[Blocks], seed: int, found: Mix
) -> None:
    """Writes the drawn blocks, shuffled, as LLaMA-Factory loads them."""
    import numpy as np
    from datasets import DatasetDict, concatenate_datasets, disable_progress_bars

    disable_progress_bars()
    trained = [_load(part).select(rows) for (part, _), rows in zip(parts, indices, strict=True)]
    order = np.random.default_rng(seed).permutation(sum(map(len, indices)))
    halves = {"train": concatenate_datasets(trained).select(order)}
    halves |= {f"validation_{part.name}": _load(part) for part in held}
    with in_one_piece(folder) as new:
        DatasetDict(halves).save_to_disk(new)
        write_json(new / "mix.json", found.as_dict())


def _load(part: Blocks) -> Any:
    from datasets import Dataset

    return Dataset.from_file(str(part.folder / "blocks.arrow"))
