"""Losses of single documents under two models, and the change with its 95 % interval.

Each document is measured separately, so that documents can be compared and resampled. lm-eval is
not used: it reports one figure per model over all documents and treats the items of one document
as independent. Here both models are measured on the same resampled documents.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .. import recipes
from ..data import corpora
from ..data.packing import forced_bos, pack
from ..errors import DataError
from ..run import Run

if TYPE_CHECKING:
    import numpy as np
    from pandas import DataFrame

RESAMPLES = 2000
TOLERANCE = 0.02  # relative rise of perplexity on general text that still counts as kept
MIN_DOCUMENTS = 8  # with fewer, an interval says little
NOT_SIGNIFICANT = "not significant"
_LOGITS = 128 * 2**20  # bytes of logits per batch; one row may need more
_ROWS = 16


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval."""

    estimate: float
    low: float
    high: float

    def text(self, unit: str = " %") -> str:
        """For example ``−4.8 % (95 % interval −6.1 to −3.4 %)``."""
        return (
            f"{percent(self.estimate, unit)} (95 % interval {percent(self.low, '')} to "
            f"{percent(self.high, unit)})"
        )

    def as_list(self) -> list[float]:
        return [round(self.low, 4), round(self.high, 4)]


def bootstrap(documents: Any, statistic: Callable[..., Any]) -> Interval:
    """A statistic of sums over documents, with the 95 % percentile interval of its resamples.

    Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13. The random numbers
    are the same in each call.

    Args:
        documents: An array of quantities to sum, each a row with one value per document.
        statistic: Takes the sum of each quantity, as numbers or as arrays.
    """
    import numpy as np

    values = np.asarray(documents, dtype=float)
    draws = np.random.default_rng(0).integers(0, values.shape[1], (RESAMPLES, values.shape[1]))
    resampled = statistic(*(row[draws].sum(axis=1) for row in values))
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(float(statistic(*values.sum(axis=1))), float(low), float(high))


@dataclass(frozen=True)
class Comparison:
    """One corpus under the base model and under the trained model.

    Attributes:
        corpus: Its name.
        role: ``"domain"``, ``"general"``, or ``""`` for any other corpus.
        documents: One row per document: ``title``, ``bytes``, the bits per byte ``before`` and
            ``after`` and their ``change``, and the nats and tokens under both models.
        change: Relative change of perplexity; below zero is better.
    """

    corpus: str
    role: str
    documents: DataFrame = field(repr=False)
    change: Interval

    @property
    def perplexity(self) -> tuple[float, float]:
        """Perplexity per token before and after, over all tokens of all documents."""
        return perplexity_of(self.documents, "_before"), perplexity_of(self.documents, "_after")

    @property
    def bits_per_byte(self) -> tuple[float, float]:
        """Loss per byte before and after; it does not depend on the tokenizer."""
        return bits_of(self.documents, "_before"), bits_of(self.documents, "_after")

    def most_improved(self, count: int = 3) -> DataFrame:
        """The documents whose bits per byte fell most."""
        return self.documents[self.documents.change < 0].nsmallest(count, "change")

    def most_worsened(self, count: int = 3) -> DataFrame:
        """The documents whose bits per byte rose most."""
        return self.documents[self.documents.change > 0].nlargest(count, "change")

    @property
    def verdict(self) -> str:
        """``"better"``, ``"kept"``, ``"worse"`` or ``"not significant"``.

        Kept: the whole interval is below the tolerance. Worse: the interval is above zero and the
        change is above the tolerance. Domain text cannot be kept: it has to improve.
        """
        if len(self.documents) < MIN_DOCUMENTS:
            return NOT_SIGNIFICANT
        if self.role != "general" and self.change.high < 0:
            return "better"
        if self.change.low > 0 and self.change.estimate > TOLERANCE:
            return "worse"
        if self.role != "domain" and self.change.high <= TOLERANCE:
            return "kept"
        return NOT_SIGNIFICANT

    @property
    def conclusion(self) -> str:
        """The verdict; one that is not significant names the number of documents."""
        return conclusion(self.verdict, len(self.documents), "documents")

    @property
    def sentence(self) -> str:
        """The result in one sentence."""
        names = {"domain": "Domain text", "general": "General text"}
        before, after = self.perplexity
        return (
            f"{names.get(self.role, f'Text of {self.corpus}')}: perplexity {before:.1f} → "
            f"{after:.1f}, {self.change.text()}: {self.conclusion}."
        )

    def as_dict(self) -> dict[str, Any]:
        """The values for a run's results."""
        return {
            "corpus": self.corpus,
            "documents": len(self.documents),
            "tokens": int(self.documents["tokens_after"].sum()),
            "perplexity": before_after(self.perplexity, 3),
            "bits_per_byte": before_after(self.bits_per_byte, 4),
            "change": round(self.change.estimate, 4),
            "interval": self.change.as_list(),
            "verdict": self.verdict,
        }


def compare(corpus: str, before: DataFrame, after: DataFrame, *, role: str = "") -> Comparison:
    """Compares the losses of the same documents under two models.

    Args:
        corpus: Its name.
        before: From :func:`document_losses`, under the base model.
        after: Under the trained model.
        role: ``"domain"``, ``"general"``, or nothing.

    Raises:
        DataError: They are not the same documents.
    """
    keys = ["title", "bytes"]
    if not before[keys].equals(after[keys]):
        raise DataError(
            "before and after are not the same documents",
            where=f"{corpus}: {len(before)} and {len(after)} documents",
            do="measure both models with the same texts in the same order",
        )
    documents = before.join(after.drop(columns=keys), lsuffix="_before", rsuffix="_after")
    for when in ("before", "after"):
        documents[when] = documents[f"nats_{when}"] / math.log(2) / documents["bytes"]
    documents["change"] = documents["after"] - documents["before"]
    columns = ["nats_before", "tokens_before", "nats_after", "tokens_after"]
    change = bootstrap(documents[columns].to_numpy().T, _relative_change)
    return Comparison(corpus, role, documents, change)


def _relative_change(nats: Any, tokens: Any, nats_after: Any, tokens_after: Any) -> Any:
    """The relative change of perplexity, from sums of nats and tokens."""
    import numpy as np

    return np.exp(nats_after / tokens_after - nats / tokens) - 1


def document_losses(model: Any, tokenizer: Any, texts: Sequence[str], block_size: int) -> DataFrame:
    """Measures each document separately, after the token that precedes documents in training.

    Args:
        model: In plain transformers.
        tokenizer: The model's.
        texts: The documents.
        block_size: Tokens per forward pass. A longer document is cut. Each piece begins with BOS
            where the tokenizer forces it, as blocks do, else with the token before it.

    Returns:
        One row per document: ``title`` (its first line), ``nats`` (the sum of the negative log
        likelihoods), ``tokens`` and ``bytes`` (in UTF-8).

    Raises:
        DataError: There is no document, or one is empty.
    """
    import pandas as pd

    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    if not encoded or not all(encoded):
        raise DataError(
            "nothing to measure: there is no document, or one is empty",
            expected="held-out documents with text",
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
    return pd.DataFrame(
        {
            "title": [title_of(text) for text in texts],
            "nats": nats,
            "tokens": [len(ids) for ids in encoded],
            "bytes": [len(text.encode("utf-8")) for text in texts],
        }
    )


def perplexity_of(documents: DataFrame, when: str = "") -> float:
    """Perplexity per token: exp of the mean loss over all tokens of all documents."""
    return math.exp(documents[f"nats{when}"].sum() / documents[f"tokens{when}"].sum())


def bits_of(documents: DataFrame, when: str = "") -> float:
    """Bits per byte over all documents."""
    return float(documents[f"nats{when}"].sum() / math.log(2) / documents["bytes"].sum())


def perplexity(model: Any, tokenizer: Any, texts: Iterable[str], block_size: int) -> float:
    """Perplexity over packed text, as the trainer measures it, separators included.

    Args:
        model: In plain transformers.
        tokenizer: The model's.
        texts: Held-out documents.
        block_size: The training's ``cutoff_len``, in tokens.

    Returns:
        exp of the mean over whole blocks of their mean cross-entropy.
    """
    blocks = pack(texts, tokenizer, block_size).blocks
    means = [float(losses.mean(dtype="float64")) for losses in token_losses(model, blocks)]
    return math.exp(sum(means) / len(means))


def held_out_perplexity(run: Run, model: Any, tokenizer: Any) -> dict[str, float]:
    """A model's perplexity on the run's held-out texts, by role."""
    recipe = recipes.load(run)
    halves = {
        role: corpora.load(name.removesuffix(recipes.HELD_OUT), run.storage).heldout
        for role, name in recipe.held_out.items()
    }
    return {
        role: perplexity(model, tokenizer, corpora.texts_of(half), recipe.block_size)
        for role, half in halves.items()
    }


def opening(tokenizer: Any) -> int:
    """The token before a document: BOS where the tokenizer forces it, else the separator."""
    return tokenizer.eos_token_id if (bos := forced_bos(tokenizer)) is None else bos


def token_losses(model: Any, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """The negative log likelihood of each token except the first, row by row.

    Rows of similar length share a batch whose logits fit in ``_LOGITS`` bytes.

    Args:
        model: In plain transformers.
        rows: Token ids, at least two each.

    Returns:
        An array of ``len(row) - 1`` values for each row, in the order given.
    """
    import torch

    vocabulary = model.get_input_embeddings().num_embeddings
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    losses: list[Any] = [None] * len(rows)
    while order:
        length = len(rows[order[-1]])
        count = min(max(_LOGITS // (length * vocabulary * 4), 1), _ROWS)
        batch, order = order[-count:], order[:-count]
        ids = torch.zeros(len(batch), length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for line, number in enumerate(batch):  # padding on the right is never attended to
            ids[line, : len(rows[number])] = torch.tensor(rows[number])
            mask[line, : len(rows[number])] = 1
        ids, mask = ids.to(model.device), mask.to(model.device)
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for line, number in enumerate(batch):
                last = len(rows[number])
                losses[number] = torch.nn.functional.cross_entropy(
                    logits[line, : last - 1].float(), ids[line, 1:last], reduction="none"
                ).cpu().numpy()  # fmt: skip
        del logits
    return losses


def sample(texts: Iterable[str], count: int, *, seed: int = 0) -> list[str]:
    """At most ``count`` of the texts, drawn without replacement, in their order.

    Only the drawn texts are kept in memory (Vitter 1985, algorithm R).
    """
    draw, drawn = random.Random(seed), []
    for number, text in enumerate(texts):
        if number < count:
            drawn.append((number, text))
        elif (slot := draw.randrange(number + 1)) < count:
            drawn[slot] = (number, text)
    return [text for _, text in sorted(drawn)]


def title_of(text: str) -> str:
    """The first line of a document, shortened."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line if len(line) <= 90 else line[:89].rstrip() + "…"


def percent(share: float, unit: str = " %") -> str:
    """``-0.048`` as ``−4.8 %``, with a real minus sign."""
    return f"{100 * share:+.1f}".replace("-", "−") + unit


def conclusion(verdict: str, count: int, unit: str) -> str:
    """A verdict; one that is not significant names the number of documents or items."""
    return f"{verdict} with {count} {unit}" if verdict == NOT_SIGNIFICANT else verdict


def before_after(pair: tuple[float, float], digits: int) -> dict[str, float]:
    return {"before": round(pair[0], digits), "after": round(pair[1], digits)}
