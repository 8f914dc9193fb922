"""Tiny random models of several families, each with a feature that can cause errors.

The features are biases in every linear layer, tied and untied embeddings, a vision tower, learned
positions and experts. All models share one tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

FAMILIES = ("llama", "gemma3", "gemma3-vision", "qwen2", "gpt2", "mixtral")
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_GEMMA = _SIZES | {
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 32,
    "sliding_window_pattern": 2,
}


def build(family: str, folder: Path, tokenizer: Any) -> Path:
    """Writes a random model of a family with a tokenizer; repeated calls write the same.

    Args:
        family: One of :data:`FAMILIES`.
        folder: The folder to write.
        tokenizer: The tokenizer to save with it; its size is the vocabulary.
    """
    import torch

    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        _model(family, tokenizer).save_pretrained(folder)
        _processor(family, tokenizer).save_pretrained(folder)
    return folder


def _processor(family: str, tokenizer: Any) -> Any:
    """The tokenizer of a model, or its processor if the model takes images."""
    if not family.endswith("-vision"):
        return tokenizer
    import transformers as hf

    with_images = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer,
        extra_special_tokens={"image_token": "<pad>", "boi_token": "<unk>", "eoi_token": "<unk>"},
        **tokenizer.special_tokens_map,
    )
    images = hf.Gemma3ImageProcessor(size={"height": 28, "width": 28})
    return hf.Gemma3Processor(images, with_images, image_seq_length=4)


def _model(family: str, tokenizer: Any) -> Any:
    import transformers as hf

    ids = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    if family == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZES, **ids, tie_word_embeddings=False))
    if family == "gemma3":
        return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_GEMMA, **ids))
    if family == "gemma3-vision":
        tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
        tower |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
        config = hf.Gemma3Config(
            text_config=_GEMMA | ids, vision_config=tower, mm_tokens_per_image=4
        )
        return hf.Gemma3ForConditionalGeneration(config)
    if family == "qwen2":
        return hf.Qwen2ForCausalLM(hf.Qwen2Config(**_SIZES, **ids, tie_word_embeddings=True))
    if family == "gpt2":
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **no_dropout, **ids))
    if family == "mixtral":
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
        return hf.MixtralForCausalLM(hf.MixtralConfig(**_SIZES, **ids, **experts))
    raise ValueError(family)
