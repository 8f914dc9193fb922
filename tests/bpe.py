"""Tokenizers as published models have them: how they split text, and what they put in front."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
NAMES = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), SPECIAL, strict=True))


def _split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def trained(kind: str, documents: list[str], vocabulary: int = 6000) -> PreTrainedTokenizerFast:
    """A tokenizer trained on documents; ``kind`` is the family whose way to split it has."""
    splits = {
        "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "llama3": _split(TikTokenConverter().pattern),
        "qwen2": _split(PRETOKENIZE_REGEX),
        "sentencepiece": pre_tokenizers.Metaspace(prepend_scheme="never"),
    }
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = splits[kind]
    by_bytes = kind != "sentencepiece"
    bpe.decoder = decoders.ByteLevel() if by_bytes else decoders.Metaspace(prepend_scheme="never")
    alphabet = pre_tokenizers.ByteLevel.alphabet() if by_bytes else []
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet
    )
    bpe.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **NAMES)


def forcing_bos(
    tokenizer: PreTrainedTokenizerFast, like: str = "llama3"
) -> PreTrainedTokenizerFast:
    """The same tokenizer, with BOS put in front of every text as a published model's does it."""
    import transformers

    bpe = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    if like == "llama3":  # by a post-processor; no attribute tells
        bpe.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
        )
        return PreTrainedTokenizerFast(tokenizer_object=bpe, **NAMES)
    family = {"llama2": "LlamaTokenizerFast", "gemma": "GemmaTokenizerFast"}[like]
    return getattr(transformers, family)(tokenizer_object=bpe, add_bos_token=True, **NAMES)


def load(folder: Path) -> PreTrainedTokenizerFast:
    """A tokenizer of its own, whose settings a test may change."""
    return PreTrainedTokenizerFast.from_pretrained(folder)
