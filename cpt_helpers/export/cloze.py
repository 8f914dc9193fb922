"""A cloze test on the facts of held-out documents: fill a gap with one of four options.

For API documentation, an item asks for the last part of a dotted name or for the name of an
argument. The description after the gap is scored too. For other text, an item asks for the last
word of a sentence. The wrong options occur in other held-out documents.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import DataError
from .evaluation import (
    NOT_SIGNIFICANT,
    Interval,
    before_after,
    bootstrap,
    conclusion,
    opening,
    title_of,
    token_losses,
)

CHOICES = 4
MIN_ITEMS = 10
API = "names and arguments of the API, each with its description"
WORDS = "last words of sentences"
_HEADING = re.compile(r"\A((?:\w+\.)+)(\w+)\n\s*\n(?=\S)")
_SECTION = re.compile(r"^( *)(?:Args|Arguments|Parameters|Attributes):[ \t]*\n", re.MULTILINE)
_ENTRY = re.compile(r"( +)(\*{0,2}[A-Za-z_]\w*)((?: \([^\n]*?\))?: *\S[^\n]*)\n?")
_SENTENCE_END = re.compile(r"(?<= )([A-Za-z]{4,})([.!?])(?=\s|\Z)")
_DESCRIPTION = 160  # characters of a description that are scored
_CONTEXT = 128  # the last tokens of a prompt, which the model sees


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        kind: ``"name"``, ``"argument"`` or ``"word"``.
        document: The number of the held-out document.
        title: The first line of that document.
        prompt: The text before the gap.
        options: The answers to choose from; the wrong ones are from other documents.
        right: The index of the right option.
        after: The text after the gap, the same for all options.
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
    """A test: its items and their form (:data:`API` or :data:`WORDS`)."""

    form: str
    items: tuple[Item, ...] = field(repr=False)

    @property
    def chance(self) -> float:
        """The expected accuracy of guessing."""
        return sum(1 / len(item.options) for item in self.items) / len(self.items)

    def accuracy(self, answers: Sequence[int]) -> float:
        """The share of items answered correctly."""
        pairs = zip(self.items, answers, strict=True)
        return sum(answer == item.right for item, answer in pairs) / len(self.items)

    def accuracy_interval(self, answers: Sequence[int]) -> tuple[float, float]:
        """The 95 % interval of one model's accuracy (Wilson 1927)."""
        from scipy.stats import binomtest

        right = round(self.accuracy(answers) * len(self.items))
        ends = binomtest(right, len(self.items)).proportion_ci(method="wilson")
        return float(ends.low), float(ends.high)


@dataclass(frozen=True)
class Outcome:
    """The answers of two models to the same items.

    Attributes:
        cloze: The test.
        before: The base model's option for each item.
        after: The trained model's.
        change: Of the accuracy. The bootstrap resamples documents, since the items of one
            document are alike.
    """

    cloze: Cloze
    before: tuple[int, ...] = field(repr=False)
    after: tuple[int, ...] = field(repr=False)
    change: Interval

    @property
    def accuracy(self) -> tuple[float, float]:
        """Before and after."""
        return self.cloze.accuracy(self.before), self.cloze.accuracy(self.after)

    @property
    def verdict(self) -> str:
        """``"better"``, ``"worse"`` or ``"not significant"``."""
        if self.change.low > 0:
            return "better"
        return "worse" if self.change.high < 0 else NOT_SIGNIFICANT

    @property
    def conclusion(self) -> str:
        """The verdict; one that is not significant names the number of items."""
        return conclusion(self.verdict, len(self.cloze.items), "items")

    @property
    def sentence(self) -> str:
        """The result in one sentence."""
        before, after = self.accuracy
        return (
            f"Cloze test: {before:.0%} → {after:.0%} of {len(self.cloze.items)} items correct "
            f"({self.cloze.chance:.0%} by guessing), {self.change.text(' points')}: "
            f"{self.conclusion}."
        )

    def as_dict(self) -> dict[str, Any]:
        """The values for a run's results."""
        answers = {"before": self.before, "after": self.after}
        interval = {when: self.cloze.accuracy_interval(answers[when]) for when in answers}
        return {
            "form": self.cloze.form,
            "items": len(self.cloze.items),
            "documents": len({item.document for item in self.cloze.items}),
            "chance": round(self.cloze.chance, 4),
            "accuracy": before_after(self.accuracy, 4),
            "interval": {when: [round(end, 4) for end in interval[when]] for when in interval},
            "change": round(self.change.estimate, 4),
            "change_interval": self.change.as_list(),
            "verdict": self.verdict,
        }


def make(texts: Sequence[str], *, most: int = 60, seed: int = 0) -> Cloze:
    """Makes a test from held-out documents; the same texts and seed give the same test.

    Args:
        texts: The held-out half of the domain's corpus, and nothing else.
        most: The maximum number of items.
        seed: Selects the facts and the order of the options.

    Raises:
        DataError: Fewer than ten items can be made.
    """
    for form, gaps_of in ((API, _api_gaps), (WORDS, _word_gaps)):
        gaps = [gap for number, text in enumerate(texts) for gap in gaps_of(number, text)]
        items = _items(gaps, texts, most, random.Random(seed))
        if len(items) >= MIN_ITEMS:
            return Cloze(form, tuple(items))
    raise DataError(
        f"{len(texts)} held-out documents give a cloze test of {len(items)} items only",
        expected=f"{MIN_ITEMS} items or more: API documentation with argument lists, or prose of "
        f"a few sentences, in at least {CHOICES} documents",
        do="hold out more documents, or evaluate without the test",
    )


def answer(model: Any, tokenizer: Any, cloze: Cloze) -> tuple[int, ...]:
    """A model's option for each item: the one with the highest mean log likelihood per token."""
    rows, lengths = [], []
    first = opening(tokenizer)
    for item in cloze.items:
        shared, options = tokens_of(tokenizer, item)
        for ids in options:
            rows.append([first, *ids[max(shared - _CONTEXT, 0) :]])
            lengths.append(len(ids) - shared)
    losses = iter(
        float(row[-length:].mean())
        for row, length in zip(token_losses(model, rows), lengths, strict=True)
    )
    answers = []
    for item in cloze.items:
        means = [next(losses) for _ in item.options]
        answers.append(means.index(min(means)))
    return tuple(answers)


def tokens_of(tokenizer: Any, item: Item) -> tuple[int, list[list[int]]]:
    """The number of leading tokens that all options share, and the tokens of each option's text.

    The prompt alone does not show where to cut. One token can hold the end of the prompt and the
    beginning of an option (``.name`` in the tokenizers of Llama 3 and Qwen).
    """
    texts = [f"{item.prompt}{option}{item.after}" for option in item.options]
    options = tokenizer(texts, add_special_tokens=False)["input_ids"]
    positions = enumerate(zip(*options, strict=False))
    differing = (position for position, ids in positions if len(set(ids)) > 1)
    return next(differing, min(map(len, options)) - 1), options


def compare(cloze: Cloze, before: Sequence[int], after: Sequence[int]) -> Outcome:
    """Compares the answers of two models, item by item."""
    gains: dict[int, list[int]] = {}
    for item, base, trained in zip(cloze.items, before, after, strict=True):
        gain = (trained == item.right) - (base == item.right)
        gains.setdefault(item.document, []).append(gain)
    sums = [sum(gain) for gain in gains.values()], [len(gain) for gain in gains.values()]
    change = bootstrap(sums, lambda gained, items: gained / items)
    return Outcome(cloze, tuple(before), tuple(after), change)


def _api_gaps(number: int, text: str) -> Iterator[Item]:
    """Items without wrong options: the name in the first line, and each documented argument."""
    heading = _HEADING.match(text)
    if heading:
        body = text[heading.end(2) :]
        after = body[: len(body) - len(body.lstrip())] + _shortened(body.lstrip().split("\n\n")[0])
        yield _gap("name", number, text, heading[1], heading[2], after)
    for section in _SECTION.finditer(text):
        position, indent = section.end(), None
        while position < len(text):
            end = text.find("\n", position) + 1 or len(text)
            line = text[position:end]
            depth = len(line) - len(line.lstrip())
            if line.strip() and depth <= len(section[1]):
                break
            entry = _ENTRY.fullmatch(line)
            indent = depth if indent is None else indent  # deeper lines continue a description
            if entry and depth == indent:
                before = text[: position + len(entry[1])]
                yield _gap("argument", number, text, before, entry[2], _shortened(entry[3]))
            position = end


def _word_gaps(number: int, text: str) -> Iterator[Item]:
    """Items without wrong options: the last word of each sentence."""
    for word in _SENTENCE_END.finditer(text):
        if len(text[: word.start()].split()) >= 8:
            yield _gap("word", number, text, text[: word.start()], word[1], word[2])


def _gap(kind: str, number: int, text: str, prompt: str, answer: str, after: str) -> Item:
    return Item(kind, number, title_of(text), prompt, (answer,), 0, after)


def _items(gaps: list[Item], texts: Sequence[str], most: int, rng: random.Random) -> list[Item]:
    """Items from as many documents as possible: each document gives one item per round."""
    by_document: dict[int, list[Item]] = {}
    for gap in gaps:
        if _plain(gap.answer) not in _plain(f"{gap.prompt}\n{gap.after}"):
            by_document.setdefault(gap.document, []).append(gap)
    for own in by_document.values():
        rng.shuffle(own)
    items: list[Item] = []
    while by_document and len(items) < most:
        for document in rng.sample(sorted(by_document), len(by_document)):
            item = _with_options(by_document[document].pop(), gaps, texts, rng)
            if not by_document[document]:
                del by_document[document]
            if item and len(items) < most:
                items.append(item)
    return sorted(items, key=lambda item: item.document)


def _with_options(
    gap: Item, gaps: list[Item], texts: Sequence[str], rng: random.Random
) -> Item | None:
    """The item with wrong options of the same kind and similar length from other documents."""
    plain = _plain(texts[gap.document])
    others = [g for g in gaps if g.kind == gap.kind and g.document != gap.document]
    wrong = sorted({other.answer for other in others if _plain(other.answer) not in plain})
    rng.shuffle(wrong)
    wrong.sort(key=lambda other: abs(len(other) - len(gap.answer)))
    near = wrong[: 2 * (CHOICES - 1)]  # not always the same neighbours
    if len(near) < CHOICES - 1:
        return None
    options = [gap.answer, *rng.sample(near, CHOICES - 1)]
    rng.shuffle(options)
    return replace(gap, options=tuple(options), right=options.index(gap.answer))


def _plain(text: str) -> str:
    """Without case and underscores, since ``ax_search`` reveals ``AxSearch``."""
    return text.replace("_", "").lower()


def _shortened(text: str) -> str:
    """A description, cut at a whole word."""
    if len(text) <= _DESCRIPTION:
        return text.rstrip()
    return text[:_DESCRIPTION].rsplit(None, 1)[0]
