"""Blocks begin with BOS if the tokenizer forces it, and the model learns every token."""

from __future__ import annotations

import math
from itertools import chain, pairwise
from pathlib import Path

import bpe
import pytest

from cpt_helpers.data import corpora, mixing, packing
from cpt_helpers.errors import DataError
from cpt_helpers.export import evaluation
from cpt_helpers.recipes import Recipe
from cpt_helpers.setup import models
from cpt_helpers.train.patches import BlockCollator

FAMILIES = ("llama3", "llama2", "gemma")
BLOCK = 64


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads slow down computations with tiny tensors."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def plain(tiny_gemma3: Path):
    return bpe.load(tiny_gemma3)


@pytest.fixture
def model(tiny_gemma3: Path):
    return models.load(tiny_gemma3, dtype="float32")[0]


def llamafactorys(tokenizer, texts: list[str], size: int) -> list[list[int]]:
    """The blocks that LLaMA-Factory itself makes."""
    from llamafactory.data.processor import PretrainDatasetProcessor
    from llamafactory.hparams import DataArguments

    arguments = DataArguments(template="empty", cutoff_len=size)
    arguments.packing = True  # as stage pt sets it, after the class has been made
    processor = PretrainDatasetProcessor(
        template=None, tokenizer=tokenizer, processor=None, data_args=arguments
    )
    prompts = {"_prompt": [[{"content": text}] for text in texts]}
    return processor.preprocess_dataset(prompts)["input_ids"]


@pytest.mark.parametrize("family", FAMILIES)
def test_forced_bos_is_read_from_the_tokenizers_output(plain, family: str) -> None:
    forcing = bpe.forcing_bos(plain, family)
    assert packing.forced_bos(forcing) == evaluation.opening(forcing) == plain.bos_token_id
    assert packing.forced_bos(plain) is None
    assert evaluation.opening(plain) == plain.eos_token_id
    assert packing.fingerprint(forcing) != packing.fingerprint(plain)
    if family != "llama3":
        forcing.add_bos_token = False
        assert packing.forced_bos(forcing) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_and_document_begins_with_bos(plain, documents, family: str) -> None:
    bos, eos = plain.bos_token_id, plain.eos_token_id
    packed = packing.pack(documents, bpe.forcing_bos(plain, family), BLOCK)
    assert {len(block) for block in packed.blocks} == {BLOCK}
    assert {block[0] for block in packed.blocks} == {bos}
    tokens = list(chain(*packed.blocks))
    assert all(after == bos for token, after in pairwise(tokens) if token == eos)
    assert not any((bos, bos) in pairwise(block) for block in packed.blocks)
    # Without BOS, the tokens equal LLaMA-Factory's for a tokenizer that forces none.
    ours = [token for token in tokens if token != bos]
    theirs = list(chain(*llamafactorys(plain, documents, BLOCK)))
    both = min(len(ours), len(theirs))
    assert ours[:both] == theirs[:both] and max(len(ours), len(theirs)) - both < BLOCK


def test_blocks_of_one_document_equal_llamafactorys_after_bos(plain, documents) -> None:
    (text,) = [max(documents, key=len)]
    theirs = llamafactorys(plain, [text], BLOCK - 1)
    ours = packing.pack([text], bpe.forcing_bos(plain), BLOCK).blocks
    assert ours == [[plain.bos_token_id, *block] for block in theirs]
    assert len(ours) > 5


def test_llamafactory_overwrites_a_token_or_omits_bos(plain, documents) -> None:
    """The reason for our own packing. If this fails, LLaMA-Factory's packing has changed."""
    bos = plain.bos_token_id
    without = llamafactorys(plain, documents, BLOCK)
    gemmas = llamafactorys(bpe.forcing_bos(plain, "gemma"), documents, BLOCK)
    assert gemmas == [[bos, *block[1:]] for block in without]
    assert llamafactorys(bpe.forcing_bos(plain, "llama3"), documents, BLOCK) == without


def test_blocks_on_the_storage_begin_with_bos(plain, corpus: Path, tmp_path: Path) -> None:
    from datasets import load_from_disk

    handbook = corpora.prepare(str(corpus), tmp_path)
    recipe = Recipe(cutoff_len=BLOCK, eval_on_start=True)
    mix = mixing.for_recipe(recipe, [(handbook, 1)], [handbook], bpe.forcing_bos(plain))
    halves = load_from_disk(str(mix.path))
    assert len(halves) == 2
    for rows in halves.values():
        assert {row[0] for row in rows["input_ids"]} == {plain.bos_token_id}
        assert {len(row) for row in rows["input_ids"]} == {BLOCK}


def test_block_of_one_token_is_refused(plain) -> None:
    with pytest.raises(DataError, match=r"nothing to predict(?s:.*)cutoff_len: 1"):
        packing.pack(["text"], bpe.forcing_bos(plain), 1)


@pytest.mark.parametrize("forced", [True, False])
def test_every_piece_of_a_long_document_begins_like_a_block(
    plain, model, documents, forced: bool
) -> None:
    import torch

    tokenizer = bpe.forcing_bos(plain) if forced else plain
    text = max(documents, key=len)[:1200]
    ids = plain(text)["input_ids"]
    found = evaluation.document_losses(model, tokenizer, [text], BLOCK).iloc[0]
    assert found.tokens == len(ids) > 2 * BLOCK
    by_hand = 0.0
    for start in range(0, len(ids), BLOCK - 1):
        before = plain.bos_token_id
        if not forced:
            before = ids[start - 1] if start else plain.eos_token_id
        row = torch.tensor([[before, *ids[start : start + BLOCK - 1]]])
        with torch.inference_mode():
            by_hand += model(input_ids=row, labels=row).loss.item() * (row.shape[1] - 1)
    assert found.nats == pytest.approx(by_hand, rel=1e-5)


def batch_of(blocks: list[list[int]]) -> list[dict[str, list[int]]]:
    return [{"input_ids": block, "attention_mask": [1] * len(block)} for block in blocks]


def without_padding_token(tokenizer):
    """LLaMA-Factory's change to a tokenizer without a padding token, such as Llama 3's."""
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments

    tokenizer.pad_token = None
    get_template_and_fix_tokenizer(tokenizer, DataArguments(template="empty"))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    return tokenizer


def test_separators_are_learnt_if_they_are_the_padding_token(plain, documents) -> None:
    from llamafactory.train.pt import workflow

    tokenizer = without_padding_token(plain)
    features = batch_of(packing.pack(documents, tokenizer, BLOCK).blocks[:32])
    theirs = workflow.DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm=False)(features)
    ours = BlockCollator(tokenizer=tokenizer, mlm=False)(features)
    separators = ours["input_ids"] == tokenizer.eos_token_id
    assert separators.any() and separators.equal(theirs["labels"] == -100), (
        "the tokens that transformers would not learn"
    )
    assert ours["labels"].equal(ours["input_ids"])
    assert ours["labels"].data_ptr() != ours["input_ids"].data_ptr()


def test_batch_equals_that_of_transformers(plain, documents) -> None:
    from llamafactory.train.pt import workflow

    features = batch_of(packing.pack(documents, plain, BLOCK).blocks[:8])
    theirs = workflow.DataCollatorForLanguageModeling(tokenizer=plain, mlm=False)(features)
    ours = BlockCollator(tokenizer=plain, mlm=False)(features)
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and tensor.equal(theirs[name]), name


def test_batch_of_uneven_or_padded_blocks_is_refused() -> None:
    uneven = batch_of([[1] * 64, [1] * 63])
    with pytest.raises(
        DataError, match=r"differ in length(?s:.*)63, 64 tokens(?s:.*)tokenized_path"
    ):
        BlockCollator()(uneven)
    padded = batch_of([[1] * 64] * 2)
    padded[1]["attention_mask"][-1] = 0
    with pytest.raises(DataError, match="blocks of a batch are padded"):
        BlockCollator()(padded)


@pytest.mark.parametrize("forced", [True, False])
def test_perplexity_equals_the_trainers_loss(
    plain, model, documents, tmp_path: Path, forced: bool
) -> None:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    tokenizer = without_padding_token(bpe.forcing_bos(plain) if forced else plain)
    texts = documents[:15]
    blocks = packing.pack(texts, tokenizer, BLOCK).blocks
    assert tokenizer.eos_token_id in chain(*blocks)
    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path), per_device_eval_batch_size=1, use_cpu=True, report_to="none"
        ),
        data_collator=BlockCollator(tokenizer=tokenizer, mlm=False),
        eval_dataset=Dataset.from_list(batch_of(blocks)),
    )
    loss = trainer.evaluate()["eval_loss"]
    found = evaluation.perplexity(model, tokenizer, texts, BLOCK)
    assert math.log(found) == pytest.approx(loss, rel=1e-6)
