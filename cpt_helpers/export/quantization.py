"""An exported model with its weights in 8 or 4 bits, in the form vLLM loads (compressed-tensors).

Weights only, activations stay in 16 bits: W8A16 rounds to the nearest, a scale for each output;
W4A16 is GPTQ (Frantar et al. 2023, https://arxiv.org/abs/2210.17323) on text of the corpus, a scale
for each group of inputs. Embeddings and the output layer keep their precision.

GGUF, llama.cpp's form, is not written here. llama.cpp's own ``convert_hf_to_gguf.py`` does it from
an exported folder, and stands in its source, not in a package of theirs; the ``gguf`` package
writes the container and leaves it to that script how a family's tensors and tokenizer are turned.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..data.packing import pack
from ..errors import ExportError, nearest
from ..redirect import hushed
from ..run import in_one_piece
from ..setup import assets
from ..setup.models import ADAPTER, config_of, copy_processor, empty, load

SCHEMES = ("W8A16", "W4A16")
GROUPS = (128, 64, 32)  # inputs that share a scale: the sizes vLLM's kernels know
NOTE = "quantize.json"
# Not quantized: the output layer, which is often the embedding, and what sees images.
IGNORED = ["lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"]


def quantize(
    exported: Path,
    target: Path,
    scheme: str = "W8A16",
    texts: Iterable[str] | None = None,
    *,
    samples: int = 128,
    block_size: int = 256,
) -> int:
    """Writes an exported model's quantized form; one made the same way is left alone.

    Args:
        exported: A Hugging Face folder with full weights, as :func:`export.export` makes it.
        target: The folder to make.
        scheme: ``"W8A16"`` needs no text; ``"W4A16"`` does.
        texts: Documents to calibrate W4A16 with: those of the training half, never held-out ones.
        samples: Blocks of text to calibrate with, at most.
        block_size: Tokens in such a block.

    Returns:
        Bytes of the folder.

    Raises:
        ExportError: The scheme is unknown, W4A16 has too little text or no group size that fits,
            the folder holds an adapter, the model is quantized already, or the target holds
            something else.
        AssetError: ``exported`` is no model folder.
    """
    require(scheme)
    group = _group_of(exported, scheme)
    blocks = _blocks(exported, scheme, texts, samples, block_size)
    made_from = {
        "model": str(exported),
        "weights": [assets.sha256(path) for path in sorted(exported.glob("*.safetensors"))],
        "scheme": scheme,
        "group_size": group,
        "calibration": _digest(blocks),
    }
    if target.exists():
        note = target / NOTE
        if note.is_file() and json.loads(note.read_text("utf-8")) == made_from:
            return size_of(target)
        raise ExportError(
            "the folder for the quantized model exists and holds something else",
            where=target,
            expected=f"no folder, or {exported} as {scheme}, from the same weights and text",
            do="move it away, or give another; nothing was changed",
        )
    return _write(exported, target, made_from, blocks)


def require(scheme: str, form: str = "merged") -> None:
    """Refuses what cannot be quantized by its name alone, before anything is loaded.

    Args:
        scheme: ``"W8A16"`` or ``"W4A16"``.
        form: Of the export, as :func:`export.export` takes it.

    Raises:
        ExportError: The scheme is unknown, or the export is to be an adapter.
    """
    if scheme not in SCHEMES:
        raise ExportError(
            f"unknown scheme '{scheme}'",
            expected=f"{', '.join(SCHEMES)} ({nearest(scheme, SCHEMES)})",
        )
    if form != "merged":
        raise ExportError(
            f"an {form} alone cannot be quantized: the base's weights are not in it",
            expected="a model that stands alone",
            do='export it with FORM = "merged"',
        )


def size_of(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def group_size(model: Any) -> int:
    """Inputs that share a scale: the largest size that divides every layer's width.

    Args:
        model: In plain transformers, on any device; the meta device is enough.

    Raises:
        ExportError: None divides them all.
    """
    widths = sorted({layer.in_features for layer in _quantized(model).values()})
    for size in GROUPS:
        if all(width % size == 0 for width in widths):
            return size
    odd = [width for width in widths if width % GROUPS[-1]]
    raise ExportError(
        f"4 bits need groups of inputs, and none of {', '.join(map(str, GROUPS))} divides every "
        f"layer's width",
        where=f"{type(model).__name__}: widths {', '.join(map(str, odd))}",
        expected=f"widths that {GROUPS[-1]} divides",
        do="quantize to W8A16, which has a scale for each output and no groups",
    )


def _group_of(exported: Path, scheme: str) -> int | None:
    """The group size, from the configuration alone; also sees whether this is a full model."""
    if (exported / ADAPTER).is_file():
        raise ExportError(
            "an adapter cannot be quantized: it is what LoRA trained, without its base's weights",
            where=exported / ADAPTER,
            expected="full weights, as notebook 06_export writes them",
            do='export the checkpoint with FORM = "merged" first, and give that folder',
        )
    config = config_of(exported)
    if getattr(config, "quantization_config", None):
        raise ExportError(
            "the model is quantized already",
            where=exported / "config.json",
            expected="full weights, as notebook 06_export writes them",
            do="give the folder it was made from",
        )
    if scheme == "W8A16":
        return None
    return group_size(empty(config))


def _quantized(model: Any) -> dict[str, Any]:
    """The layers a scheme is applied to, by name."""
    import torch

    patterns = [name.removeprefix("re:") for name in IGNORED]
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear)
        and not any(re.fullmatch(pattern, name) for pattern in patterns)
    }


def _blocks(
    exported: Path, scheme: str, texts: Iterable[str] | None, samples: int, block_size: int
) -> list[list[int]]:
    """Calibration text as the training saw it: documents joined and cut into whole blocks."""
    if scheme == "W8A16":
        return []
    if texts is not None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(exported)
        # Four characters a token at most is usual; where it is more, there are fewer blocks.
        blocks = pack(_first(texts, samples * block_size * 8), tokenizer, block_size).blocks
        if blocks:
            return blocks[:samples]
    raise ExportError(
        "W4A16 has no text to calibrate with",
        where=f"texts: {'none given' if texts is None else f'less than {block_size} tokens'}",
        expected="documents of the kind the model is for: the training half of its corpus",
        do="texts=data.texts_of(corpus.train), or quantize to W8A16, which needs none",
    )


def _first(texts: Iterable[str], characters: int) -> Iterable[str]:
    """The first documents, until they come to so many characters."""
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def _digest(blocks: list[list[int]]) -> dict[str, Any] | None:
    if not blocks:
        return None
    ids = hashlib.sha256(json.dumps(blocks).encode()).hexdigest()
    return {"blocks": len(blocks), "block_size": len(blocks[0]), "sha256": ids}


def _write(exported: Path, target: Path, made_from: dict[str, Any], blocks: list[list[int]]) -> int:
    model, tokenizer = load(exported)
    with in_one_piece(target) as new:
        with hushed():  # llmcompressor tells every layer
            _compress(model, tokenizer, made_from["scheme"], made_from["group_size"], blocks)
            model.save_pretrained(new, save_compressed=True, safe_serialization=True)
        tokenizer.save_pretrained(new)
        copy_processor(exported, new)
        (new / NOTE).write_text(json.dumps(made_from, indent=2) + "\n", "utf-8")
    return size_of(target)


def _compress(
    model: Any, tokenizer: Any, scheme: str, group: int | None, blocks: list[list[int]]
) -> None:
    """Quantizes a model where it is, by llmcompressor."""
    import torch

    # llmcompressor 0.6.0.1 makes ./sparse_logs unless its logger has a file already.
    log = logging.getLogger("llmcompressor.metrics.logger")
    log.handlers = [logging.FileHandler(os.devnull, delay=True)]
    from llmcompressor import oneshot
    from llmcompressor.core import reset_session
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    reset_session()  # a recipe of an earlier call would be applied once more
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
