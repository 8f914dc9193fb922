"""Other families, methods and ZeRO stages: correct and reproducible results, or an error.

Every training is real, but without Ray, so that many fit into minutes (:mod:`forked`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch

from cpt_helpers.data import packing
from cpt_helpers.recipes import DEEPSPEED_CONFIGS
from cpt_helpers.run import Run
from cpt_helpers.setup import assets

pytestmark = pytest.mark.training

TESTS = Path(__file__).parent
BLOCK, STEPS, BATCH = 64, 4, 4
# Fill bytes of new memory: not zero, and different, so that unwritten memory has an effect.
HEAPS = ("165", "85", "23")
METHODS = ("full", "freeze", "lora")


@pytest.fixture(scope="module")
def home(storage: Path, tiny_gemma3: Path, documents: list[str]) -> Path:
    """A folder with every family's model and the blocks that all of them train on."""
    from datasets import Dataset, DatasetDict
    from transformers import AutoTokenizer

    folder = storage / "families"
    tokenizer = AutoTokenizer.from_pretrained(tiny_gemma3)
    for family in families.FAMILIES:
        families.build(family, folder / family, tokenizer)
    blocks = packing.pack(documents, tokenizer, BLOCK).blocks[:200]
    columns = {"input_ids": blocks, "attention_mask": [[1] * BLOCK] * len(blocks)}
    DatasetDict({"train": Dataset.from_dict(columns)}).save_to_disk(folder / "blocks")
    return folder


def job(
    home: Path,
    name: str,
    family: str,
    method: str = "full",
    stage: int = 3,
    workers: int = 2,
    **options: Any,
) -> dict[str, Any]:
    """A job of :mod:`forked`; ``options`` are keys of the recipe or of the job."""
    recipe = {
        "stage": "pt",
        "do_train": True,
        "model_name_or_path": str(home / family),
        "finetuning_type": method,
        "freeze_trainable_layers": 1,
        "lora_rank": 4,
        # LLaMA-Factory's `all` finds linear layers; GPT-2 has convolutions of width 1 instead.
        "lora_target": "c_attn" if family == "gpt2" else "all",
        "template": "empty",
        "dataset": "blocks",
        "tokenized_path": str(home / "blocks"),
        "cutoff_len": BLOCK,
        "output_dir": str(home / name / "output"),
        "use_cpu": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH // workers,
        "ray_num_workers": workers,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "disable_gradient_checkpointing": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "ddp_timeout": 60,
    }
    if stage:
        recipe["deepspeed"] = str(DEEPSPEED_CONFIGS / f"ds_z{stage}_config.json")
    own = {key: options.pop(key) for key in ("before", "resume", "local_rank") if key in options}
    args = recipe | options
    return {"run": name, "storage": str(home), "workers": workers, "args": args, **own}


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, list[int]]]:
    """Trains jobs one after the other; returns the exit codes by name."""

    def train(jobs: list[dict[str, Any]], heap: str = HEAPS[0]) -> dict[str, list[int]]:
        file = tmp_path_factory.mktemp("jobs") / "jobs.json"
        file.write_text(json.dumps(jobs))
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "forked", str(file)],
            capture_output=True,
            text=True,
            env=os.environ
            | {"PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}", "MALLOC_PERTURB_": heap},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
        return {name: codes for name, codes, _ in lines}

    return train


def log(home: Path, name: str) -> str:
    return (home / name / "logs" / "rank-0.log").read_text(errors="replace")


def trained(home: Path, name: str) -> tuple[list[float], str]:
    """A training's losses, and the sha256 of its weights."""
    events = Run(name, home).events()
    assert events and events[-1]["event"] == "end", log(home, name)[-3000:]
    weights = next((home / name / "output").glob("*model.safetensors"))
    return [e["loss"] for e in events if e["event"] == "step"], assets.sha256(weights)


def plain(home: Path, family: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same training as a plain loop with transformers: its losses and weights."""
    import transformers as hf
    from datasets import load_from_disk

    auto = hf.AutoModelForImageTextToText if "vision" in family else hf.AutoModelForCausalLM
    model = auto.from_pretrained(home / family, torch_dtype=torch.float32).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_tower" not in name and "multi_modal" not in name)
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=1e-3, weight_decay=0.0)
    blocks = load_from_disk(home / "blocks")["train"].with_format("torch")
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(42)).tolist()
    losses = []
    for step in range(STEPS):
        ids = blocks[order[step * BATCH : (step + 1) * BATCH]]["input_ids"]
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        # transformers' trainer divides by all labels, each block's first one too.
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"
        ) / (ids.numel() if _counts_first(model) else ids[:, 1:].numel())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def _counts_first(model: Any) -> bool:
    return "vision" not in type(model).__name__.lower() and not hasattr(model, "vision_tower")


@pytest.fixture(scope="module")
def plainly(home, train) -> None:
    """Trains every family once with all weights, two workers and ZeRO-3."""
    jobs = [job(home, f"plain-{family}", family) for family in families.FAMILIES]
    codes = train(jobs)
    assert set(map(tuple, codes.values())) == {(0, 0)}, codes


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_family_trains_as_a_plain_loop_does(home, plainly, family: str) -> None:
    from safetensors.torch import load_file

    losses, _ = trained(home, f"plain-{family}")
    expected, weights = plain(home, family)
    assert losses == pytest.approx(expected, abs=2e-4)
    ours = load_file(home / f"plain-{family}" / "output" / "model.safetensors")
    for key, tensor in weights.items():
        if key in ours:
            torch.testing.assert_close(ours[key], tensor, atol=2e-4, rtol=2e-3, msg=key)


def repeated(home: Path, train: Any, combinations: list[tuple[str, str, int, int]]) -> None:
    """Trains each combination three times with other fill bytes; all results must be equal."""
    found: dict[str, set[Any]] = {}
    for heap in HEAPS:
        jobs = []
        for family, method, stage, workers in combinations:
            name = f"{family}-{method}-z{stage}-{workers}-heap{heap}"
            jobs.append(job(home, name, family, method, stage, workers))
        codes = train(jobs, heap)
        failed = [name for name, own in codes.items() if any(own)]
        assert not failed, f"{failed}: {log(home, failed[0])[-2000:]}"
        for each in jobs:
            losses, weights = trained(home, each["run"])
            found.setdefault(each["run"].rsplit("-", 1)[0], set()).add((tuple(losses), weights))
    different = {name: results for name, results in found.items() if len(results) != 1}
    assert not different
    for family, method, stage, _ in combinations:  # one worker and two: equal within rounding
        own = [
            next(iter(found[f"{family}-{method}-z{stage}-{n}"]))[0]
            for n in (1, 2)
            if f"{family}-{method}-z{stage}-{n}" in found
        ]
        assert own[0] == pytest.approx(own[-1], abs=5e-4), (family, method, stage)


def test_repeated_trainings_are_equal(home, train) -> None:
    """Every family with every method; the ZeRO stages alternate."""
    combinations = []
    for number, family in enumerate(families.FAMILIES):
        for other, method in enumerate(METHODS):
            combinations.append((family, method, (number + other) % 3 + 1, 2))
    combinations += [("qwen2", "full", stage, 1) for stage in (1, 2, 3)]
    combinations += [("qwen2", "full", 3, 2), ("qwen2", "full", 0, 2)]  # 0: DDP, no DeepSpeed
    repeated(home, train, combinations)


@pytest.mark.families
@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_stage_and_both_numbers_of_workers(home, train, family: str) -> None:
    repeated(
        home,
        train,
        [(family, method, s, n) for method in METHODS for s in (1, 2, 3) for n in (1, 2)],
    )


def test_results_of_collectives_are_waited_for(home, train) -> None:
    """Collectives that run only when they are waited for give the same losses and weights."""
    pairs = [("qwen2", "full", s) for s in (1, 2, 3)] + [
        ("gpt2", "freeze", 3),
        ("llama", "lora", 3),
    ]
    jobs = []
    for family, method, stage in pairs:
        name = f"async-{family}-{method}-z{stage}"
        jobs.append(job(home, name, family, method, stage))
        jobs.append(job(home, f"{name}-lazy", family, method, stage, before=["lazily"]))
    codes = train(jobs)
    assert set(map(tuple, codes.values())) == {(0, 0)}, codes
    for eager, lazy in zip(jobs[::2], jobs[1::2], strict=True):
        assert trained(home, eager["run"]) == trained(home, lazy["run"])


def test_garbage_weights_are_refused_before_the_first_step(home, train) -> None:
    """Uncorrected DeepSpeed does not wait and loads garbage; no step is trained with it."""
    name = "garbage"
    codes = train([job(home, name, "qwen2", before=["lazily_without_waiting"])])
    assert codes == {name: [1, 1]}
    output = log(home, name)
    assert "WeightsError" in output and "differ from the files they were loaded from" in output
    assert "self_attn.q_proj.weight differs in" in output
    assert str(home / "qwen2") in output
    assert Run(name, home).events() == []


def test_a_large_model_is_compared_in_part(home, train) -> None:
    jobs = [job(home, "sampled", "qwen2", before=["sampled"])]
    jobs.append(job(home, "bad-sample", "qwen2", before=["lazily_without_waiting", "sampled"]))
    assert train(jobs) == {"sampled": [0, 0], "bad-sample": [1, 1]}
    compared = Run("sampled", home).events()[0]["weights"]
    assert compared["parameters"] == 26 and 0 < compared["share"] < 1
    assert compared["bytes"] <= 2 * 50_000
    assert "WeightsError" in log(home, "bad-sample")


def test_a_diverging_training_ends_with_an_event_and_no_later_checkpoint(home, train) -> None:
    hot = {"learning_rate": 1e9, "max_steps": 12, "before": ["own_checkpoints"]}
    hot |= {"save_strategy": "steps", "save_steps": 1, "bf16": False}
    jobs = [job(home, "diverged", "llama", **hot), job(home, "diverged-gpt2", "gpt2", **hot)]
    codes = train(jobs)
    assert all(code == 1 for own in codes.values() for code in own), codes
    for name in codes:
        run = Run(name, home)
        event = next(e for e in run.events() if e["event"] == "diverged")
        assert event["attempt"] == "forked.0" and 1 < event["step"] <= 12
        assert "gradient norm" in event["reason"] or "loss" in event["reason"]
        assert "DivergedError: the training diverged at step" in log(home, name)
        assert run.state != "complete"
        saves = [e["step"] for e in run.events() if e["event"] == "save"]
        assert max(saves, default=0) < event["step"]
        assert not any(torch_is_nan(e["loss"]) for e in run.events() if e["event"] == "step")


def torch_is_nan(value: float) -> bool:
    return value != value


def test_experts_of_frozen_layers_stay_frozen(home, plainly, train) -> None:
    """LLaMA-Factory would also train expert 1 of layer 0 where layer 1 is trained."""
    from safetensors.torch import load_file

    name = "frozen-experts"
    assert train([job(home, name, "mixtral", "freeze", 2)]) == {name: [0, 0]}
    before = load_file(home / "mixtral" / "model.safetensors")
    after = load_file(home / name / "output" / "model.safetensors")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(".layers.1." in key for key in changed)


def test_resuming_on_two_nodes_with_another_number_of_workers(home, train) -> None:
    """Each rank is the first on its node and loads the slice of its global rank."""
    from cpt_helpers.checkpoints import manifests, resharding

    steps = {"save_strategy": "steps", "save_steps": 2, "before": ["own_checkpoints"]}
    assert train([job(home, "one", "qwen2", workers=1, **steps)]) == {"one": [0]}
    newest = manifests.listing(Run("one", home))[0]
    assert newest.step == 2 and newest.whole
    for name, places in (("two", {}), ("two-nodes", {"local_rank": 0})):
        run = Run(name, home)
        resharding.universal(run, newest, 2)
        handle = newest.handle() | {"path": str(_copied(newest.path, run))}
        assert train([job(home, name, "qwen2", resume=handle, **places)]) == {name: [0, 0]}, log(
            home, name
        )[-3000:]
    one, two, nodes = (trained(home, name) for name in ("one", "two", "two-nodes"))
    assert nodes == two
    assert two[0] == pytest.approx(one[0][2:], abs=2e-4)


def test_checkpoints_written_after_a_conversion_can_be_resumed(home, train) -> None:
    """Each rank writes its own model states, also where it loaded a universal checkpoint."""
    from cpt_helpers.checkpoints import manifests, resharding

    steps = {"save_strategy": "steps", "save_steps": 2, "before": ["own_checkpoints"]}
    assert train([job(home, "first", "qwen2", workers=1, **steps)]) == {"first": [0]}
    oldest = manifests.listing(Run("first", home))[0]
    run = Run("converted", home)
    resharding.universal(run, oldest, 2)
    handle = oldest.handle() | {"path": str(_copied(oldest.path, run))}
    assert train([job(home, "converted", "qwen2", resume=handle, **steps)]) == {"converted": [0, 0]}
    newest = manifests.listing(run)[-1]
    states = sorted(p.name for p in newest.model.glob("global_step*/*model_states.pt"))
    assert [name.split("_")[3] for name in states] == ["0", "1"]
    more = job(home, "converted", "qwen2", resume=newest.handle(), max_steps=6)
    assert train([more]) == {"converted": [0, 0]}, log(home, "converted")[-3000:]
    losses = [e["loss"] for e in run.events() if e["event"] == "step"]
    assert len(losses) == 4, "steps 3 to 6"


def test_shards_of_another_checkpoint_are_an_error(home, train) -> None:
    """The shards are whole but of another checkpoint: the ranks compare their loaded weights."""
    from cpt_helpers.checkpoints import manifests

    steps = {"save_strategy": "steps", "save_steps": 2, "before": ["own_checkpoints"]}
    assert train([job(home, "mixed-up", "qwen2", **steps)]) == {"mixed-up": [0, 0]}
    run = Run("mixed-up", home)
    second, fourth = manifests.listing(run)
    for shard in second.model.glob("global_step2/*"):
        own = fourth.model / "global_step4" / shard.name
        own.write_bytes(shard.read_bytes())
    handle = fourth.handle() | {"world_size": 2}
    codes = train([job(home, "mixed-up", "qwen2", max_steps=6, resume=handle)])
    assert codes == {"mixed-up": [1, 1]}
    assert "WeightsError" in log(home, "mixed-up")
    assert f"the weights in {fourth.path}" in log(home, "mixed-up")


def _copied(checkpoint: Path, run: Run) -> Path:
    import shutil

    target = run.folder / checkpoint.relative_to(checkpoint.parents[1])
    shutil.copytree(checkpoint, target)
    return target
