"""What a token's scores take: the output layer and the loss, counted on tensors without storage."""

from __future__ import annotations

import json
import weakref
from functools import cache
from typing import Any

from ..redirect import hushed
from ..setup.models import empty


def score_bytes(config: Any, dtype: str) -> int:
    """Bytes that a model's class needs at the peak for each score of its output layer.

    Classes differ: all make an fp32 copy and its logarithms, ``Gemma3ForConditionalGeneration``
    (transformers 4.52.4) a second copy, Gemma 2 caps the scores in between. So the output layer
    and the loss are run forward and backward on tensors without storage, and every tensor of that
    size is counted while it lives. The model's outputs live too: the trainer drops them before the
    backward pass, but their memory is seldom of a size to be used again.

    Args:
        config: The model's ``transformers`` configuration.
        dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``.
    """
    return _scored(type(config), config.to_json_string(use_diff=False), dtype)


@cache
def _scored(kind: type, config_json: str, dtype: str) -> int:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from transformers.modeling_outputs import BaseModelOutputWithPast

    with hushed():
        config = kind.from_dict(json.loads(config_json))
    text = getattr(config, "text_config", config)
    text.num_hidden_layers, vocabulary = 1, text.vocab_size
    length = text.hidden_size + 256  # more than its width: the layer's own gradient is smaller
    alive: dict[int, int] = {}
    peaks = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None):
            made = op(*args, **(kwargs or {}))
            for tensor in made if isinstance(made, tuple) else (made,):
                large = isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (vocabulary,)
                if large and tensor.numel() >= (length - 1) * vocabulary:
                    storage = tensor.untyped_storage()
                    if storage._cdata not in alive:
                        alive[storage._cdata] = storage.nbytes()
                        weakref.finalize(storage, alive.pop, storage._cdata, None)
            peaks.append(sum(alive.values()))
            return made

    class Outputs(BaseModelOutputWithPast):
        def __getattr__(self, name: str) -> None:
            return None  # what a class has in its outputs besides, such as image features

    with hushed():
        model = empty(config).to(getattr(torch, dtype)).train()
    states = torch.zeros(
        1, length, text.hidden_size, device="meta", dtype=getattr(torch, dtype), requires_grad=True
    )
    body_of(model).forward = lambda *_, **__: Outputs(last_hidden_state=states)
    tokens = torch.zeros(1, length, device="meta", dtype=torch.long)
    with hushed(), Watch():
        outputs = model(input_ids=tokens, labels=tokens, use_cache=False)
        outputs.loss.backward()
    return round(max(peaks) / length / vocabulary)


def body_of(model: Any) -> Any:
    """A model without its output layer; not all classes have ``get_decoder``."""
    table = model.get_input_embeddings()
    return next(child for child in model.children() if table in child.modules())
