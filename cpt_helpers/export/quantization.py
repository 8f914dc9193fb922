"""Quantizes the weights of an exported model to 8 or 4 bits (compressed-tensors, as vLLM loads).

Activations keep 16 bits. W8A16 rounds to the nearest value, with one scale per output. W4A16 is
GPTQ (Frantar et al. 2023, https://arxiv.org/abs/2210.17323), calibrated on the corpus, with one
scale per group of inputs. Embeddings and the output layer keep their precision.

GGUF files are not written: llama.cpp distributes ``convert_hf_to_gguf.py`` as source only.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import display, recipes
from ..data import corpora
from ..data.packing import pack
from ..errors import ExportError, nearest
from ..redirect import hushed
from ..run import in_one_piece
from ..setup import assets, models
from . import evaluation
from .huggingface import Export, Verification, is_made, write_note

if TYPE_CHECKING:
    from pandas import DataFrame

SCHEMES = ("W8A16", "W4A16")
GROUPS = (128, 64, 32)  # inputs per scale: the sizes that vLLM's kernels support
NOTE = "quantize.json"
# Not quantized: the output layer, which is often the embedding, and the vision tower.
IGNORED = ["lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"]


def compare_formats(exported: Export, verification: Verification, scheme: str = "") -> DataFrame:
    """Quantizes an export if asked to, and compares sizes and held-out perplexities.

    The quantized folder is ``<run>/export-<scheme>``. W4A16 is calibrated on the training half of
    the corpus.

    Args:
        exported: The export, in full precision.
        verification: Its perplexities.
        scheme: ``"W8A16"``, ``"W4A16"``, or empty for the full precision alone.
    """
    run, recipe = exported.run, recipes.load(exported.run)
    measured = {verification.dtype: (exported.folder, verification.perplexity)}
    if scheme:
        corpus = corpora.load(recipes.names_of(recipe["dataset"])[0], run.storage)
        folder = run.folder / f"export-{scheme.lower()}"
        texts = corpora.texts_of(corpus.train) if scheme == "W4A16" else None
        quantize(exported.folder, folder, scheme, texts, block_size=recipe.block_size)
        quantized = models.load(folder)
        measured[scheme] = folder, evaluation.held_out_perplexity(run, *quantized)
        del quantized
        models.release()
    return display.table(
        {"weights": name, "MB": round(size_of(folder) / 1e6, 2)}
        | {f"perplexity, {role}": round(value, 3) for role, value in perplexity.items()}
        for name, (folder, perplexity) in measured.items()
    )


def quantize(
    exported: Path,
    target: Path,
    scheme: str = "W8A16",
    texts: Iterable[str] | None = None,
    *,
    samples: int = 128,
    block_size: int = 256,
) -> int:
    """Writes the quantized form of an exported model; one made from the same inputs is kept.

    Args:
        exported: A Hugging Face folder with full weights, from :func:`huggingface.write_model`.
        target: The folder to make.
        scheme: ``"W8A16"`` needs no text; ``"W4A16"`` does.
        texts: Documents of the training half to calibrate W4A16 with, never held-out ones.
        samples: Maximum number of calibration blocks.
        block_size: Tokens per block.

    Returns:
        The size of the folder in bytes.

    Raises:
        ExportError: The scheme, the calibration text, the model or the target cannot be used.
        AssetError: ``exported`` is no model folder.
    """
    validate_options(scheme)
    group = _group_of(exported, scheme)
    blocks = _blocks(exported, texts, samples, block_size) if scheme == "W4A16" else []
    digest = hashlib.sha256(json.dumps(blocks).encode()).hexdigest()
    calibration = {"blocks": len(blocks), "block_size": block_size, "sha256": digest}
    made_from = {
        "model": str(exported),
        "weights": [assets.sha256(path) for path in sorted(exported.glob("*.safetensors"))],
        "scheme": scheme,
        "group_size": group,
        "calibration": calibration if blocks else None,
    }
    expected = f"{exported} as {scheme}, from the same weights and text"
    if not is_made(target / NOTE, made_from, expected):
        model, tokenizer = models.load(exported)
        with in_one_piece(target) as new:
            with hushed():  # llmcompressor logs every layer
                _compress(model, tokenizer, scheme, group, blocks)
                model.save_pretrained(new, save_compressed=True, safe_serialization=True)
            tokenizer.save_pretrained(new)
            models.copy_processor(exported, new)
            write_note(new / NOTE, made_from)
    return size_of(target)


def validate_options(scheme: str, form: str = "merged") -> None:
    """Checks the scheme and the form of the export before anything is loaded.

    Raises:
        ExportError: The scheme is unknown, or the export is an adapter.
    """
    if scheme not in SCHEMES:
        raise ExportError(
            f"unknown scheme '{scheme}'",
            expected=f"{', '.join(SCHEMES)} ({nearest(scheme, SCHEMES)})",
        )
    if form != "merged":
        raise ExportError(
            f"an {form} alone cannot be quantized: it does not contain the base's weights",
            expected="a complete model",
            do='export it with FORM = "merged"',
        )


def size_of(folder: Path) -> int:
    """The bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def group_size(model: Any) -> int:
    """Inputs per scale: the largest size that divides the width of every quantized layer.

    Raises:
        ExportError: No size divides all widths.
    """
    import torch

    ignored = "|".join(name.removeprefix("re:") for name in IGNORED)
    layers = [m for n, m in model.named_modules() if not re.fullmatch(ignored, n)]
    widths = sorted({layer.in_features for layer in layers if isinstance(layer, torch.nn.Linear)})
    for size in GROUPS:
        if all(width % size == 0 for width in widths):
            return size
    odd = [width for width in widths if width % GROUPS[-1]]
    raise ExportError(
        f"4 bits need groups of inputs, and none of {', '.join(map(str, GROUPS))} divides the "
        "width of every layer",
        where=f"{type(model).__name__}: widths {', '.join(map(str, odd))}",
        expected=f"multiples of {GROUPS[-1]}",
        do="quantize to W8A16, which has one scale per output and no groups",
    )


def _group_of(exported: Path, scheme: str) -> int | None:
    """The group size for W4A16, from the configuration alone."""
    full = "full weights, as notebook 06_export writes them"
    if (exported / models.ADAPTER).is_file():
        raise ExportError(
            "an adapter cannot be quantized: it does not contain the base's weights",
            where=exported / models.ADAPTER,
            expected=full,
            do='export the checkpoint with FORM = "merged" first, and give that folder',
        )
    config = models.config_of(exported)
    if getattr(config, "quantization_config", None):
        raise ExportError(
            "the model is quantized already",
            where=exported / "config.json",
            expected=full,
            do="give the folder it was made from",
        )
    return group_size(models.empty(config)) if scheme == "W4A16" else None


def _blocks(
    exported: Path, texts: Iterable[str] | None, samples: int, block_size: int
) -> list[list[int]]:
    """Calibration text in the form of the training: documents joined and cut into whole blocks."""
    if texts is not None:
        tokenizer = assets.tokenizer_of(str(exported))
        # Eight characters per token are more than any tokenizer needs on average.
        packed = pack(_first(texts, 8 * samples * block_size), tokenizer, block_size)
        if packed.blocks:
            return [list(block) for block in packed.blocks[:samples]]
    amount = "none given" if texts is None else f"less than {block_size} tokens"
    raise ExportError(
        "there is no text to calibrate with",
        where=f"texts: {amount}",
        expected="documents of the training half of the corpus",
        do="texts=data.texts_of(corpus.train), or quantize to W8A16, which needs none",
    )


def _first(texts: Iterable[str], characters: int) -> Iterable[str]:
    """The first documents that together have at least so many characters."""
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def _compress(
    model: Any, tokenizer: Any, scheme: str, group: int | None, blocks: list[list[int]]
) -> None:
    """Quantizes a model in place with llmcompressor."""
    import torch

    # llmcompressor 0.6.0.1 creates ./sparse_logs unless its logger has a file handler.
    log = logging.getLogger("llmcompressor.metrics.logger")
    log.handlers = [logging.FileHandler(os.devnull, delay=True)]
    from llmcompressor import oneshot
    from llmcompressor.core import reset_session
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    reset_session()  # otherwise the recipe of an earlier call is applied again
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    common = {"model": model, "tokenizer": tokenizer, "oneshot_device": device, "log_dir": None}
    if scheme == "W8A16":
        recipe = QuantizationModifier(targets="Linear", scheme=scheme, ignore=IGNORED)
        oneshot(recipe=recipe, **common)
        return
    from datasets import Dataset

    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights | {"group_size": group}}}
    ids = {"input_ids": blocks, "attention_mask": [[1] * len(block) for block in blocks]}
    oneshot(
        recipe=GPTQModifier(config_groups=groups, ignore=IGNORED),
        dataset=Dataset.from_dict(ids),
        num_calibration_samples=len(blocks),
        max_seq_length=len(blocks[0]),
        shuffle_calibration_samples=False,  # the same text gives the same weights
        **common,
    )
