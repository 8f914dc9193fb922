"""Corrections of the pinned libraries, applied in each worker before it trains.

Each docstring names the error and the releases that have it. Only :mod:`.trainer`, which corrects
LLaMA-Factory's trainer, loads torch when it is imported.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from ..errors import DataError


def join_cpu_group() -> None:
    """Makes DeepSpeed take over the process group on CPUs.

    Without it DeepSpeed 0.16.9 assumes that the world size is 1.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # DeepSpeed 0.16.9 uses this operator for inference only, and a C++ compiler has to build it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def correct_deepspeed(ddp_timeout: int) -> None:
    """Applies every correction of DeepSpeed; ``ddp_timeout`` is a collective's limit in seconds."""
    limit_waiting(ddp_timeout)
    wait_for_every_gather()
    load_by_global_rank()


def limit_waiting(seconds: int) -> None:
    """Gives DeepSpeed's process groups the time-out of the recipe.

    DeepSpeed 0.16.9 clones the world group for ZeRO, and a clone has torch's own time-out: half an
    hour with gloo, ten minutes with NCCL.
    """
    import torch.distributed as dist
    from deepspeed.utils import groups

    every = list(range(dist.get_world_size()))
    groups._WORLD_GROUP = dist.new_group(every, timeout=timedelta(seconds=seconds))


def wait_for_every_gather() -> None:
    """Makes ZeRO-3 wait for every parameter that it gathers, not only for the last one.

    DeepSpeed starts one asynchronous gather per parameter. With gloo an earlier gather can finish
    after transformers has written the loaded weights, and overwrites them. Releases before the fix
    of September 2026 need it (https://github.com/deepspeedai/DeepSpeed/pull/8539).
    """
    from deepspeed.runtime.zero.partition_parameters import Init

    gather = Init._allgather_params_coalesced
    if "launch_handles[-1].wait()" not in inspect.getsource(gather):
        return

    def one_by_one(self: Any, param_list: Any, hierarchy: int = 0, quantize: bool = False) -> None:
        for param in param_list:  # of a single parameter the last handle is every handle
            gather(self, [param], hierarchy, quantize)

    Init._allgather_params_coalesced = one_by_one


def load_by_global_rank() -> None:
    """Makes ZeRO-3 load a universal checkpoint's slice by the global rank.

    DeepSpeed 0.16.9 uses the rank on the node: every node would load the first node's slices
    (https://github.com/deepspeedai/DeepSpeed/pull/7601).
    """
    from deepspeed.runtime.zero import stage3

    optimizer = stage3.DeepSpeedZeroOptimizer_Stage3
    load = optimizer.load_hp_checkpoint_state
    if "get_local_rank" not in inspect.getsource(load):
        return

    def by_global_rank(self: Any, folder: str, key: str) -> Any:
        local_rank = stage3.dist.get_local_rank
        stage3.dist.get_local_rank = lambda: stage3.dist.get_rank(group=self.dp_process_group)
        try:
            return load(self, folder, key)
        finally:
            stage3.dist.get_local_rank = local_rank

    optimizer.load_hp_checkpoint_state = by_global_rank


def freeze_whole_layers() -> None:
    """Keeps LLaMA-Factory's freeze method from training experts of frozen layers.

    LLaMA-Factory 0.9.3 trains every parameter with ``.<number>.`` of a trained layer in its name.
    In a mixture of experts that is also the expert of this number in all other layers.
    """
    from llamafactory.model import adapter

    freeze = adapter._setup_freeze_tuning

    def whole_layers(model: Any, finetuning_args: Any, *args: Any, **kwargs: Any) -> None:
        freeze(model, finetuning_args, *args, **kwargs)
        if finetuning_args.use_llama_pro:
            return
        config = getattr(model.config, "text_config", model.config)
        layers, count = config.num_hidden_layers, finetuning_args.freeze_trainable_layers
        trained = range(layers)[-count:] if count > 0 else range(layers)[:-count]
        for name, parameter in model.named_parameters():
            numbers = re.findall(r"\.(\d+)\.", name)
            if len(numbers) > 1 and int(numbers[0]) not in trained:
                parameter.requires_grad_(False)

    adapter._setup_freeze_tuning = whole_layers


class BlockCollator:
    """Makes a batch of whole blocks. The model learns every token, separators included.

    LLaMA-Factory 0.9.3 uses transformers' ``DataCollatorForLanguageModeling``, which leaves padding
    tokens out of the loss. Where a tokenizer has no padding token, LLaMA-Factory pads with EOS, and
    the model never learns how a document ends. Packed blocks are never padded, so their labels are
    their token ids.

    Args:
        _: LLaMA-Factory's arguments for transformers' class (``tokenizer``, ``mlm``); not used.
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
