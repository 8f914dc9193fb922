"""The plan: its counts against what torch counts, its memory against DeepSpeed's, its words."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import pytest
from transformers import AutoConfig

from cpt_helpers import recipes
from cpt_helpers.__main__ import main
from cpt_helpers.config import flops, hardware, memory, planning
from cpt_helpers.errors import ParameterError
from cpt_helpers.setup import models

Z3 = str(recipes.DEEPSPEED_CONFIGS / "ds_z3_config.json")


@pytest.fixture(scope="module")
def args(tiny_gemma3: Path) -> dict:
    recipe = recipes.read_recipe("cpt_cpu.yaml")[1]
    return recipe | {
        "model_name_or_path": str(tiny_gemma3),
        "bf16": False,
        "cutoff_len": 64,
        "deepspeed": Z3,
    }


@pytest.fixture(scope="module")
def gemma() -> tuple[dict, memory.Shape]:
    recipe = recipes.read_recipe("cpt_deepspeed.yaml")[1] | {"deepspeed": Z3}
    return recipe, memory.shape_of(recipe, planning.known_config("gemma-3-4b-pt"))


LAYERS = 6
METHODS = {
    "full": recipes.Recipe(finetuning_type="full"),
    "freeze": recipes.Recipe(finetuning_type="freeze", freeze_trainable_layers=2),
    "lora": recipes.Recipe(finetuning_type="lora", lora_rank=4, lora_target="all"),
}


def decoder(family: str, **own: object) -> object:
    """A model's configuration of a few small layers, of one of transformers' families."""
    if family == "gpt2":
        return AutoConfig.for_model("gpt2", n_embd=64, n_layer=LAYERS, n_head=4, vocab_size=512)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}
    return AutoConfig.for_model(family, **sizes | heads | own)


FAMILIES = {
    "tied": decoder("llama", tie_word_embeddings=True),
    "untied": decoder("llama", tie_word_embeddings=False),
    "gpt2": decoder("gpt2"),
    "experts": decoder("mixtral", num_local_experts=4, num_experts_per_tok=2),
}


def counted_by_torch(model: object, tokens: object, opened: int | None = None) -> int:
    """FLOPs of a forward and a backward pass. Under gradient checkpointing LLaMA-Factory asks for
    the gradient of the lowest trained layer's input: ``opened`` is that layer."""
    from torch.utils.flop_counter import FlopCounterMode

    def open_input(module: object, args: tuple, kwargs: dict) -> None:
        args[0].requires_grad_(True)

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if opened is not None:
        layers = base.transformer.h if hasattr(base, "transformer") else base.model.layers
        layers[opened].register_forward_pre_hook(open_input, with_kwargs=True)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_those_torch_counts(family: str, method: str) -> None:
    """Counted from the model at work, and from its configuration before there is one."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(FAMILIES[family], attn_implementation="eager")
    if method == "freeze":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(f".{n}." in name for n in (LAYERS - 2, LAYERS - 1)))
    if method == "lora":
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", bias="none"))
    tokens = torch.arange(2 * 64).reshape(2, 64) % 500
    opened = {"full": None, "freeze": LAYERS - 2, "lora": 0}[method]
    seen = counted_by_torch(model, tokens, opened) / tokens.numel()
    of_model = flops.flops_per_token(model.config, *flops.text_parameters(model), 64)
    assert of_model == pytest.approx(
        seen, rel=0.02
    )  # GPT-2's biases are counted and not multiplied
    if family == "gpt2" and method == "lora":
        return  # its layers are Conv1D, to which LLaMA-Factory's adapters do not go
    size = planning.model_size(FAMILIES[family], family, METHODS[method])
    planned = flops.flops_per_token(FAMILIES[family], size.text, size.backward, 64)
    assert planned == pytest.approx(seen, rel=0.02)


def test_flops_without_gradient_checkpointing() -> None:
    """The lowest trained layer's input then needs no gradient: at most a few per cent less."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(FAMILIES["tied"], attn_implementation="eager")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".5." in name)
    tokens = torch.arange(2 * 64).reshape(2, 64) % 500
    seen = counted_by_torch(model, tokens) / tokens.numel()
    ours = flops.flops_per_token(model.config, *flops.text_parameters(model), 64)
    assert seen <= ours <= 1.03 * seen


def test_windows_are_narrower(args: dict) -> None:
    """Eager attention multiplies over the whole block; the count takes the hidden part off."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        args["model_name_or_path"], attn_implementation="eager"
    )
    tokens = torch.arange(2 * 64).reshape(2, 64) % 500
    seen = counted_by_torch(model, tokens) / tokens.numel()
    every, backward = flops.text_parameters(model)
    assert every == backward.trained == sum(p.numel() for p in model.parameters()), "tied, once"
    ours = flops.flops_per_token(model.config, every, backward, 64)
    width = model.config.num_attention_heads * model.config.head_dim
    hidden = 12 * (width * 2 * 64 - flops.attention_widths(model.config, 64))
    assert ours + hidden == pytest.approx(seen, rel=0.02)


MIXTURES = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96,
        "shared_expert_intermediate_size": 64,
    },
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96},
}  # fmt: skip


@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_of_experts_has_a_plan(family: str) -> None:
    """Its activations are those of a dense model as wide as the experts of one token."""
    config = decoder(family, **MIXTURES[family])
    args = recipes.Recipe(model_name_or_path=family, cutoff_len=32, finetuning_type="full")
    shape = memory.shape_of(args, config)
    peak = memory.of_worker(args, shape)
    width = {"mixtral": 2 * 128, "qwen2_moe": 2 * 96 + 64, "qwen3_moe": 2 * 96}[family]
    dense = decoder({"mixtral": "mistral"}.get(family, family[:5]), intermediate_size=width)
    expected = memory.activations(args, memory.shape_of(args, dense))
    assert peak.activations == pytest.approx(expected, rel=0.02)
    assert len(hardware.memory_table(args, shape)) == 5


def test_the_plan_freezes_what_the_training_freezes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts with the number of a trained layer stay frozen in all other layers."""
    from llamafactory.hparams import FinetuningArguments
    from llamafactory.model import adapter

    from cpt_helpers.train import patches

    config = decoder("mixtral", num_local_experts=8, num_experts_per_tok=2)
    size = planning.model_size(config, "mixtral", METHODS["freeze"])
    model = models.empty(config)
    monkeypatch.setattr(adapter, "_setup_freeze_tuning", adapter._setup_freeze_tuning)
    patches.freeze_whole_layers()
    arguments = FinetuningArguments(finetuning_type="freeze", freeze_trainable_layers=2)
    adapter._setup_freeze_tuning(model, arguments, True, False)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert size.trained == sum(p.numel() for p in trained.values())
    assert {name.split(".")[2] for name in trained} == {"4", "5"}


def test_frozen_layers_and_images_cost_less(gemma: tuple[dict, memory.Shape]) -> None:
    """Gemma-3-4B: text passes 3.88e9 of its 4.3e9 parameters; eight layers' backward is short."""
    recipe, shape = gemma
    freeze = recipe | {"finetuning_type": "freeze", "freeze_trainable_layers": 8}
    other = memory.shape_of(freeze, planning.known_config("gemma-3-4b-pt")).size
    assert shape.size.text == shape.size.backward.reached == shape.size.trained == 3_880_263_168
    assert other.text == shape.size.text and other.backward.lowest == 26
    both = [
        flops.flops_per_token(shape.config, size.text, size.backward, 512)
        for size in (shape.size, other)
    ]
    assert both[1] / both[0] == pytest.approx(0.52, abs=0.01)


def test_activations_are_those_autograd_keeps(args: dict) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args["model_name_or_path"])
    weights = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        shape = args["per_device_train_batch_size"], args["cutoff_len"]
        model.model(input_ids=torch.zeros(shape, dtype=torch.long), use_cache=False)
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    counted = memory.activations(args, memory.shape_of(args))
    assert counted == pytest.approx(real, rel=0.05)
    less = memory.activations(args, memory.shape_of(args), checkpointing=True)
    assert less < 0.75 * counted


def peak_of_tensors(work: Callable[[], object]) -> int:
    """The most bytes of tensors that were alive at once, as torch's profiler saw them."""
    from torch._C._profiler import _EventType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    todo, found = list(seen.profiler.kineto_results.experimental_event_tree()), []
    while todo:
        event = todo.pop()
        todo += event.children
        if event.tag == _EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields.alloc_size))
    return max(accumulate(size for _, size in sorted(found)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "gemma3_text", "gemma3", "mixtral", "gpt2", "qwen2"]
)
def test_scores_are_those_a_real_pass_holds(family: str, dtype: str) -> None:
    """A large vocabulary on a narrow model, so that its scores are nearly all there is."""
    import torch

    vocabulary, length = 40_000, 256
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    size |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": vocabulary}
    if family == "gpt2":
        size = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": vocabulary}
    if family == "gemma3":
        tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        tower |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
        size = {"text_config": size, "vision_config": tower, "mm_tokens_per_image": 4}
    shape = AutoConfig.for_model(family, **size)
    with torch.device("cpu"):
        model = models._auto_class(shape).from_config(shape).to(getattr(torch, dtype)).train()
    tokens = torch.arange(length)[None] + 3
    mask = torch.ones_like(tokens)

    def step(held: bool) -> None:
        outputs = model(input_ids=tokens, labels=tokens, attention_mask=mask, use_cache=False)
        loss = outputs.loss
        if not held:
            del outputs  # as the trainer does
        loss.backward()
        model.zero_grad()

    peaks = {h: peak_of_tensors(lambda h=h: step(h)) / vocabulary / length for h in (True, False)}
    ours = memory.score_bytes(shape, dtype)
    assert ours == pytest.approx(peaks[True], rel=0.06)
    assert peaks[False] < 1.03 * ours


def test_states_next_to_deepspeeds_estimate(gemma: tuple[dict, memory.Shape]) -> None:
    """All weights in 16 bits: 1 and 2 agree; 3 counts the 16-bit gradients' shard too."""
    recipe, shape = gemma
    n = shape.size.parameters
    size = planning.ModelSize("all", n, shape.size.largest_layer, n)
    whole = memory.Shape(size, shape.config)
    estimates = hardware.deepspeed_estimates(size, 4)
    states = hardware.memory_table(recipe, whole).set_index("ZeRO")["model states"]
    assert states["1"] == pytest.approx(estimates["1"][0], abs=0.02)
    assert states["2"] == pytest.approx(estimates["2"][0], abs=0.02)
    sharded_gradients = 2 * n / 4 / 2**30
    assert states["3"] == pytest.approx(estimates["3"][0] + sharded_gradients, abs=0.02)


def test_what_fits_and_what_to_change(gemma: tuple[dict, memory.Shape]) -> None:
    recipe, shape = gemma
    (as_it_is,) = hardware.fits(recipe, shape, "L40S")
    assert as_it_is.fits and as_it_is.change == ""
    tried = hardware.fits(recipe, shape, "L4")
    assert not tried[0].fits and tried[-1].fits
    assert "ds_z3_offload" in tried[-1].change
    wasteful = recipe | {"per_device_train_batch_size": 16}
    first, second, *_ = hardware.fits(wasteful, shape, "L40S")
    assert not first.fits
    assert second.change == "per_device_train_batch_size: 1, gradient_accumulation_steps: 32"
    assert second.memory.peak == as_it_is.memory.peak
    assert first.memory.logits == 16 * as_it_is.memory.logits


def test_hours_and_price(gemma: tuple[dict, memory.Shape]) -> None:
    recipe, shape = gemma
    (known,) = hardware.cost(recipe, shape, 2_156_000, "L40S", price_per_hour=36.0)
    assert known.hours == pytest.approx(1000 / 3600) and known.price == pytest.approx(10.0)
    slow, fast = hardware.cost(recipe, shape, 1000, "H100")
    assert slow.hours > 10 * fast.hours
    assert hardware.cost(recipe, shape, 1000, None) == []
    (told,) = hardware.cost(recipe, shape, 7200, None, tokens_per_second=2.0)
    assert told.hours == 1.0


@pytest.mark.parametrize(
    "other",
    [
        {"finetuning_type": "lora"},
        {"finetuning_type": "freeze"},
        {"per_device_train_batch_size": 4},
        {"gradient_accumulation_steps": 1},
        {"cutoff_len": 2048},
        {"ray_num_workers": 8},
        {"disable_gradient_checkpointing": True},
        {"enable_liger_kernel": True},
        {"deepspeed": str(recipes.DEEPSPEED_CONFIGS / "ds_z2_config.json")},
        {"deepspeed": str(recipes.DEEPSPEED_CONFIGS / "ds_z3_offload_config.json")},
    ],
    ids=lambda other: ",".join(other) + str(*other.values())[-24:],
)
def test_a_measured_speed_holds_for_what_was_measured(
    gemma: tuple[dict, memory.Shape], other: dict
) -> None:
    recipe, shape = gemma
    assert len(hardware.cost(recipe, shape, 1000, "L40S")) == 1
    bounds = hardware.cost(recipe | other, shape, 1000, "L40S")
    assert len(bounds) == 2 and not any("the guide's settings" in b.source for b in bounds)


def test_memory_that_stays_unused(gemma: tuple[dict, memory.Shape]) -> None:
    recipe, shape = gemma
    found = hardware.unused(recipe, shape, "L40S")
    assert found.changes == {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    assert "with the same global batch; there is room for" in str(found)
    room = found.free + memory.of_worker(recipe, shape).peak
    for blocks, fits in ((found.largest, True), (found.largest + 1, False)):
        changed = recipe | {"per_device_train_batch_size": blocks}
        peak = memory.of_worker(changed, shape).peak
        assert (peak <= hardware.FILLED * room) is fits
    long = hardware.unused(recipe | {"gradient_accumulation_steps": 12}, shape, "L40S")
    assert long.changes == {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}
    assert long.peak == memory.of_worker(recipe | long.changes, shape).peak
    alone = hardware.unused(recipe | {"gradient_accumulation_steps": 1}, shape, "L40S")
    assert not alone.changes and "fewer workers" in str(alone)
    full = recipe | {"per_device_train_batch_size": found.largest}
    assert hardware.unused(full, shape, "L40S") is None


def test_offloaded_states_and_gradients_are_on_the_host(gemma: tuple[dict, memory.Shape]) -> None:
    """DeepSpeed's own estimate for a host: 18 bytes a parameter and a factor of 1.5."""
    recipe, shape = gemma
    file = str(recipes.DEEPSPEED_CONFIGS / "ds_z3_offload_config.json")
    one = memory.of_worker(recipe | {"deepspeed": file, "ray_num_workers": 1}, shape)
    estimate = hardware.deepspeed_estimates(shape.size, 1)["3 + offload"][1] * 2**30
    assert one.host == pytest.approx(estimate, rel=0.03)
    assert one.weights == one.gradients == one.optimizer == 0


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-40GB", "A100-40G"),
        ("NVIDIA A100-SXM4-80GB", "A100-80G"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L40", None),
        ("NVIDIA H100 PCIe", "H100-PCIE"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", "H200-NVL"),
        ("H100-NVL", "H100-NVL"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_devices_by_name(name: str, key: str | None) -> None:
    assert flops.gpu_named(name) == key


def test_a_gpu_nobody_knows(gemma: tuple[dict, memory.Shape]) -> None:
    with pytest.raises(ParameterError, match="unknown GPU 'L41'"):
        hardware.gpu_of(gemma[0], "L41")
    assert hardware.gpu_of(gemma[0]) == "L40S"


def test_the_plan_in_words(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    given = ["--tokens", "409600", "--price", "12", "--storage", str(tmp_path)]
    assert main(["plan", "cpt_deepspeed.yaml", *given]) == 0
    said = capsys.readouterr().out
    assert "3,880,263,168 trained" in said and "8 blocks of 512 = 4,096 tokens" in said
    assert "800 blocks" in said and "200, 819,200 tokens in all" in said
    assert "L40S, 44.4 GiB: fits" in said
    assert "warning: 47 % of an L40S is unused" in said
    assert "per_device_train_batch_size: 2, gradient_accumulation_steps: 1 would use" in said
    assert "7 minutes, 1.27 at 12 per hour" in said  # 819,200 tokens at 4 x 539 a second
    assert main(["plan", "cpt_deepspeed.yaml", "--gpu", "L4", "--storage", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "does not fit" in said and "fits with" in said and "known once step 2" in said
    assert not list(tmp_path.iterdir()), "nothing may be written"


def test_what_each_method_trains(gemma: tuple[dict, memory.Shape]) -> None:
    recipe, shape = gemma
    table = hardware.methods(recipe | {"lora_rank": 999}, 20)
    rows = table.set_index("method").to_dict("index")
    trained = {m: int(row["parameters trained"].replace(",", "")) for m, row in rows.items()}
    assert trained["full"] == shape.size.trained
    # A layer: four attention matrices, three of the MLP, four norms of the width, two of the heads.
    layer = 2560 * 256 * (8 + 4 + 4 + 8) + 3 * 2560 * 10240 + 4 * 2560 + 2 * 256
    assert trained["freeze"] == 8 * layer
    # Rank 16 beside each of the seven matrices: its inputs and its outputs.
    ends = 2 * (2560 + 2048) + 2 * (2560 + 1024) + 3 * (2560 + 10240)
    assert trained["lora"] == 34 * 16 * ends
    memory_of = [rows[m]["GiB per worker"] for m in ("full", "freeze", "lora")]
    assert memory_of == sorted(memory_of, reverse=True)
    # Gathered weights, the trained ones' states, and the frozen ones in the shards; bf16.
    frozen = shape.size.parameters - trained["freeze"]
    expected = 2 * shape.size.parameters + 12 * trained["freeze"] + 2 * frozen
    assert rows["freeze"]["GiB per checkpoint"] == pytest.approx(expected / 2**30, rel=1e-3)
