"""Every number of a recipe has a range, and what is out of it is refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpt_helpers import recipes
from cpt_helpers.config import ranges, resolution
from cpt_helpers.errors import ConfigError
from cpt_helpers.run import PROJECT

RECIPES = sorted((PROJECT / "train-configs").glob("*.yaml"))
# Numbers that no continued pre-training reads: other stages, generation, LLaMA-Factory's own export
# and inference, images, sound, video, other launchers, deprecated names.
UNREAD = """
audio_sampling_rate badam_verbose dpo_label_smoothing eval_num_beams export_quantization_bit
export_quantization_maxlen export_quantization_nsamples export_size fsdp_min_num_params
generation_max_length generation_num_beams image_max_pixels image_min_pixels kto_chosen_weight
kto_rejected_weight ld_alpha length_penalty local_rank max_length max_new_tokens num_beams
past_index per_gpu_eval_batch_size per_gpu_train_batch_size ppo_buffer_size ppo_epochs ppo_target
pref_beta pref_ftx ref_model_quantization_bit repetition_penalty reward_model_quantization_bit
sglang_maxlen sglang_mem_fraction sglang_tp_size simpo_gamma temperature top_k top_p tpu_num_cores
video_fps video_max_pixels video_maxlen video_min_pixels vllm_gpu_util vllm_max_lora_rank
vllm_maxlen
"""


def test_every_number_has_a_range() -> None:
    """A key of a new release is decided upon: a range, or a place among those nothing reads."""
    numbers = {key for key, action in recipes.known_keys().items() if action.type in (int, float)}
    in_table = {key for key in ranges.RANGES if "." not in key}
    assert in_table | set(UNREAD.split()) == numbers
    assert not in_table & set(UNREAD.split())


def test_libraries_defaults_are_in_range() -> None:
    for key, allowed in ranges.RANGES.items():
        action = recipes.known_keys().get(key)
        if action is not None and action.default is not None:
            assert allowed.holds(action.default), (key, action.default)
    for path in RECIPES:
        resolution.check_keys(str(path), {})


def outside(allowed: ranges.Range) -> list[float]:
    """Values next to a range's ends, and what is no number at all."""
    values = [allowed.lowest if allowed.above else allowed.lowest - 3, *allowed.never]
    if allowed.highest < float("inf"):
        values.append(allowed.highest if allowed.below else allowed.highest + 1)
    return values


@pytest.mark.parametrize("key", ranges.RANGES)
def test_numbers_out_of_range_are_refused_before_anything_is_fetched(key: str) -> None:
    allowed = ranges.RANGES[key]
    outer, _, inner = key.partition(".")
    action = recipes.known_keys()[outer]
    values = outside(allowed)
    if action.type is not int:
        values += [float("nan"), float("inf"), float("-inf")]
    for value in values:
        overrides = {outer: {inner: value} if inner else value}
        with pytest.raises(ConfigError) as refused:
            resolution.check_keys("cpt_cpu.yaml", overrides)
        message = str(refused.value)
        assert key in message and allowed.unit in message and "OVERRIDES" in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"learning_rate": -1}, r"learning_rate: -1 is out of range(?s:.*)more than 0, at most 1"),
        ({"learning_rate": "1e1"}, r"learning_rate: 10.0 is out of range"),
        ({"warmup_ratio": 5}, r"warmup_ratio: 5 is out of range"),
        ({"weight_decay": -1}, r"weight_decay: -1 is out of range"),
        ({"temperature": float("nan")}, r"temperature: nan is not a finite number"),
        ({"save_total_limit": 0}, r"save_total_limit: 0(?s:.*)leave the key out to keep every"),
        ({"save_total_limit": -3}, r"save_total_limit: -3(?s:.*)until the disk is full"),
        ({"save_steps": 2.5}, r"save_steps: 2.5(?s:.*)a whole number from 1 on"),
        ({"save_steps": 0}, r"save_steps: 0(?s:.*)save_strategy"),
        ({"max_steps": 0}, r"max_steps: 0(?s:.*)num_train_epochs"),
        ({"lr_scheduler_kwargs": {"min_lr_rate": "1e-1"}}, r"YAML reads 1e-1 as text: write 1.0e-"),
        ({"resources_per_worker": {"CPU": -1}}, r"resources_per_worker\.CPU: -1 is out of range"),
        ({"resources_per_worker": {"CPU": "all"}}, r"resources_per_worker\.CPU: 'all' is not a"),
        (
            {"optim_args": None, "lr_scheduler_kwargs": {"x": [1, float("inf")]}},
            r"kwargs\.x\.1: inf",
        ),
    ],
)
def test_a_refused_number_says_what_to_write(overrides: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolution.check_keys("cpt_cpu.yaml", overrides)


def test_where_a_wrong_number_stands(tmp_path: Path) -> None:
    text = (PROJECT / "train-configs" / "cpt_cpu.yaml").read_text()
    mine = tmp_path / "mine.yaml"
    mine.write_text(text.replace("cutoff_len: 256", "cutoff_len: -256"))
    line = text.splitlines().index(next(x for x in text.splitlines() if "cutoff_len:" in x)) + 1
    with pytest.raises(ConfigError, match=rf"mine\.yaml:{line}\b"):
        resolution.check_keys(str(mine), {})
