"""Memory per worker: model states by ZeRO stage, activations, logits and buffers.

Model states are counted as DeepSpeed's estimators count them. Activations and logits are counted on
tensors without storage: one layer runs forward, the output layer and the loss run in both
directions.
"""

from __future__ import annotations

import json
import weakref
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..recipes import Recipe
from ..redirect import hushed
from ..setup.models import config_of, empty
from .flops import ModelSize, experts_of, model_size

# Resident memory without a model: Python, torch, DeepSpeed, LLaMA-Factory, Ray and their heaps.
# Measured in the workers of benchmarks/memory.py (2026-11-22, two EPYC cores).
LIBRARIES = 740 * 2**20
HEAP = 1.12  # glibc's heap keeps freed memory (machine.KEEP_MEMORY); from the same runs
LORA_HOLES = 1.45  # short-lived outputs of adapters fragment the heap between the activations
HOST = 1.5  # of the offloaded bytes: the factor of DeepSpeed's estimators for buffers on the host
CUDA_CONTEXT = 600 * 2**20  # GPU memory of a process that torch does not count, NCCL's included


@dataclass(frozen=True)
class Memory:
    """The peak of one worker in bytes, on its GPU, or in the host's memory without a GPU."""

    libraries: int  # without a model; on a GPU, the CUDA context
    weights: int  # in the precision of the training; under ZeRO-3 the shard
    gathered: int  # whole weights of the active layers under ZeRO-3
    gradients: int  # in the precision of the training
    optimizer: int  # the fp32 copy, two moments, and the fp32 gradient of the step
    activations: int  # tensors that the backward pass needs of the layers
    logits: int  # the output layer's scores, their logarithms and gradients
    buffers: int  # DeepSpeed's communication buckets
    host: int = 0  # offloaded states in the host's memory, next to a GPU
    # bytes of the heap per byte of tensors. Torch's allocator on a GPU counts exactly
    heap: float = 1.0

    @property
    def states(self) -> int:
        return self.weights + self.gathered + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        """The sum, which is reached at the start of the backward pass from the second step on."""
        tensors = self.states + self.activations + self.logits + self.buffers
        return self.libraries + int(tensors * self.heap)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"states": self.states, "peak": self.peak}


@dataclass(frozen=True)
class Settings:
    """The settings of a DeepSpeed file that decide memory."""

    stage: int = 0  # the ZeRO stage; 0 without DeepSpeed
    offload_optimizer: bool = False  # whether the optimizer's states are in the host's memory
    offload_parameters: bool = False  # whether the weights are there too
    bucket: int = 0  # elements of the reduce bucket
    overlap: bool = False  # whether there are two buckets, one to fill while the other is sent
    live: int = 0  # elements of whole weights that ZeRO-3 keeps gathered


def settings_of(args: Recipe, hidden: int = 1) -> Settings:
    """The settings of a recipe's DeepSpeed file, ``"auto"`` as transformers fills it in.

    ``hidden`` is the width of the model's layers, which decides ``"auto"`` buckets.
    """
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
    """A model's size and its ``transformers`` configuration."""

    size: ModelSize
    config: Any

    @property
    def text(self) -> Any:
        """The configuration of the text model, which is a part of a multimodal model's."""
        return getattr(self.config, "text_config", self.config)


def shape_of(args: Recipe, config: Any = None) -> Shape:
    """The shape of a recipe's model; its configuration is read if none is given.

    Raises:
        AssetError: The model's configuration is not available.
    """
    name = str(args["model_name_or_path"])
    config = config_of(name) if config is None else config
    with hushed():
        return Shape(model_size(config, name, args), config)


def activations(args: Recipe, shape: Shape, *, checkpointing: bool | None = None) -> int:
    """Bytes that autograd keeps of a forward pass of one micro-batch.

    One and two layers run on fake tensors (:mod:`torch._subclasses.fake_tensor`), which have shapes
    and no storage. Every tensor that is saved for the backward pass counts once.

    The routing of a mixture of experts depends on the data, so fake tensors cannot pass through it.
    It is counted as the dense model with the same sizes whose intermediate size is experts per
    token × intermediate size of an expert, plus that of a shared expert.

    ``checkpointing`` turns gradient checkpointing on or off; by default the recipe decides.
    """
    if checkpointing is None:
        checkpointing = not args.get("disable_gradient_checkpointing")
    rank = args.get("lora_rank", 8) if args.method == "lora" else 0
    blocks, length, layers = args.micro_batch, args.block_size, shape.text.num_hidden_layers
    config: Any = _dense(shape.text)
    text, tokens = config.to_json_string(use_diff=False), (blocks, length)
    one, two = (
        _saved_bytes(config.__class__, text, n, tokens, args.precision, rank) for n in (1, 2)
    )
    layer, rest = two - one, one - (two - one)
    if checkpointing:  # the input of each layer is kept, and one layer at a time in full
        width = 4 if args.precision == "float32" else 2
        return blocks * length * shape.text.hidden_size * width * layers + layer + rest
    if args.method == "freeze":
        count = args.get("freeze_trainable_layers", 2)
        layers = count if 0 < count < layers else layers  # the first ones need no gradient
    return layer * layers + rest


def _dense(config: Any) -> Any:
    """The dense configuration that stands for a mixture of experts in :func:`activations`."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    experts, per_token = experts_of(config)
    if experts == 1:
        return config
    family = {"mixtral": "mistral"}.get(config.model_type, config.model_type.removesuffix("_moe"))
    family = family if family != config.model_type and family in CONFIG_MAPPING else "llama"
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    shared = getattr(config, "shared_expert_intermediate_size", None) or 0
    sizes = config.to_dict() | {"intermediate_size": per_token * width + shared}
    sizes.pop("model_type")
    return AutoConfig.for_model(family, **sizes)


@cache
def _saved_bytes(
    config_class: Any, config_json: str, layers: int, tokens: tuple[int, int], dtype: str, rank: int
) -> int:
    import torch
    import transformers
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept: dict[int, Any] = {}
    with hushed(), FakeTensorMode():
        config = config_class.from_dict(json.loads(config_json))
        config.num_hidden_layers, config.torch_dtype = layers, getattr(torch, dtype)
        model = transformers.AutoModelForCausalLM.from_config(config)
        decoder = _decoder(model)
        if rank:
            _add_adapters(decoder, rank)
        tensors = [*model.parameters(), *model.buffers()]
        weights = {tensor.untyped_storage()._cdata for tensor in tensors}

        def keep(tensor: Any) -> Any:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            decoder(input_ids=torch.zeros(tokens, dtype=torch.long), use_cache=False)
        return sum(storage.nbytes() for storage in kept.values())


def _add_adapters(module: Any, rank: int) -> None:
    """Adds a low-rank adapter to every linear layer; peft's own cannot be moved when fake."""
    import torch

    class Adapted(torch.nn.Module):
        def __init__(self, base: Any) -> None:
            super().__init__()
            self.base = base.requires_grad_(False)
            options = {"bias": False, "dtype": base.weight.dtype}
            self.down = torch.nn.Linear(base.in_features, rank, **options)
            self.up = torch.nn.Linear(rank, base.out_features, **options)

        def forward(self, x: Any) -> Any:
            return self.base(x) + self.up(self.down(x)) * 2.0

    for parameter in module.parameters(recurse=False):
        parameter.requires_grad_(False)
    for name, child in module.named_children():
        if isinstance(child, torch.nn.Linear):
            setattr(module, name, Adapted(child))
        else:
            _add_adapters(child, rank)


def score_bytes(config: Any, dtype: str) -> int:
    """Bytes that a model's class needs at the peak per score of its output layer.

    Classes differ: all make an fp32 copy and its logarithms,
    ``Gemma3ForConditionalGeneration`` (transformers 4.52.4) a second copy, and Gemma 2 caps the
    scores in between. So every tensor of the scores' size is counted while it lives. The model's
    outputs live too: the trainer drops them before the backward pass, but their memory seldom has
    a size that is used again.

    ``dtype`` is ``"bfloat16"``, ``"float16"`` or ``"float32"``.
    """
    return _score_bytes(config.__class__, config.to_json_string(use_diff=False), dtype)


@cache
def _score_bytes(config_class: Any, config_json: str, dtype: str) -> int:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class Outputs(BaseModelOutputWithPast):
        def __getattr__(self, name: str) -> None:
            return None  # other outputs of a class, such as image features

    alive: dict[int, int] = {}

    class PeakOfScores(TorchDispatchMode):
        peak = 0

        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None):
            made = op(*args, **(kwargs or {}))
            for tensor in made if isinstance(made, tuple) else (made,):
                scores = isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (vocabulary,)
                if scores and tensor.numel() >= (length - 1) * vocabulary:
                    storage = tensor.untyped_storage()
                    if storage._cdata not in alive:
                        alive[storage._cdata] = storage.nbytes()
                        weakref.finalize(storage, alive.pop, storage._cdata, None)
            self.peak = max(self.peak, sum(alive.values()))
            return made

    precision = getattr(torch, dtype)
    with hushed():
        config = config_class.from_dict(json.loads(config_json))
        text = getattr(config, "text_config", config)
        text.num_hidden_layers, vocabulary = 1, text.vocab_size
        model = empty(config).to(precision).train()
    length = text.hidden_size + 256  # longer than the width: the layer's own gradient is smaller
    sizes: Any = (1, length, text.hidden_size)
    states: Any = torch.zeros(sizes, device="meta", dtype=precision, requires_grad=True)
    _decoder(model).forward = lambda *_, **__: Outputs(last_hidden_state=states)
    tokens = torch.zeros(1, length, device="meta", dtype=torch.long)
    with hushed(), PeakOfScores() as seen:
        outputs = model(input_ids=tokens, labels=tokens, use_cache=False)
        outputs.loss.backward()
    return round(seen.peak / length / vocabulary)


def _decoder(model: Any) -> Any:
    """A model without its output layer; not all classes have ``get_decoder``."""
    table = model.get_input_embeddings()
    return next(child for child in model.children() if table in child.modules())


def of_worker(args: Recipe, shape: Shape) -> Memory:
    """The peak of one worker of a resolved recipe."""
    logits = 0  # the Liger kernel never holds all of them
    if not args.get("enable_liger_kernel"):
        tokens = args.micro_batch * args.block_size
        logits = tokens * shape.text.vocab_size * score_bytes(shape.config, args.precision)
    settings = settings_of(args, shape.text.hidden_size)
    states = _states(shape.size, settings, args.workers, 4 if args.precision == "float32" else 2)
    kept = activations(args, shape)
    if not args.use_cpu:
        return Memory(CUDA_CONTEXT, activations=kept, logits=logits, **states)
    # Both factors were measured in the runs that LIBRARIES and HEAP come from.
    states["gathered"] *= 2 if args.method == "full" else 1  # gloo gathers into its own memory
    kept = int(kept * (LORA_HOLES if args.method == "lora" else 1))
    return Memory(LIBRARIES, activations=kept, logits=logits, heap=HEAP, **states)


def _states(size: ModelSize, settings: Settings, workers: int, width: int) -> dict[str, Any]:
    """Weights, gradients, the optimizer's states and buckets of one worker, in bytes."""
    trained = size.parameters if size.trained is None else size.trained
    stage, shard = settings.stage, 1 / workers
    bucket = min(settings.bucket, trained) * width
    weights = width * size.parameters * (shard if stage == 3 else 1)
    # From stage 2 on, a gradient is only on the worker that owns it, and a second bucket sends it.
    gradients = width * trained * (shard if stage >= 2 else 1)
    buffers = bucket * (2 if stage >= 2 or settings.overlap else 1) * (stage > 0)
    optimizer = (12 + 4) * trained * (shard if stage >= 1 else 1)
    live = max(min(size.parameters, settings.live), 2 * size.largest_layer)
    host = 0.0
    if settings.offload_optimizer:  # DeepSpeed 0.16.9 keeps the gradients where the optimizer is
        host, optimizer, gradients = HOST * (optimizer + gradients), 0, 0
    if settings.offload_parameters:
        host, weights = host + HOST * weights, 0
    return {
        "weights": int(weights),
        "gathered": int(width * live * (stage == 3)),
        "gradients": int(gradients),
        "optimizer": int(optimizer),
        "buffers": int(buffers),
        "host": int(host),
    }
