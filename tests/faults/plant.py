"""Causes faults in the workers of a real training. The package has no code for it.

``CPT_FAULTS`` holds a list of faults as JSON; each happens once in a run:

``{"what": "step", "ranks": [1], "step": 5}``      killed between backward and optimizer step
``{"what": "shard", "ranks": [1], "step": 6}``     killed while DeepSpeed writes a rank's shard
``{"what": "hand-over", "ranks": [0], "step": 6}`` killed while files go to the storage
``{"what": "hang", "ranks": [1], "step": 5}``      stopped (SIGSTOP) before a backward pass
``{"what": "final", "ranks": [0]}``                killed when the final model is to be written
``{"what": "fill", "ranks": [0], "step": 8, "path": …, "leave": 5e5}`` the disk is filled up to that
``{"what": "slow", "seconds": 0.5}``               every step takes longer, for a signal in time
``{"what": "witness"}``                            each rank records its node and environment
"""

from __future__ import annotations

import io
import json
import os
import signal
import time
from pathlib import Path
from typing import Any


def train_loop(config: dict[str, Any]) -> None:
    """Plants the faults, then calls the package's own loop."""
    import ray.train

    from cpt_helpers.train.worker import train_loop as package_loop

    folder = Path(config["storage"], config["run"])
    rank = ray.train.get_context().get_world_rank()
    for number, fault in enumerate(json.loads(os.environ.get("CPT_FAULTS", "[]"))):
        _plant(fault, folder / f".fault-{number}-rank-{rank}", rank)
    package_loop(config)
    if "witness" in os.environ.get("CPT_FAULTS", ""):
        _record_environment(folder / f".witness-{rank}.json")


def _plant(fault: dict[str, Any], mark: Path, rank: int) -> None:
    what = fault["what"]
    if what == "witness":
        return
    if what == "slow":
        _around_each_step(lambda step: time.sleep(fault["seconds"]))
        return
    if rank not in fault["ranks"] or mark.exists():
        return

    def strike() -> None:
        mark.touch()
        os.kill(os.getpid(), signal.SIGSTOP if what == "hang" else signal.SIGKILL)

    if what == "nan":
        _spoil_loss(fault["step"])
    elif what == "fill":
        _around_each_step(lambda step: _fill(fault) if step + 1 == fault["step"] else None)
    elif what == "hang":
        _in_backward(fault["step"], strike)
    elif what == "final":
        _in_final_save(strike)
    elif what == "step":
        _around_each_step(lambda step: strike() if step + 1 == fault["step"] else None)
    elif what == "shard":
        _in_shard(fault["step"], strike)
    elif what == "hand-over":
        _in_hand_over(fault["step"], strike)
    else:
        raise ValueError(what)


def _record_environment(path: Path) -> None:
    import hashlib

    import ray
    import torch.distributed

    import cpt_helpers

    token = os.environ.get("HF_TOKEN", "")
    seen = {
        "node": ray.get_runtime_context().get_node_id(),
        "debug": str(torch.distributed.get_debug_level()),
        "token": hashlib.sha256(token.encode()).hexdigest(),
        "package": str(cpt_helpers.__file__),
        "scratch": sorted(p.name for p in Path("/tmp/ray").glob("session_2*")),
    }
    path.write_text(json.dumps(seen))


def _fill(fault: dict[str, Any]) -> None:
    path = Path(fault["path"])
    free = os.statvfs(path.parent).f_bavail * os.statvfs(path.parent).f_frsize
    path.write_bytes(bytes(max(free - int(fault["leave"]), 0)))


def _around_each_step(act: Any) -> None:
    from transformers import Trainer

    step_of = Trainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = step_of(self, *args, **kwargs)
        act(self.state.global_step)
        return loss

    Trainer.training_step = training_step


def _spoil_loss(step: int) -> None:
    """Makes one step's loss NaN."""
    from transformers import Trainer

    step_of = Trainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = step_of(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step + 1 == step else loss

    Trainer.training_step = training_step


def _in_backward(step: int, strike: Any) -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.engine import DeepSpeedEngine

    backward = DeepSpeedEngine.backward

    def hung(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.global_steps + 1 == step:
            strike()
        return backward(self, *args, **kwargs)

    DeepSpeedEngine.backward = hung


def _in_final_save(strike: Any) -> None:
    from transformers import Trainer

    save = Trainer.save_model

    def final(self: Any, output_dir: Any = None, *args: Any, **kwargs: Any) -> None:
        if output_dir is None:
            strike()
        save(self, output_dir, *args, **kwargs)

    Trainer.save_model = final


def _in_shard(step: int, strike: Any) -> None:
    import torch

    save = torch.save

    def half(state: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if f"checkpoint-{step}/" in str(file) and "optim_states" in str(file):
            whole = io.BytesIO()
            save(state, whole)
            Path(file).write_bytes(whole.getvalue()[: whole.tell() // 2])
            strike()
        save(state, file, *args, **kwargs)

    torch.save = half


def _in_hand_over(step: int, strike: Any) -> None:
    from cpt_helpers.checkpoints import manifests

    move = manifests.move_own

    def one_file(written: Path, target: Path, rank: int) -> Any:
        if written.name == f"checkpoint-{step}":
            (target / f"global_step{step}").mkdir(parents=True, exist_ok=True)
            shard = next(written.glob(f"global_step*/*pp_rank_{rank}_*_optim_states.pt"))
            shard.replace(target / f"global_step{step}" / shard.name)
            strike()
        return move(written, target, rank)

    manifests.move_own = one_file
