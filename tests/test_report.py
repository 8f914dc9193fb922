"""Losses of documents, their intervals, the cloze test and the evaluation report."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml
from conftest import write_jsonl

from cpt_helpers import plots
from cpt_helpers.data.corpora import Corpus
from cpt_helpers.errors import DataError
from cpt_helpers.export import cloze, evaluation, report
from cpt_helpers.export.cloze import Cloze, Item
from cpt_helpers.run import Run
from cpt_helpers.setup import models

BLOCK = 96
PROSE = (
    "The {a} committee met on a rainy morning and spoke at length about the price of {b}. "
    "Nobody had foreseen that the harbour would be closed for so many {c}. "
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Several threads slow down computations on tiny tensors."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tiny_gemma3: Path) -> tuple:
    return models.load(tiny_gemma3, dtype="float32")


@pytest.fixture(scope="module")
def held_out(documents: list[str]) -> list[str]:
    """Documents with argument lists, for the cloze test."""
    return [text for text in documents if "Args:" in text and len(text) < 1500][:14]


@pytest.fixture(scope="module")
def taught(tiny_gemma3: Path, held_out: list[str], tmp_path_factory) -> Path:
    """The tiny model, trained until it reproduces these documents."""
    import torch

    model, tokenizer = models.load(tiny_gemma3, dtype="float32")
    rows = []
    for text in held_out:
        ids = [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        rows += [ids[start : start + 160] for start in range(0, len(ids) - 1, 80)]
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for line, row in enumerate(rows):
        ids[line, : len(row)] = labels[line, : len(row)] = torch.tensor(row)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    torch.manual_seed(0)
    for _ in range(120):
        batch = torch.randperm(len(rows))[:16]
        model(input_ids=ids[batch], labels=labels[batch]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("taught")
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_document_losses_equal_those_of_transformers(tiny: tuple, documents: list[str]) -> None:
    import torch

    model, tokenizer = tiny
    texts = [documents[3][:150], "é", documents[4][:60]]
    losses = evaluation.document_losses(model, tokenizer, texts, 512)
    for text, found in zip(texts, losses.itertuples(), strict=True):
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[tokenizer.eos_token_id, *own]])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss.item()
        assert found.tokens == len(own)
        assert found.nats == pytest.approx(loss * found.tokens, rel=1e-5)
        assert found.bytes == len(text.encode())
        bits = evaluation.bits_of(losses[losses.title == found.title])
        assert bits == pytest.approx(found.nats / math.log(2) / len(text.encode()))
    assert list(losses.title) == [text.splitlines()[0] for text in texts]


def test_long_documents_are_cut_and_each_token_counts_once(tiny: tuple, documents) -> None:
    model, tokenizer = tiny
    text = max(documents, key=len)[:1200]
    (whole,) = evaluation.document_losses(model, tokenizer, [text], 512).itertuples()
    (cut,) = evaluation.document_losses(model, tokenizer, [text], 32).itertuples()
    assert whole.tokens == cut.tokens == len(tokenizer(text)["input_ids"]) > 100
    ids = [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    pieces = [ids[start : start + 32] for start in range(0, len(ids) - 1, 31)]
    by_hand = sum(float(row.sum()) for row in evaluation.token_losses(model, pieces))
    assert cut.nats == pytest.approx(by_hand, rel=1e-6) != whole.nats


def test_batched_losses_equal_single_losses(tiny: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny
    draw = random.Random(1)
    rows = [[draw.randrange(512) for _ in range(length)] for length in (2, 40, 7, 90, 41, 3)]
    together = evaluation.token_losses(model, rows)
    monkeypatch.setattr(evaluation, "_LOGITS", 1)
    for row, one, alone in zip(rows, together, evaluation.token_losses(model, rows), strict=True):
        assert len(one) == len(row) - 1
        assert one == pytest.approx(alone, abs=1e-4)


def losses_of(rows: list[tuple[str, float, int, int]]) -> pd.DataFrame:
    """Losses of documents: title, nats, tokens, bytes."""
    return pd.DataFrame(rows, columns=["title", "nats", "tokens", "bytes"])


def test_perplexity_and_bits_per_byte_by_hand() -> None:
    two = losses_of([("a", 6.0, 2, 10), ("b", 3.0, 1, 20)])
    assert evaluation.perplexity_of(two) == pytest.approx(math.exp(3))
    assert evaluation.bits_of(two) == pytest.approx(9 / math.log(2) / 30)
    found = evaluation.compare("c", two, losses_of([("a", 4.0, 2, 10), ("b", 2.0, 1, 20)]))
    assert found.perplexity == pytest.approx((math.exp(3), math.exp(2)))
    assert found.bits_per_byte == pytest.approx((9 / math.log(2) / 30, 6 / math.log(2) / 30))
    assert found.change.estimate == pytest.approx(math.exp(-1) - 1)


def test_empty_documents_are_refused(tiny: tuple) -> None:
    for texts in ([], ["text", ""]):
        with pytest.raises(DataError, match="nothing to measure"):
            evaluation.document_losses(*tiny, texts, 64)


def synthetic(change: float, documents: int, spread: float = 0.1, role: str = "general"):
    """Compares documents whose loss per token changes by ``change`` with some spread."""
    draw = random.Random(7)
    sizes = [draw.randrange(50, 300) for _ in range(documents)]
    before = [(f"d{i}", 3.0 * n, n, 4 * n) for i, n in enumerate(sizes)]
    after = [
        (f"d{i}", (3.0 + change + draw.gauss(0, spread)) * n, n, 4 * n) for i, n in enumerate(sizes)
    ]
    return evaluation.compare("c", losses_of(before), losses_of(after), role=role)


def test_the_interval_covers_the_known_change() -> None:
    found = synthetic(-0.2, 60).change
    assert found.low < math.exp(-0.2) - 1 < found.high
    assert 0.02 < found.high - found.low < 0.08, "60 documents, 0.1 nats apart"
    again = synthetic(-0.2, 60).change
    assert (again.low, again.high) == (found.low, found.high)
    wider = synthetic(-0.2, 12).change
    assert wider.high - wider.low > 1.3 * (found.high - found.low)


@pytest.mark.parametrize(
    ("role", "change", "documents", "spread", "verdict"),
    [
        ("general", -0.05, 60, 0.05, "kept"),
        ("general", 0.0, 60, 0.02, "kept"),
        ("general", 0.2, 60, 0.1, "worse"),
        ("general", 0.03, 20, 0.2, "not significant with 20 documents"),
        ("general", 0.2, 4, 0.0, "not significant with 4 documents"),
        ("domain", -0.2, 40, 0.1, "better"),
        ("domain", 0.0, 40, 0.1, "not significant with 40 documents"),
        ("domain", 0.2, 40, 0.1, "worse"),
    ],
)
def test_the_sentence_gives_the_verdict(role, change, documents, spread, verdict) -> None:
    found = synthetic(change, documents, spread, role)
    assert found.sentence.endswith(f": {verdict}.")
    assert f"perplexity 20.1 → {found.perplexity[1]:.1f}, " in found.sentence
    assert found.sentence.startswith(role.capitalize())
    assert found.as_dict()["interval"] == [
        round(found.change.low, 4),
        round(found.change.high, 4),
    ]


def test_the_sentence_has_real_minuses() -> None:
    before, after = (losses_of([("d", nats, 1, 1)] * 26) for nats in (3.414, 3.364))
    found = replace(
        evaluation.compare("n", before, after, role="general"),
        change=evaluation.Interval(-0.048, -0.061, -0.034),
    )
    assert found.verdict == "kept"
    assert found.sentence == (
        "General text: perplexity 30.4 → 28.9, −4.8 % (95 % interval −6.1 to −3.4 %): kept."
    )


def test_the_documents_that_improved_and_worsened_most() -> None:
    before = losses_of([(name, 10.0, 5, 10) for name in "abcdefgh"])
    changes = [-3, 2, 0, -1, 5, -4, 0, 1]
    after = before.assign(nats=before.nats + changes)
    found = evaluation.compare("c", before, after)
    assert list(found.most_improved(3).title) == ["f", "a", "d"]
    assert list(found.most_worsened(3).title) == ["e", "b", "h"]
    with pytest.raises(DataError, match="not the same documents"):
        evaluation.compare("c", before, after[1:])


def test_samples_are_uniform_and_ordered() -> None:
    texts = [f"{number:03d}" for number in range(50)]
    drawn = evaluation.sample(iter(texts), 10, seed=3)
    assert drawn == sorted(drawn) == evaluation.sample(texts, 10, seed=3)
    assert len(set(drawn)) == 10 and evaluation.sample(texts, 60) == texts
    counts = [text for seed in range(400) for text in evaluation.sample(texts, 10, seed=seed)]
    assert all(50 < counts.count(text) < 115 for text in texts), "80 are due to each"


def test_items_come_from_held_out_documents_only(held_out: list[str]) -> None:
    test = cloze.make(held_out, most=30, seed=1)
    assert test.form == cloze.API and 10 <= len(test.items) <= 30
    assert test.chance == 0.25
    for item in test.items:
        text = held_out[item.document]
        assert text.startswith(item.prompt) and f"{item.prompt}{item.answer}{item.after}" in text
        shown = f"{item.prompt}\n{item.after}".replace("_", "").lower()
        assert item.answer.replace("_", "").lower() not in shown
        wrong = set(item.options) - {item.answer}
        assert len(wrong) == 3
        elsewhere = [other for other in held_out if other != text]
        for option in wrong:
            assert option not in text and any(option in other for other in elsewhere)
    assert cloze.make(held_out, most=30, seed=1) == test != cloze.make(held_out, most=30, seed=2)
    places = {item.right for item in test.items}
    assert len(places) == 4, "the right option is always at the same position"


def test_prose_gives_items_for_last_words() -> None:
    words = ["silver", "copper", "timber", "cotton", "barley", "coffee"]
    times = ["months", "seasons", "winters", "decades", "quarters", "mornings"]
    texts = [
        PROSE.format(a=f"number {i}", b=b, c=c)
        for i, (b, c) in enumerate(zip(words, times, strict=True))
    ]
    test = cloze.make(texts)
    assert test.form == cloze.WORDS and len(test.items) == 12
    assert {item.answer for item in test.items} == {*words, *times}


def test_too_few_items_are_refused() -> None:
    with pytest.raises(DataError, match="2 held-out documents give a cloze test of 0 items only"):
        cloze.make(["Short.", "Shorter."])


def test_a_trained_model_scores_higher(tiny: tuple, taught: Path, held_out) -> None:
    test = cloze.make(held_out, most=60)
    before = cloze.answer(*tiny, test)
    after = cloze.answer(*models.load(taught, dtype="float32"), test)
    found = cloze.compare(test, before, after)
    low, high = test.accuracy_interval(before)
    assert low <= 0.25 <= high, "a random model guesses"
    assert found.accuracy[1] > high and found.change.low > 0
    assert "correct (25% by guessing), +" in found.sentence
    assert found.sentence.endswith("points): better.")
    same = cloze.compare(test, before, before)
    assert same.change == evaluation.Interval(0, 0, 0)
    assert same.conclusion == f"not significant with {len(test.items)} items"


def test_wilson_interval_by_hand() -> None:
    item = Item("word", 0, "t", "p ", ("a", "b"), 0, ".")
    ten = Cloze(cloze.WORDS, (item,) * 10)
    assert ten.accuracy_interval([0] * 5 + [1] * 5) == pytest.approx((0.2366, 0.7634), abs=1e-3)
    assert ten.accuracy_interval([0] * 10)[1] == pytest.approx(1.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory, held_out: list[str], tiny_gemma3: Path, taught: Path) -> Run:
    """The folder of a trained run with three corpora; some texts contain HTML."""
    run = Run.open("told", tmp_path_factory.mktemp("report"))
    evil = "<script>alert(1)</script> & <img src=http://example.org/x.png>"
    corpora = {
        "handbook": [f"{evil}\n\n{held_out[0]}", *held_out[1:]],
        "news": [f"{evil} {number} " + PROSE * 2 for number in range(9)],
        "reviews": ["A film of some length. " * 4, "Another film. " * 5],
    }
    for name, texts in corpora.items():
        folder = run.storage / "corpora" / name
        write_jsonl(folder / "heldout.jsonl", texts)
        fields = dict.fromkeys(Corpus.__dataclass_fields__, 0) | {
            "name": name,
            "folder": "",
        }
        (folder / "corpus.json").write_text(json.dumps(fields))
    run.config_dir.mkdir(parents=True)
    run.logs.mkdir()
    args = {
        "model_name_or_path": str(tiny_gemma3),
        "dataset": "handbook",
        "eval_dataset": "handbook_heldout,news_heldout",
        "dataset_dir": str(run.storage),
        "output_dir": str(run.output),
        "cutoff_len": BLOCK,
        "hf_hub_token": "canary-of-a-token",
    }
    run.train_yaml.write_text(yaml.safe_dump(dict(args)))
    run.record("01_setup", {"versions": {"torch": "9.8.7"}})
    run.record("03_config", {"config": {"recipe": "cpt_cpu.yaml"}})
    (run.logs / "launched.json").write_text(json.dumps({"launched": [1000.0]}))
    run.metrics.write_text("".join(json.dumps(event) + "\n" for event in events()))
    run.output.symlink_to(taught)
    return run


def events() -> list[dict]:
    losses = {"handbook_heldout": (3.2, 2.9), "news_heldout": (3.4, 3.3)}
    found = [{"event": "start", "step": 0, "time": 1030.0, "max_steps": 4, "world_size": 2,
              "tokens_per_step": 1024, "parameters": {"all": 900, "trained": 777}}]  # fmt: skip
    for when, (step, at) in enumerate(((0, 1040.0), (4, 1090.0))):
        found += [
            {"event": "eval", "step": step, "time": at, "dataset": name, "loss": pair[when],
             "seconds": 5.0}
            for name, pair in losses.items()
        ]  # fmt: skip
    steps = [
        {"event": "step", "step": step, "time": 1040.0 + 10 * step, "loss": 3.5 - step / 10,
         "seconds": 10.0, "tokens_per_second": 102.4, "mfu": 0.5 + step / 100,
         "memory": 2**30 * step}
        for step in range(1, 5)
    ]  # fmt: skip
    end = {"event": "end", "step": 4, "time": 1100.0, "memory": [5 * 2**30, 2**30]}
    return [*found[:3], *steps, *found[3:], end]


@pytest.fixture(scope="module")
def measured(run: Run) -> report.Evaluation:
    return report.evaluate(run, others=["reviews"], items=20)


class Page(HTMLParser):
    """The loaded resources, unclosed tags and text of a page."""

    VOID = ("meta", "img", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.loads, self.open, self.text = set(), [], [], ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.add(tag)
        self.loads += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        self.text += text


def test_the_report(run: Run, measured: report.Evaluation, tiny_gemma3: Path) -> None:
    path = report.write(run, measured)
    assert path == run.folder / "report.html"
    source = path.read_text("utf-8")
    page = Page(source)
    assert not page.open, "a tag is not closed"
    assert len(page.loads) == 2
    assert all(load.startswith("data:image/png;base64,") for load in page.loads)
    assert not {"script", "link", "iframe", "object"} & page.tags
    assert "url(" not in source and "@import" not in source
    assert "<script>alert(1)" in page.text, "a document's own text is shown as text"
    text = " ".join(page.text.split())
    for sentence in measured.sentences:
        assert sentence in text
    for comparison in measured.comparisons:
        assert f"{comparison.perplexity[1]:.2f}" in text
        assert f"{comparison.bits_per_byte[1]:.3f}" in text
    for fact in ("4,096 in 4 steps", "777", "102.4 tokens/s", "52%", "5.00 GiB", "torch 9.8.7"):
        assert fact in text, fact
    for fact in (
        "1970-01-01 00:18 UTC",
        "cpt_cpu.yaml",
        "tiny-gemma3",
        "start-up",
        "30 s",
        "reviews",
        "not significant with 2 documents",
    ):
        assert fact in text, fact
    assert str(run.storage) not in source and str(tiny_gemma3.parent) not in source
    assert "canary" not in source
    assert not list(run.folder.glob(".report*"))


def test_the_evaluation_as_results(run: Run, measured: report.Evaluation) -> None:
    found = json.loads(json.dumps(measured.as_dict()))
    assert list(found["corpora"]) == ["domain", "general", "reviews"]
    assert found["corpora"]["domain"]["verdict"] == "better"
    assert found["corpora"]["reviews"]["verdict"] == "not significant"
    assert found["cloze"]["items"] == 20 and found["cloze"]["verdict"] == "better"
    (_, before, after), *_ = measured.continuations
    assert before != after
    assert report.evaluate(run, others=["reviews"], items=20).as_dict() == found | {
        "seconds": pytest.approx(found["seconds"], abs=60)
    }


def test_a_report_without_a_cloze_test_or_events(run: Run, measured, tmp_path: Path) -> None:
    bare = Run.open("bare", tmp_path)
    bare.config_dir.mkdir(parents=True)
    bare.train_yaml.write_text(run.train_yaml.read_text())
    less = replace(measured, outcome=None, no_cloze="0 items", continuations=report.Continuations())
    page = Page(report.write(bare, less).read_text("utf-8"))
    assert "None: 0 items." in page.text and len(page.loads) == 1
    assert "Costs" not in page.text


def test_beginning_keeps_line_breaks() -> None:
    assert report.beginning("a.b\n\nOne two three", 3) == "a.b\n\nOne two"
    assert report.beginning("one", 3) == "one"


def test_costs_of_events_without_memory_and_mfu(tmp_path: Path) -> None:
    """Older runs do not record memory and MFU."""
    kept = [{k: v for k, v in e.items() if k not in ("memory", "mfu")} for e in events()]
    found = plots.costs(SimpleNamespace(events=lambda: kept))
    assert found["tokens"] == 4096 and not {"mfu", "peak_memory"} & set(found)
    assert plots.costs(SimpleNamespace(events=list)) == {}
