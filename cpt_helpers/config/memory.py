"""What a worker holds while it trains: model states by ZeRO stage, activations, logits, buffers.

Model states are counted as DeepSpeed's own estimators count them. Activations are counted, not
estimated: a layer of the model runs forward on tensors without storage, and what autograd would
keep is added up.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..recipes import Recipe
from ..redirect import hushed
from ..setup.models import config_of
from .planning import ModelSize, model_size
from .scores import body_of, score_bytes

# Resident before there is a model: Python, torch, DeepSpeed, LLaMA-Factory, Ray and their heaps.
# Measured in the workers of benchmarks/memory.py (2026-11-22, two EPYC cores).
LIBRARIES = 740 * 2**20
HEAP = 1.12  # glibc's, which keeps what was freed (environment.KEEP_MEMORY); from the same runs
LORA_HOLES = 1.45  # adapters' short-lived outputs leave holes between the activations that stay
HOST = 1.5  # of what is offloaded: DeepSpeed's estimators' factor for its buffers there
CUDA_CONTEXT = 600 * 2**20  # a process's share of a GPU that torch does not count, NCCL's with it


@dataclass(frozen=True)
class Memory:
    """The peak of one worker, in bytes: on its GPU, or in the host's memory without one.

    Attributes:
        libraries: Before there is a model; on a GPU, the CUDA context.
        weights: In the precision of the training; under ZeRO-3 the shard.
        gathered: Under ZeRO-3, whole weights of the layers at work.
        gradients: As they come out of the backward pass.
        optimizer: The fp32 copy, two moments, and the fp32 gradient the step works on.
        activations: What the backward pass needs of the layers.
        logits: The output layer's scores, their logarithms and gradients.
        buffers: DeepSpeed's communication buckets.
        host: Beside a GPU: offloaded states in the host's memory.
        heap: What a heap takes for a byte of tensors; on a GPU torch's allocator counts exactly.
    """

    libraries: int
    weights: int
    gathered: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buffers: int
    host: int = 0
    heap: float = 1.0

    @property
    def states(self) -> int:
        return self.weights + self.gathered + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        """All of it at once, as at the start of the backward pass of a later step."""
        tensors = self.states + self.activations + self.logits + self.buffers
        return self.libraries + int(tensors * self.heap)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"states": self.states, "peak": self.peak}


@dataclass(frozen=True)
class Settings:
    """What of a DeepSpeed file decides memory.

    Attributes:
        stage: 0 without DeepSpeed.
        offload_optimizer: States of the optimizer lie in the host's memory.
        offload_parameters: The weights too.
        bucket: Elements of the reduce bucket.
        overlap: Two of them, so that one fills while the other is sent.
        live: Elements of whole weights that ZeRO-3 keeps gathered.
    """

    stage: int = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False
    bucket: int = 0
    overlap: bool = False
    live: int = 0


def settings_of(args: Recipe, hidden: int) -> Settings:
    """Those of a recipe's DeepSpeed file; ``"auto"`` as transformers fills it in."""
    if not args.get("deepspeed"):
        return Settings()
    zero = json.loads(Path(args["deepspeed"]).read_text("utf-8")).get("zero_optimization", {})
    stage = int(zero.get("stage", 0))

    def number(key: str, auto: int) -> int:
        value = zero.get(key, auto)
        return auto if value == "auto" else int(float(value))

    def offloaded(key: str) -> bool:
        return str((zero.get(key) or {}).get("device", "none")) not in ("none", "None")

    return Settings(
        stage,
        offloaded("offload_optimizer"),
        offloaded("offload_param"),
        number("reduce_bucket_size", hidden * hidden if stage == 3 else 500_000_000),
        bool(zero.get("overlap_comm", stage == 3)),
        number("stage3_max_live_parameters", 1_000_000_000),
    )


@dataclass(frozen=True)
class Shape:
    """What of a model decides memory; from its configuration alone.

    Attributes:
        size: Its parameters.
        vocabulary: Scores of the output layer for each token.
        hidden: Width of a layer.
        layers: How many.
        config: Its ``transformers`` configuration.
    """

    size: ModelSize
    vocabulary: int
    hidden: int
    layers: int
    config: Any

    @property
    def text(self) -> Any:
        """The text model's configuration, which is a part of a multimodal model's."""
        return getattr(self.config, "text_config", self.config)


def shape_of(args: Recipe, config: Any = None) -> Shape:
    """A recipe's model; its configuration is read where none is given."""
    if config is None:
        config = config_of(args["model_name_or_path"])
    with hushed():
        size = model_size(config, str(args["model_name_or_path"]), args)
    text = getattr(config, "text_config", config)
    return Shape(size, text.vocab_size, text.hidden_size, text.num_hidden_layers, config)


def activations(args: Recipe, shape: Shape, *, checkpointing: bool | None = None) -> int:
    """What autograd keeps of a forward pass of one micro-batch, in bytes.

    The first layers are run on fake tensors (:mod:`torch._subclasses.fake_tensor`), which have
    shapes and no storage, and every tensor saved for the backward pass is counted once.

    Args:
        args: The resolved recipe; its blocks, their length, its precision, what it trains.
        shape: The model.
        checkpointing: With gradient checkpointing or without; by default as the recipe says.
    """
    if checkpointing is None:
        checkpointing = not args.get("disable_gradient_checkpointing")
    rank = args.get("lora_rank", 8) if args.method == "lora" else 0
    blocks, length = args.micro_batch, args.block_size
    one, two = (_saved(shape.text, n, blocks, length, args.precision, rank) for n in (1, 2))
    layer, rest = two - one, one - (two - one)
    layers = shape.layers
    if args.method == "freeze" and not checkpointing:
        count = args.get("freeze_trainable_layers", 2)
        layers = count if 0 < count < layers else layers  # the first ones need no gradient
    if not checkpointing:
        return layer * layers + rest
    # The input of each layer is kept, and one layer at a time in full.
    width = 4 if args.precision == "float32" else 2
    return blocks * length * shape.hidden * width * layers + layer + rest


def _saved(config: Any, layers: int, *sizes: Any) -> int:
    return _counted(type(config), config.to_json_string(use_diff=False), layers, *sizes)


@cache
def _counted(
    kind: type, config_json: str, layers: int, blocks: int, length: int, dtype: str, rank: int
) -> int:
    import torch
    import transformers
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept: dict[int, Any] = {}
    with hushed(), FakeTensorMode():
        config = kind.from_dict(json.loads(config_json))
        config.num_hidden_layers, config.torch_dtype = layers, getattr(torch, dtype)
        model = transformers.AutoModelForCausalLM.from_config(config)
        decoder = body_of(model)
        if rank:
            _adapt(decoder, rank)
        own = [*model.parameters(), *model.buffers()]
        weights = {tensor.untyped_storage()._cdata for tensor in own}

        def keep(tensor: Any) -> Any:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage
            return tensor

        tokens = torch.zeros(blocks, length, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            decoder(input_ids=tokens, use_cache=False)
        return sum(storage.nbytes() for storage in kept.values())


def _adapt(module: Any, rank: int) -> None:
    """Puts a low-rank adapter beside every linear layer; peft's own cannot be moved when fake."""
    import torch

    class Adapted(torch.nn.Module):
        def __init__(self, base: Any) -> None:
            super().__init__()
            self.base = base.requires_grad_(False)
            kind = {"bias": False, "dtype": base.weight.dtype}
            self.down = torch.nn.Linear(base.in_features, rank, **kind)
            self.up = torch.nn.Linear(rank, base.out_features, **kind)

        def forward(self, x: Any) -> Any:
            return self.base(x) + self.up(self.down(x)) * 2.0

    for parameter in module.parameters(recurse=False):
        parameter.requires_grad_(False)
    for name, child in module.named_children():
        if isinstance(child, torch.nn.Linear):
            setattr(module, name, Adapted(child))
        else:
            _adapt(child, rank)


def of_worker(args: Recipe, shape: Shape) -> Memory:
    """The peak of one worker of a resolved recipe."""
    width = 4 if args.precision == "float32" else 2
    workers, on_gpu = args.workers, not args.use_cpu
    settings = settings_of(args, shape.hidden)
    blocks, length = args.micro_batch, args.block_size
    logits = 0  # Liger never holds them all
    if not args.get("enable_liger_kernel"):
        logits = blocks * length * shape.vocabulary * score_bytes(shape.config, args.precision)
    states = _states(shape.size, settings, workers, width)
    kept, kind = activations(args, shape), args.method
    if not on_gpu:  # both seen in the runs that LIBRARIES and HEAP are from
        states["gathered"] *= 2 if kind == "full" else 1  # gloo gathers into its own memory
        kept = int(kept * (LORA_HOLES if kind == "lora" else 1))
    return Memory(
        libraries=CUDA_CONTEXT if on_gpu else LIBRARIES,
        heap=1.0 if on_gpu else HEAP,
        activations=kept,
        logits=logits,
        **states,
    )


def _states(size: ModelSize, settings: Settings, workers: int, width: int) -> dict[str, int]:
    """Weights, gradients, the optimizer's states and buckets of one worker, in bytes."""
    every = size.parameters
    trained = size.parameters if size.trained is None else size.trained
    stage, shard = settings.stage, 1 / workers
    bucket = min(settings.bucket, trained) * width
    # Gradients go through a bucket to their owners; from stage 2 on they live only there, and a
    # second bucket is made to send it.
    weights = width * every * (shard if stage == 3 else 1)
    gradients = width * trained * (shard if stage >= 2 else 1)
    buffers = bucket * (2 if stage >= 2 or settings.overlap else 1) * (stage > 0)
    optimizer = (12 + 4) * trained * (shard if stage >= 1 else 1)
    gathered = 0
    if stage == 3:
        gathered = width * max(min(every, settings.live), 2 * size.largest_layer)
    host = 0
    if settings.offload_optimizer:  # DeepSpeed 0.16.9 keeps the gradients where the optimizer is
        host, optimizer, gradients = host + HOST * (optimizer + gradients), 0, 0
    if settings.offload_parameters:
        host, weights = host + HOST * weights, 0
    found = {"weights": weights, "gathered": gathered, "gradients": gradients}
    found |= {"optimizer": optimizer, "buffers": buffers, "host": host}
    return {name: int(value) for name, value in found.items()}
