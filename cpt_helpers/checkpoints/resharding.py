"""Converts a checkpoint for another number of workers, with DeepSpeed's universal format."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..run import Run
from ..setup.machine import require_room
from .manifests import Checkpoint


def universal(run: Run, checkpoint: Checkpoint, world_size: int) -> Path:
    """Converts a checkpoint to DeepSpeed's universal format, for another number of ranks.

    DeepSpeed 0.16.9 converts ZeRO-3 shards whose optimizer has one flat group per rank.

    Args:
        run: The run; the result is in ``<run>/universal/``.
        checkpoint: A whole ZeRO-3 checkpoint.
        world_size: Number of ranks that will load it.

    Returns:
        A folder to resume from, with ``"checkpoint": {"load_universal": true}``.

    Raises:
        CheckpointError: It cannot be converted; with the reason.
    """
    shards = next(checkpoint.model.glob("global_step*"))
    _require_convertible(checkpoint, shards, world_size)
    folder = universal_folder(run, checkpoint.step, world_size)
    if (folder / "latest_universal").is_file():
        return folder
    shutil.rmtree(folder.parent, ignore_errors=True)
    size = sum(path.stat().st_size for path in shards.glob("*_optim_states.pt"))
    # The converter writes every slice, then the merged states next to them.
    require_room(run.storage, 2 * size / 2**30, "room to convert the checkpoint's shards")
    part = folder.with_name(f".{folder.name}")
    part.mkdir(parents=True)
    converted = part / f"{shards.name}_universal"
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(shards), "--output_folder", str(converted)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not (part / "latest_universal").is_file():
        last = (done.stderr.strip().splitlines() or ["no reason was given"])[-1]
        raise CheckpointError(
            f"DeepSpeed could not convert the checkpoint of step {checkpoint.step}: {last}",
            where=shards,
            do=f"resume with ray_num_workers: {checkpoint.world_size}",
        )
    name = "zero_pp_rank_{}_mp_rank_00_model_states.pt"
    for rank in range(checkpoint.world_size, world_size):  # counters and schedule, equal in all
        shutil.copyfile(converted / name.format(0), converted / name.format(rank))
    for file in checkpoint.model.iterdir():
        if file.is_file() and not file.name.startswith("rng_state"):
            shutil.copyfile(file, part / file.name)
    part.rename(folder)
    return folder


def universal_folder(run: Run, step: int, world_size: int) -> Path:
    """The folder of a checkpoint that was converted for another number of ranks."""
    return run.folder / "universal" / f"step-{step}-for-{world_size}"


def settings_for_universal(settings: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's settings to load a universal checkpoint.

    DeepSpeed 0.16.9 fills a ZeRO-3 optimizer's first sub-group only, so there must be only one.
    """
    zero = settings.get("zero_optimization", {}) | {"sub_group_size": 10**12}
    return settings | {"zero_optimization": zero, "checkpoint": {"load_universal": True}}


def _require_convertible(checkpoint: Checkpoint, shards: Path, world_size: int) -> None:
    import torch

    reason = ""
    optimizers = sorted(shards.glob("*_optim_states.pt"))
    if (checkpoint.model / "adapter_config.json").is_file():
        reason = "it is a LoRA adapter's, and DeepSpeed converts whole models only"
    else:
        state = torch.load(optimizers[0], map_location="cpu", mmap=True, weights_only=False)
        state = state["optimizer_state_dict"]
        stage, groups = state.get("zero_stage"), state.get("fp32_flat_groups", ())
        if stage != 3:
            reason = f"it has ZeRO stage {stage}, and only stage 3 was tested"
        elif len(groups) != 1:
            reason = f"its optimizer has {len(groups)} groups, and DeepSpeed converts only one"
    if reason:
        raise CheckpointError(
            f"the checkpoint of step {checkpoint.step} was written by {checkpoint.world_size} "
            f"workers and cannot be resumed by {world_size}: {reason}",
            where=checkpoint.path,
            do=f"resume with ray_num_workers: {checkpoint.world_size}, or start a new run from "
            f"its weights: OVERRIDES = {{'model_name_or_path': '{checkpoint.model}'}}",
        )
