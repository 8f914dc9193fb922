"""A cloze test over the domain's own facts, made of documents no training has seen.

Where the documents are API documentation, an item asks for the last part of a dotted name, or for
an argument's name; the description that follows it is scored along, so that it counts. Elsewhere
an item asks for the last word of a sentence. The wrong options stand in other held-out documents.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import DataError
from .evaluation import bootstrap, opening, percent, title_of, token_losses

CHOICES = 4
FEWEST = 10
API = "names and arguments of the API, each with its description"
WORDS = "last words of sentences"
_HEADING = re.compile(r"\A((?:\w+\.)+)(\w+)\n\s*\n(?=\S)")
_SECTION = re.compile(r"^( *)(?:Args|Arguments|Parameters|Attributes):[ \t]*\n", re.MULTILINE)
_ENTRY = re.compile(r"( +)(\*{0,2}[A-Za-z_]\w*)((?: \([^\n]*?\))?: *\S[^\n]*)\n?")
_SENTENCE_END = re.compile(r"(?<= )([A-Za-z]{4,})([.!?])(?=\s|\Z)")
_DESCRIPTION = 160  # characters of a description that are scored


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        kind: ``"name"``, ``"argument"`` or ``"word"``.
        document: The number of the held-out document it is of.
        title: That document's first line.
        prompt: What stands before the gap.
        options: What may stand in it; the wrong ones are of other documents.
        right: Which of them does.
        after: What follows the gap, the same for all options.
    """

    kind: str
    document: int
    title: str
    prompt: str = field(repr=False)
    options: tuple[str, ...]
    right: int
    after: str

    @property
    def answer(self) -> str:
        return self.options[self.right]


@dataclass(frozen=True)
class Cloze:
    """A test: its items, and which form they have (:data:`API` or :data:`WORDS`)."""

    form: str
    items: tuple[Item, ...] = field(repr=False)

    @property
    def chance(self) -> float:
        """What guessing comes to."""
        return sum(1 / len(item.options) for item in self.items) / len(self.items)


@dataclass(frozen=True)
class Outcome:
    """The same items before and after.

    Attributes:
        cloze: The test.
        before: The option the base model took, by item.
        after: The option the trained one took.
        low: Lower end of the 95 % interval of the change in accuracy, by a bootstrap over
            documents, as items of one document are alike.
        high: Upper end.
    """

    cloze: Cloze
    before: tuple[int, ...] = field(repr=False)
    after: tuple[int, ...] = field(repr=False)
    low: float
    high: float

    def accuracy(self, picks: Sequence[int]) -> float:
        """The share of items in which the right option was taken."""
        return accuracy(self.cloze, picks)

    @property
    def change(self) -> float:
        return self.accuracy(self.after) - self.accuracy(self.before)

    @property
    def verdict(self) -> str:
        """``"better"``, ``"worse"`` or ``"cannot be told"``."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "cannot be told"

    @property
    def sentence(self) -> str:
        """What a reader should take home, in one sentence."""
        said = self.verdict
        if said == "cannot be told":
            said += f" from {len(self.cloze.items)} items"
        return (
            f"Cloze: {self.accuracy(self.before):.0%} → {self.accuracy(self.after):.0%} of "
            f"{len(self.cloze.items)} items right, {points(self.change)} (95 % interval "
            f"{percent(self.low, sign='')} to {points(self.high)}; guessing comes to "
            f"{self.cloze.chance:.0%}): {said}."
        )

    def as_dict(self) -> dict[str, Any]:
        """What to keep of it in a run's results."""
        return {
            "form": self.cloze.form,
            "items": len(self.cloze.items),
            "documents": len({item.document for item in self.cloze.items}),
            "chance": round(self.cloze.chance, 4),
            "accuracy": {
                "before": round(self.accuracy(self.before), 4),
                "after": round(self.accuracy(self.after), 4),
            },
            "interval": {
                when: [round(end, 4) for end in wilson(self.cloze, picks)]
                for when, picks in (("before", self.before), ("after", self.after))
            },
            "change": round(self.change, 4),
            "change_interval": [round(self.low, 4), round(self.high, 4)],
            "verdict": self.verdict,
        }


def make(texts: Sequence[str], *, most: int = 60, seed: int = 0) -> Cloze:
    """Makes a test of held-out documents; the same texts and seed give the same test.

    Args:
        texts: The held-out half of the domain's corpus, and nothing else.
        most: Items at most.
        seed: Decides which facts are asked, and the order of the options.

    Raises:
        DataError: Fewer than ten items can be made.
    """
    for form, facts in ((API, _api_facts), (WORDS, _word_facts)):
        found = [fact for number, text in enumerate(texts) for fact in facts(number, text)]
        items = _items(found, texts, most, random.Random(seed))
        if len(items) >= FEWEST:
            return Cloze(form, tuple(items))
    raise DataError(
        f"a cloze test of {len(items)} items can be made of {len(texts)} held-out documents",
        expected=f"{FEWEST} or more: API documentation with argument lists, or prose of a few "
        f"sentences, in at least {CHOICES} documents",
        do="hold out more documents, or do without the test",
    )


def answer(model: Any, tokenizer: Any, cloze: Cloze, *, context: int = 128) -> tuple[int, ...]:
    """The option a model takes in each item: that with the highest mean log likelihood a token.

    Args:
        model: In plain transformers.
        tokenizer: The model's.
        cloze: From :func:`make`.
        context: Tokens of the prompt, its last ones, that the model sees.
    """
    rows, lengths = [], []
    first = opening(tokenizer)
    for item in cloze.items:
        shared, options = tokens_of(tokenizer, item)
        for ids in options:
            rows.append([first, *ids[max(shared - context, 0) :]])
            lengths.append(len(ids) - shared)
    losses = iter(
        float(all_[-length:].mean())
        for all_, length in zip(token_losses(model, rows), lengths, strict=True)
    )
    picks = []
    for item in cloze.items:
        means = [next(losses) for _ in item.options]
        picks.append(means.index(min(means)))
    return tuple(picks)


def tokens_of(tokenizer: Any, item: Item) -> tuple[int, list[list[int]]]:
    """How many first tokens an item's options share, and each option's text in tokens.

    The prompt alone does not tell where to cut: a token may hold its end and an option's beginning
    (``.name`` in Llama 3's and Qwen's tokenizers). What all options share cannot tell them apart.

    Args:
        tokenizer: The model's.
        item: One question.
    """
    texts = [f"{item.prompt}{option}{item.after}" for option in item.options]
    options = tokenizer(texts, add_special_tokens=False)["input_ids"]
    places = enumerate(zip(*options, strict=False))
    differing = (place for place, ids in places if len(set(ids)) > 1)
    return next(differing, min(map(len, options)) - 1), options


def compare(cloze: Cloze, before: Sequence[int], after: Sequence[int], *, seed: int = 0) -> Outcome:
    """Holds the answers of two models against each other, item by item."""
    import numpy as np

    documents = sorted({item.document for item in cloze.items})
    place = {document: number for number, document in enumerate(documents)}
    moved, counts = np.zeros(len(documents)), np.zeros(len(documents))
    for item, theirs, ours in zip(cloze.items, before, after, strict=True):
        moved[place[item.document]] += (ours == item.right) - (theirs == item.right)
        counts[place[item.document]] += 1
    low, high = bootstrap(
        lambda drawn: float(moved[drawn].sum() / counts[drawn].sum()), len(documents), seed=seed
    )
    return Outcome(cloze, tuple(before), tuple(after), low, high)


def accuracy(cloze: Cloze, picks: Sequence[int]) -> float:
    """The share of items in which the right option was taken."""
    right = sum(pick == item.right for item, pick in zip(cloze.items, picks, strict=True))
    return right / len(cloze.items)


def wilson(cloze: Cloze, picks: Sequence[int]) -> tuple[float, float]:
    """The 95 % interval of one model's accuracy (Wilson 1927)."""
    n, p, z = len(cloze.items), accuracy(cloze, picks), 1.96
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def points(change: float) -> str:
    """``0.05`` as ``+5.0 points``."""
    return percent(change, sign=" points")


@dataclass(frozen=True)
class _Fact:
    """What an item is made of: a gap in a document, before wrong options are looked for."""

    kind: str
    document: int
    prompt: str
    answer: str
    after: str


def _api_facts(number: int, text: str) -> Iterator[_Fact]:
    heading = _HEADING.match(text)
    if heading:
        body = text[heading.end(2) :]
        after = body[: len(body) - len(body.lstrip())] + _shortened(body.lstrip().split("\n\n")[0])
        yield _Fact("name", number, heading[1], heading[2], after)
    for section in _SECTION.finditer(text):
        place, own = section.end(), None
        while place < len(text):
            end = text.find("\n", place) + 1 or len(text)
            line = text[place:end]
            depth = len(line) - len(line.lstrip())
            if line.strip() and depth <= len(section[1]):
                break
            entry = _ENTRY.fullmatch(line)
            own = depth if own is None else own  # what lies deeper is part of a description
            if entry and depth == own:
                before = text[: place + len(entry[1])]
                yield _Fact("argument", number, before, entry[2], _shortened(entry[3]))
            place = end


def _word_facts(number: int, text: str) -> Iterator[_Fact]:
    for word in _SENTENCE_END.finditer(text):
        if len(text[: word.start()].split()) >= 8:
            yield _Fact("word", number, text[: word.start()], word[1], word[2])


def _items(facts: list[_Fact], texts: Sequence[str], most: int, rng: random.Random) -> list[Item]:
    """Items of as many documents as possible, in turns, so that no long one has them all."""
    turns: dict[int, list[_Fact]] = {}
    for fact in facts:
        if _plain(fact.answer) not in _plain(f"{fact.prompt}\n{fact.after}"):
            turns.setdefault(fact.document, []).append(fact)
    for own in turns.values():
        rng.shuffle(own)
    items: list[Item] = []
    while turns and len(items) < most:
        for document in rng.sample(sorted(turns), len(turns)):
            item = _item(turns[document].pop(), facts, texts, rng)
            if not turns[document]:
                del turns[document]
            if item and len(items) < most:
                items.append(item)
    return sorted(items, key=lambda item: item.document)


def _item(fact: _Fact, facts: list[_Fact], texts: Sequence[str], rng: random.Random) -> Item | None:
    """A fact with wrong options of the same kind and nearly its length, out of other documents."""
    plain = _plain(texts[fact.document])
    others = {
        other.answer
        for other in facts
        if other.kind == fact.kind
        and other.document != fact.document
        and _plain(other.answer) not in plain
    }
    wrong = sorted(others)
    rng.shuffle(wrong)
    wrong.sort(key=lambda other: abs(len(other) - len(fact.answer)))
    near = wrong[: 2 * (CHOICES - 1)]  # not always the same neighbours
    if len(near) < CHOICES - 1:
        return None
    options = [fact.answer, *rng.sample(near, CHOICES - 1)]
    rng.shuffle(options)
    title = title_of(texts[fact.document])
    right = options.index(fact.answer)
    return Item(fact.kind, fact.document, title, fact.prompt, tuple(options), right, fact.after)


def _plain(text: str) -> str:
    """Without case and underscores: ``ax_search`` gives ``AxSearch`` away."""
    return text.replace("_", "").lower()


def _shortened(text: str) -> str:
    """A description up to a whole word."""
    if len(text) <= _DESCRIPTION:
        return text.rstrip()
    return text[:_DESCRIPTION].rsplit(None, 1)[0]
