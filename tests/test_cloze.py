"""What is scored of an option is what tells it from the others, however a tokenizer splits text."""

from __future__ import annotations

import re

import bpe
import pytest

from cpt_helpers.export import cloze
from cpt_helpers.export.cloze import Cloze, Item

KINDS = ("gpt2", "llama3", "qwen2", "sentencepiece")


@pytest.fixture(scope="module")
def held_out(documents: list[str]) -> list[str]:
    return [text for text in documents if "Args:" in text and len(text) < 1500][:14]


@pytest.fixture(scope="module")
def items(held_out: list[str]) -> tuple[Item, ...]:
    return cloze.make(held_out, most=60).items


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, documents: list[str]):
    return bpe.trained(request.param, documents)


def item(prompt: str, options: tuple[str, ...], after: str) -> Item:
    return Item("word", 0, "t", prompt, options, 0, after)


def test_options_are_cut_where_they_begin_to_differ(tokenizer, items) -> None:
    numbers = item("The release of 19", ("94", "87", "62", "5"), ".")
    same_beginning = item("ray.", ("get", "get_actor", "get_gpu_ids", "get_x"), "\n\nFetch.")
    spanning = 0
    for one in (*items, numbers, same_beginning):
        shared, options = cloze.tokens_of(tokenizer, one)
        assert len({tuple(ids[:shared]) for ids in options}) == 1
        assert len({ids[shared] for ids in options}) > 1
        for ids, option in zip(options, one.options, strict=True):
            assert tokenizer.decode(ids) == f"{one.prompt}{option}{one.after}"
        spanning += shared < len(tokenizer(one.prompt.rstrip())["input_ids"])
    assert spanning >= 1, "no token holds a prompt's end and an option's beginning"


def test_an_option_that_another_begins_with_has_a_token_to_score(tokenizer) -> None:
    shared, options = cloze.tokens_of(tokenizer, item("a b", (" c", " c c", " c c c"), ""))
    assert all(len(ids) > shared for ids in options)
    assert shared == len(options[0]) - 1


def as_long(tokenizer, prompt: str, words: list[str], after: str) -> list[Item]:
    """Items whose options make texts of as many tokens, as few as four words can."""
    by_length: dict[int, list[str]] = {}
    texts = tokenizer([f"{prompt}{word}{after}" for word in words])["input_ids"]
    for word, ids in zip(words, texts, strict=True):
        by_length.setdefault(len(ids), []).append(word)
    found = next(own for _, own in sorted(by_length.items()) if len(own) >= 4)
    return [item(prompt, tuple(found[i : i + 4]), after) for i in range(0, len(found) - 3, 4)][:6]


def test_the_likeliest_text_is_taken(tokenizer, documents) -> None:
    """Of texts of as many tokens the likeliest has the best option, wherever the cut is."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = LlamaConfig(len(tokenizer), num_attention_heads=2, initializer_range=0.5, **sizes)
    model = LlamaForCausalLM(config).eval()
    words = sorted(set(re.findall("[a-z]{3,}", " ".join(documents[:60]))))
    asked, expected = [], []
    for prompt, after in (("ray.", "\n\nx"), ("Args:\n    ", ": x"), ("one of ", "."), ("(", ")")):
        asked += as_long(tokenizer, prompt, words, after)
    for one in asked:
        losses = []
        for option in one.options:
            text = f"{one.prompt}{option}{one.after}"
            ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
            with torch.inference_mode():
                losses.append(model(input_ids=ids, labels=ids).loss.item())
        expected.append(losses.index(min(losses)))
    assert len(asked) >= 10 and len(set(expected)) > 1
    assert list(cloze.answer(model, tokenizer, Cloze(cloze.WORDS, tuple(asked)))) == expected
