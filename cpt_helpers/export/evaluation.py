"""Losses of single documents, before and after, with intervals.

Each document is measured on its own, so that documents can be counted, compared and drawn again.
lm-eval has no part in it, though it fits the pins and could be given our texts as tasks of its own:
its bits per byte are one figure over all documents of one model, and a test of choices takes items
of one document as independent; here the same documents are drawn again under both models.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..data.packing import forced_bos, pack
from ..errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RESAMPLES = 2000
TOLERANCE = 0.02  # of perplexity on general text: less is not called a loss
FEWEST = 8  # documents; an interval drawn from fewer says more about the drawing
_LOGITS = 128 * 2**20  # bytes of scores over the vocabulary at once; one row may need more
_ROWS = 16


@dataclass(frozen=True)
class Document:
    """How well a model foretells one document.

    Attributes:
        title: Its first line.
        nats: Sum of the negative log likelihoods of its tokens.
        tokens: How many; each is predicted once, the first from what documents begin after.
        bytes: Its length in UTF-8.
    """

    title: str
    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes


@dataclass(frozen=True)
class Losses:
    """Documents of one corpus under one model."""

    corpus: str
    documents: tuple[Document, ...] = field(repr=False)

    @property
    def tokens(self) -> int:
        return sum(document.tokens for document in self.documents)

    @property
    def perplexity(self) -> float:
        """Per token: exp of the mean over all tokens of all documents."""
        return math.exp(sum(document.nats for document in self.documents) / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Independent of the tokenizer: two models with other vocabularies can be compared."""
        size = sum(document.bytes for document in self.documents)
        return sum(document.nats for document in self.documents) / math.log(2) / size


@dataclass(frozen=True)
class Moved:
    """A document and its bits per byte before and after."""

    title: str
    before: float
    after: float


@dataclass(frozen=True)
class Comparison:
    """One corpus before and after.

    Attributes:
        role: ``"domain"``, ``"general"``, or ``""`` for any other.
        before: Under the base model.
        after: Under the trained one.
        change: Relative change in perplexity; below zero is better.
        low: Lower end of its 95 % interval, by a bootstrap over documents.
        high: Upper end.
        tolerance: Up to which a loss is none.
        gained: The documents that gained most, in bits per byte.
        lost: The documents that lost most.
    """

    role: str
    before: Losses
    after: Losses
    change: float
    low: float
    high: float
    tolerance: float
    gained: tuple[Moved, ...] = field(repr=False)
    lost: tuple[Moved, ...] = field(repr=False)

    @property
    def corpus(self) -> str:
        return self.after.corpus

    @property
    def verdict(self) -> str:
        """``"better"``, ``"kept"``, ``"lost"`` or ``"cannot be told"``.

        Kept, where the whole interval lies below the tolerance; lost, where it lies above zero and
        the change above the tolerance. The domain has no tolerance: it is to be better.
        """
        if len(self.after.documents) < FEWEST:
            return "cannot be told"
        if self.role != "general" and self.high < 0:
            return "better"
        if self.low > 0 and self.change > self.tolerance:
            return "lost"
        if self.role != "domain" and self.high <= self.tolerance:
            return "kept"
        return "cannot be told"

    @property
    def sentence(self) -> str:
        """What a reader should take home, in one sentence."""
        names = {"domain": "Domain text", "general": "General text"}
        name = names.get(self.role, f"Text of {self.corpus}")
        said = self.verdict
        if said == "cannot be told":
            said += f" from {len(self.after.documents)} documents"
        return (
            f"{name}: perplexity {self.before.perplexity:.1f} → {self.after.perplexity:.1f}, "
            f"{percent(self.change)} (95 % interval {percent(self.low, sign='')} to "
            f"{percent(self.high)}): {said}."
        )

    def as_dict(self) -> dict[str, Any]:
        """What to keep of it in a run's results."""
        return {
            "corpus": self.corpus,
            "documents": len(self.after.documents),
            "tokens": self.after.tokens,
            "perplexity": _pair(self.before.perplexity, self.after.perplexity, 3),
            "bits_per_byte": _pair(self.before.bits_per_byte, self.after.bits_per_byte, 4),
            "change": round(self.change, 4),
            "interval": [round(self.low, 4), round(self.high, 4)],
            "verdict": self.verdict,
        }


def document_losses(
    model: Any, tokenizer: Any, texts: Sequence[str], block_size: int
) -> tuple[Document, ...]:
    """Measures each document on its own, after the token that documents begin after in training.

    Args:
        model: In plain transformers.
        tokenizer: The model's.
        texts: The documents.
        block_size: Tokens a model sees at once. A longer document is cut; each piece begins with
            BOS where the tokenizer forces it, as blocks do, else with the token before it.

    Raises:
        DataError: There is no document, or one is empty.
    """
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    if not encoded or not all(encoded):
        raise DataError(
            "nothing to measure: no document, or an empty one",
            expected="held-out documents with text in them",
        )
    first, bos, pieces, owners = opening(tokenizer), forced_bos(tokenizer), [], []
    for owner, ids in enumerate(encoded):
        for start in range(0, len(ids), block_size - 1):
            before = ids[start - 1] if start and bos is None else first
            pieces.append([before, *ids[start : start + block_size - 1]])
            owners.append(owner)
    nats = [0.0] * len(encoded)
    for owner, losses in zip(owners, token_losses(model, pieces), strict=True):
        nats[owner] += float(losses.sum(dtype="float64"))
    return tuple(
        Document(title_of(text), sum_, len(ids), len(text.encode("utf-8")))
        for text, sum_, ids in zip(texts, nats, encoded, strict=True)
    )


def opening(tokenizer: Any) -> int:
    """The token a document begins after: BOS where the tokenizer forces it, else the separator."""
    return tokenizer.eos_token_id if (bos := forced_bos(tokenizer)) is None else bos


def token_losses(model: Any, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """The negative log likelihood of each token but the first, row by row.

    Rows of like length go together, as many as keep the scores over the vocabulary small.

    Args:
        model: In plain transformers.
        rows: Token ids, at least two each.

    Returns:
        An array of ``len(row) - 1`` values for each row, in the order given.
    """
    import torch

    vocabulary = model.get_input_embeddings().num_embeddings
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    found: list[Any] = [None] * len(rows)
    with torch.inference_mode():
        while order:
            length = len(rows[order[-1]])
            many = min(max(_LOGITS // (length * vocabulary * 4), 1), _ROWS)
            batch, order = order[-many:], order[:-many]
            ids = torch.zeros(len(batch), length, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for line, number in enumerate(batch):  # padded on the right, where nothing looks
                ids[line, : len(rows[number])] = torch.tensor(rows[number])
                mask[line, : len(rows[number])] = 1
            ids, mask = ids.to(model.device), mask.to(model.device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for line, number in enumerate(batch):
                last = len(rows[number])
                losses = torch.nn.functional.cross_entropy(
                    logits[line, : last - 1].float(), ids[line, 1:last], reduction="none"
                )
                found[number] = losses.cpu().numpy()
            del logits
    return found


def compare(
    before: Losses,
    after: Losses,
    *,
    role: str = "",
    tolerance: float = TOLERANCE,
    examples: int = 3,
    seed: int = 0,
) -> Comparison:
    """Holds the same documents under two models against each other.

    Args:
        before: Under the base model.
        after: Under the trained one.
        role: ``"domain"``, ``"general"``, or nothing.
        tolerance: Relative rise in perplexity that is not called a loss.
        examples: Documents to name that gained, and that lost, most.
        seed: Of the bootstrap.

    Raises:
        DataError: They are not the same documents.
    """
    import numpy as np

    theirs, ours = before.documents, after.documents
    if [(d.title, d.bytes) for d in theirs] != [(d.title, d.bytes) for d in ours]:
        raise DataError(
            "before and after are not the same documents",
            where=f"{before.corpus} ({len(theirs)}) and {after.corpus} ({len(ours)})",
            do="measure both models with the same texts in the same order",
        )
    nats = np.array([[d.nats for d in theirs], [d.nats for d in ours]])
    tokens = np.array([[d.tokens for d in theirs], [d.tokens for d in ours]])

    def change(drawn: np.ndarray) -> float:
        means = nats[:, drawn].sum(axis=1) / tokens[:, drawn].sum(axis=1)
        return float(np.exp(means[1] - means[0]) - 1)

    low, high = bootstrap(change, len(ours), seed=seed)
    moved = [
        Moved(b.title, b.bits_per_byte, a.bits_per_byte) for b, a in zip(theirs, ours, strict=True)
    ]
    moved.sort(key=lambda one: one.after - one.before)
    return Comparison(
        role,
        before,
        after,
        change(np.arange(len(ours))),
        low,
        high,
        tolerance,
        gained=tuple(one for one in moved[:examples] if one.after < one.before),
        lost=tuple(one for one in moved[::-1][:examples] if one.after > one.before),
    )


def bootstrap(
    statistic: Callable[[np.ndarray], float], size: int, *, seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile interval of a statistic over things drawn again with replacement.

    Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.

    Args:
        statistic: Takes the numbers of those drawn.
        size: How many things there are.
        seed: The same one gives the same interval.
    """
    import numpy as np

    draw = np.random.default_rng(seed)
    values = [statistic(draw.integers(0, size, size)) for _ in range(RESAMPLES)]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def measure(
    model: Any, tokenizer: Any, corpora: Mapping[str, Sequence[str]], block_size: int
) -> dict[str, Losses]:
    """The losses of several corpora under one model, by name."""
    return {
        name: Losses(name, document_losses(model, tokenizer, texts, block_size))
        for name, texts in corpora.items()
    }


def sample(texts: Iterable[str], most: int, *, seed: int = 0) -> list[str]:
    """At most so many of the texts, drawn without replacement, in their order.

    Only those drawn are held (Vitter 1985, algorithm R).
    """
    draw, drawn = random.Random(seed), []
    for number, text in enumerate(texts):
        if number < most:
            drawn.append((number, text))
        elif (place := draw.randrange(number + 1)) < most:
            drawn[place] = (number, text)
    return [text for _, text in sorted(drawn)]


def title_of(text: str) -> str:
    """The first line of a document, shortened."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line if len(line) <= 90 else line[:89].rstrip() + "…"


def percent(share: float, *, sign: str = " %") -> str:
    """``-0.048`` as ``−4.8 %``, with a real minus."""
    return f"{100 * share:+.1f}".replace("-", "−") + sign


def _pair(before: float, after: float, digits: int) -> dict[str, float]:
    return {"before": round(before, digits), "after": round(after, digits)}


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    block_size: int,
) -> float:
    """Perplexity over packed text, measured as the trainer measures it, separators included.

    Args:
        model: In plain transformers.
        tokenizer: The model's.
        texts: Held-out documents.
        block_size: The training's ``cutoff_len``, in tokens.

    Returns:
        exp of the mean over whole blocks of their mean cross-entropy, one block at a time.
    """
    import torch

    blocks = torch.tensor(pack(texts, tokenizer, block_size).blocks, device=model.device)
    means = []
    with torch.inference_mode():
        for block in blocks:
            logits = model(input_ids=block[None]).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, block[1:])
            means.append(loss.item())
    return math.exp(sum(means) / len(means))
