"""Duplicates, contamination, filters; mixing, packing, tokenising once; the registry."""

from __future__ import annotations

import json
import multiprocessing
import random
from pathlib import Path

import pytest
from bpe import forcing_bos
from conftest import write_jsonl

from cpt_helpers.data import corpora, duplicates, ingest, mixing, packing
from cpt_helpers.data.cleaning import Cleaning, failed_filter, is_held_out, shingles
from cpt_helpers.errors import DataError, ParameterError
from cpt_helpers.recipes import Recipe
from cpt_helpers.setup import assets


def near(text: str, rng: random.Random, share: float = 0.02) -> str:
    """A copy with some words replaced."""
    words = text.split(" ")
    for at in rng.sample(range(len(words)), max(int(len(words) * share), 1)):
        words[at] = "replaced"
    return " ".join(words)


@pytest.fixture(scope="module")
def planted(documents: list[str], tmp_path_factory) -> tuple[Path, dict[str, set[str]]]:
    rng = random.Random(7)
    long = list(dict.fromkeys(d for d in documents if len(d.split()) > 120))[:150]
    copies = {near(d, rng) for d in long[:60]}
    copies = {
        c
        for c in copies
        if max(len(shingles(c) & shingles(d)) / len(shingles(c) | shingles(d)) for d in long[:60])
        >= 0.8
    }
    exact = long[60:100]
    everything = long + sorted(copies) + exact
    path = tmp_path_factory.mktemp("planted") / "planted.jsonl"
    write_jsonl(path, everything)
    return path, {"clean": set(long), "near": copies, "exact": set(exact)}


def test_planted_duplicates_are_found_and_others_are_kept(planted, tmp_path: Path) -> None:
    path, known = planted
    found = corpora.prepare(str(path), tmp_path, fraction=0.2)
    kept = [*corpora.texts_of(found.train), *corpora.texts_of(found.heldout)]
    assert len(kept) == len(set(kept)), "an exact duplicate was kept"
    both = [
        n for n in known["near"] if n in kept and any(alike(n, k) >= 0.8 for k in kept if k != n)
    ]
    assert len(both) <= 0.05 * len(known["near"])
    assert len(known["near"]) >= 40


def test_no_near_duplicate_of_a_held_out_document_is_trained_on(documents, tmp_path: Path) -> None:
    """Groups of five near duplicates, in any order."""
    rng = random.Random(3)
    long = list(dict.fromkeys(d for d in documents if len(d.split()) > 150))[:25]
    family = [near(d, rng, 0.004) for d in long for _ in range(5)]
    rng.shuffle(family)
    path = tmp_path / "family.jsonl"
    write_jsonl(path, family)
    found = corpora.prepare(str(path), tmp_path, fraction=0.3)
    held, trained = list(corpora.texts_of(found.heldout)), list(corpora.texts_of(found.train))
    assert held and trained
    assert not [1 for h in held for t in trained if alike(t, h) >= 0.8]


def alike(one: str, other: str) -> float:
    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b)


def test_contamination_drops_the_training_document(planted, tmp_path: Path) -> None:
    """Of near duplicates across the halves, the held-out document is kept."""
    path, _ = planted
    dirty = corpora.prepare(
        str(path), tmp_path / "a", fraction=0.3, cleaning=Cleaning(False, 0, False)
    )
    crossed = [
        (t, h)
        for h in corpora.texts_of(dirty.heldout)
        for t in corpora.texts_of(dirty.train)
        if alike(t, h) >= 0.8
    ]
    assert len(crossed) > 5, "no pair was planted across the halves"
    only = Cleaning(exact=False, near=0, contamination=True)
    clean = corpora.prepare(str(path), tmp_path / "b", fraction=0.3, cleaning=only)
    held, trained = list(corpora.texts_of(clean.heldout)), list(corpora.texts_of(clean.train))
    assert {h for _, h in crossed} <= set(held)
    assert not [1 for h in held for t in trained if alike(t, h) >= 0.8]
    reasons = set(clean.dropped)
    assert reasons == {"a near duplicate of a held-out document"}
    lines = [json.loads(x) for x in (clean.folder / "dropped.jsonl").read_text().splitlines()]
    assert len(lines) == sum(clean.dropped.values()) and all("like" in x for x in lines)


@pytest.mark.parametrize("cleaning", [Cleaning(), Cleaning(exact=False, near=0)])
def test_every_held_out_document_of_a_large_bucket_is_compared(
    cleaning: Cleaning, tmp_path: Path
) -> None:
    """600 texts share a long passage and are not similar; 40 more are similar to a held-out text.

    Such a pair shares most of its buckets with a hundred held-out texts, through the passage.
    """
    passage = [f"p{i}" for i in range(86)]
    own = [[f"d{n}x{i}" for i in range(16)] for n in range(600)]
    texts = [" ".join(passage + words) for words in own]
    held = [n for n, text in enumerate(texts) if is_held_out(text, 0.5)]
    copies = []
    for n in held[:80]:  # two of the held-out text's own words make 0.754 of 0.724
        copy = " ".join([*passage, *own[n][:2], *(f"c{n}x{i}" for i in range(14))])
        if not is_held_out(copy, 0.5):
            copies.append((copy, texts[n]))
    assert len(copies) >= 30 and all(0.75 <= alike(*pair) < 0.76 for pair in copies)
    assert alike(texts[0], texts[1]) < 0.73
    path = tmp_path / "c.jsonl"
    write_jsonl(path, texts + [copy for copy, _ in copies])
    found = corpora.prepare(str(path), tmp_path, fraction=0.5, cleaning=cleaning)
    left = set(corpora.texts_of(found.train)) & {copy for copy, _ in copies}
    assert len(left) <= 0.05 * len(copies)  # MinHash itself misses 2 %
    assert set(texts) <= {*corpora.texts_of(found.train), *corpora.texts_of(found.heldout)}


def test_more_held_out_documents_than_are_indexed_at_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(duplicates, "_INDEXED", 7)
    test_every_held_out_document_of_a_large_bucket_is_compared(Cleaning(near=0), tmp_path)


def test_every_quality_filter() -> None:
    prose = "The wind and the sun had a quarrel about who was the stronger of the two. " * 1
    prose += " ".join(
        f"They came to {w} with it and that was to be seen by all." for w in "abcdefgh"
    )
    assert failed_filter(prose, Cleaning(quality=True)) == ""
    assert "shorter than 2,000" in failed_filter(prose, Cleaning(min_characters=2000))
    assert "longer than 10" in failed_filter(prose, Cleaning(max_characters=10))
    assert failed_filter("x", Cleaning()) == ""
    for text, reason in [
        ("too short", "fewer than 50"),
        ("a b " * 60, "words of fewer than 3"),
        ("# the and of some words " * 30, "a symbol for every"),
        ("\n".join(["• the words and of that have"] * 30), "bullets"),
        (
            "\n".join(["the words and of that have ..."] * 30).replace(" ...", " and that is it…"),
            "ellipsis",
        ),
        ("1234 5678 91011 words the and of " * 20, "no letter"),
        ("palavras sempre outras coisas " * 20, "most common words"),
        (
            "\n".join(["the same line of words and that again and again to be"] * 20),
            "repeated lines",
        ),
        (prose + " Lorem ipsum dolor", "lorem ipsum"),
    ]:
        assert reason in failed_filter(text, Cleaning(quality=True)), (text[:40], reason)


@pytest.fixture(scope="module")
def tokenizer(tiny_gemma3: Path):
    return assets.tokenizer_of(str(tiny_gemma3))


def test_packing_joins_by_the_separator_and_drops_no_token(tokenizer, documents) -> None:
    packed = packing.pack(documents * 4, tokenizer, 64)  # more than the 1,000 of a map batch
    assert len(packed.blocks) * 64 + packed.dropped == sum(packed.lengths)
    assert packed.dropped < 64
    assert {len(block) for block in packed.blocks} == {64}
    joined = tokenizer.decode([token for block in packed.blocks for token in block])
    assert joined.split("<eos>")[:-1] == (documents * 4)[: joined.count("<eos>")]


def test_truncation_set_in_a_tokenizer_is_ignored(tiny_gemma3: Path) -> None:
    tokenizer = assets.tokenizer_of(str(tiny_gemma3))
    plain = packing.fingerprint(tokenizer)
    whole = packing.pack(["a long text of many words " * 20], tokenizer, 8).lengths
    tokenizer("a b c d", truncation=True, max_length=2, padding="max_length")
    assert packing.pack(["a long text of many words " * 20], tokenizer, 8).lengths == whole
    assert packing.fingerprint(tokenizer) == plain


def test_blocks_equal_those_of_llamafactory(tokenizer, documents) -> None:
    from llamafactory.data.processor import PretrainDatasetProcessor
    from llamafactory.hparams import DataArguments

    arguments = DataArguments(template="empty", cutoff_len=64)
    arguments.packing = True  # as stage pt sets it, after the class has been made
    processor = PretrainDatasetProcessor(
        template=None, tokenizer=tokenizer, processor=None, data_args=arguments
    )
    theirs = processor.preprocess_dataset({"_prompt": [[{"content": text}] for text in documents]})
    assert packing.pack(documents, tokenizer, 64).blocks == theirs["input_ids"]


@pytest.fixture(scope="module")
def two(corpus: Path, tmp_path_factory) -> tuple[corpora.Corpus, corpora.Corpus]:
    storage = tmp_path_factory.mktemp("mixed")
    return corpora.prepare(str(corpus), storage), corpora.prepare("news", storage)


def test_blocks_are_made_once_per_corpus_tokenizer_and_block_size(
    two, tokenizer, monkeypatch
) -> None:
    domain, _ = two
    made: list[int] = []
    real = packing.write_arrow
    monkeypatch.setattr(packing, "write_arrow", lambda *a: made.append(1) or real(*a))
    first = packing.tokenise(domain, tokenizer, 64, held_out=False)
    assert first.blocks * 64 + first.dropped == first.tokens and first.dropped < 64
    assert sum(first.histogram.values()) == first.documents == domain.documents
    assert packing.tokenise(domain, tokenizer, 64, held_out=False) == first
    assert len(made) == 1
    other = packing.tokenise(domain, tokenizer, 32, held_out=False)
    forcing = forcing_bos(tokenizer)
    third = packing.tokenise(domain, forcing, 64, held_out=False)
    assert third.blocks * 64 + third.dropped == third.tokens > first.tokens
    assert len({first.folder, other.folder, third.folder}) == len(made) == 3


def test_mix_has_its_shares_and_no_repetition(two, tokenizer) -> None:
    from datasets import load_from_disk

    domain, news = two
    recipe = Recipe(cutoff_len=64, eval_on_start=True, max_steps=100, per_device_train_batch_size=1)
    mix = mixing.for_recipe(recipe, [(domain, 0.75), (news, 0.25)], [domain, news], tokenizer)
    assert [d.blocks for d in mix.drawn] == [75, 25] and mix.blocks == 100
    rows = load_from_disk(str(mix.path))
    assert set(rows) == {"train", "validation_handbook_heldout", "validation_news_heldout"}
    blocks = [tuple(row) for row in rows["train"]["input_ids"]]
    assert len(set(blocks)) == 100 and {len(b) for b in blocks} == {64}
    theirs = {tuple(b) for b in packing.pack(corpora.texts_of(news.train), tokenizer, 64).blocks}
    assert sum(b in theirs for b in blocks) == 25
    assert len(rows["validation_news_heldout"]) == mix.held_out["news_heldout"]
    again = mixing.for_recipe(recipe, [(domain, 3), (news, 1)], [domain, news], tokenizer)
    assert again.path == mix.path
    other = mixing.for_recipe(
        recipe | {"seed": 1}, [(domain, 3), (news, 1)], [domain, news], tokenizer
    )
    assert [tuple(r) for r in load_from_disk(str(other.path))["train"]["input_ids"]] != blocks
    with pytest.raises(DataError, match=r"too small for 75\.0%(?s:.*)a share of at most"):
        long = recipe | {"max_steps": 100_000}
        mixing.for_recipe(long, [(domain, 3), (news, 1)], [news], tokenizer, epochs=20)


def test_weights_and_replay() -> None:
    assert mixing.weights("a", {}) == {"a": 1.0}
    assert mixing.weights({"a": 3, "b": 1}, {"news": 0.2}) == pytest.approx(
        {"a": 0.6, "b": 0.2, "news": 0.2}
    )
    with pytest.raises(DataError, match="shares that add up to less than 1"):
        mixing.weights("a", {"b": 0.6, "c": 0.5})
    with pytest.raises(DataError, match="'b' has the weight 0"):
        mixing.weights("a", {"b": 0})
    with pytest.raises(DataError, match="both CORPUS and REPLAY"):
        mixing.weights({"a": 1, "news": 1}, {"news": 0.1})


def test_unknown_settings_of_clean_are_refused() -> None:
    assert Cleaning.from_settings({"near": 0, "quality": True}).quality
    with pytest.raises(ParameterError, match=r"no setting 'nere'(?s:.*)nearest known: near"):
        Cleaning.from_settings({"nere": 1})
    with pytest.raises(ParameterError, match="exact is 'yes'"):
        Cleaning.from_settings({"exact": "yes"})


def _register(path: str, number: int) -> None:
    for i in range(20):
        corpora.register(Path(path), {f"d{number}_{i}": {"file_name": "x.jsonl"}})


def test_two_processes_register_at_once(tmp_path: Path) -> None:
    path = tmp_path / corpora.REGISTRY
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=_register, args=(str(path), n)) for n in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert len(corpora.read_registry(path)) == 40


def test_several_processes_read_the_same_corpus_as_one(
    documents, tmp_path: Path, monkeypatch
) -> None:
    path = tmp_path / "big.jsonl"
    write_jsonl(path, documents)
    here = corpora.prepare(str(path), tmp_path / "one")
    monkeypatch.setattr(ingest, "_CHUNK", 50_000)
    there = corpora.prepare(str(path), tmp_path / "many")
    assert here.sha256 == there.sha256 and here.train.read_bytes() == there.train.read_bytes()
