"""Batches of packed blocks, for the trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import DataError


class BlockCollator:
    """Makes a batch of whole blocks, and has the model learn every token, separators included.

    LLaMA-Factory 0.9.3 trains with transformers' ``DataCollatorForLanguageModeling``, which leaves
    each padding token out of the loss. Where a tokenizer has no padding token, LLaMA-Factory pads
    with EOS; other tokenizers come with that setting. The model then never learns how a document
    ends. Packed blocks are never padded, so their labels are their token ids.

    Args:
        _: What LLaMA-Factory gives transformers' class (``tokenizer``, ``mlm``); not needed.
    """

    def __init__(self, **_: Any) -> None: ...

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The tensors ``input_ids``, ``attention_mask`` and ``labels``, each ``(blocks, tokens)``.

        Args:
            features: Blocks: ``input_ids`` of one length, and ``attention_mask``.

        Raises:
            DataError: The blocks differ in length, or are padded.
        """
        import torch

        lengths = sorted({len(block["input_ids"]) for block in features})
        padded = any(0 in block.get("attention_mask", ()) for block in features)
        if len(lengths) > 1 or padded:
            raise DataError(
                f"the blocks of a batch {'are padded' if padded else 'differ in length'}",
                where=f"blocks of {', '.join(map(str, lengths))} tokens",
                expected="whole blocks of cutoff_len tokens, without padding",
                do="train on the blocks that step 2 makes: remove tokenized_path and "
                "'packing: false' from the recipe",
            )
        ids = torch.tensor([block["input_ids"] for block in features])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
