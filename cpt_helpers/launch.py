"""The driver's side of a training: place it on the cluster, follow it, and say what went wrong.

LLaMA-Factory 0.9.3 builds its own ``TorchTrainer`` for GPUs only, without a failure policy; this
one places the same training function on GPUs or CPUs.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import checkpoints, environment, show, tracking
from .errors import TrainingError
from .run import Run

# Said by libraries on the way down; what they wrap is what the reader needs.
_WRAPPERS = ("ray.", "torch.distributed.elastic", "concurrent.futures")


def train(run: Run, args: dict[str, Any]) -> dict[str, Any]:
    """Trains a run to its end, or takes up one that was interrupted; a finished one is left alone.

    Args:
        run: Whose storage, logs and events are used.
        args: The resolved recipe (``config.load(run)``).

    Returns:
        ``steps``, ``tokens``, ``tokens_per_second`` (median over steady steps), ``seconds`` (from
        the launch to the end), ``seconds_to_first_step``, ``workers``, ``zero_stage``, ….

    Raises:
        UnreadyError: The workers cannot be placed.
        TrainingError: A worker failed; with its own last lines and its log's path.
    """
    if run.state == "complete":
        print(f"the run '{run.name}' is trained: nothing to do, {run.folder} is as it was")
        return summary(run)
    resumed = checkpoints.latest(run)
    if run.state == "started":
        at = f"from step {resumed.step}, {resumed.path}" if resumed else "from its start"
        print(f"the run '{run.name}' was interrupted: it goes on {at}")
    with environment.cluster() as ray:
        each = {kind: float(n) for kind, n in _resources(args).items()}
        environment.require_workers(ray, args.get("ray_num_workers", 1), each)
        run.logs.mkdir(parents=True, exist_ok=True)
        launched = time.time()
        _note(run, launched)
        with show.follow(run):
            _fit(run, args, resumed)
    return summary(run)


def summary(run: Run) -> dict[str, Any]:
    """What a training came to, from its events.

    Raises:
        TrainingError: It has not come to its end.
    """
    events = run.events()
    if run.state != "complete":
        raise TrainingError(
            f"the run '{run.name}' has not been trained to its end",
            where=run.metrics,
            do="run notebook 04_train for it: it goes on where it stopped",
        )
    start = next(event for event in events if event["event"] == "start")
    end = events[-1]
    launched = json.loads((run.logs / "launched.json").read_text())["launched"]
    steps = [event for event in events if event["event"] == "step"]
    tokens = start["tokens_per_step"]
    return {
        "steps": end["step"],
        "tokens": end["step"] * tokens,
        "tokens_per_second": round(tokens / statistics.median(s["seconds"] for s in steps), 1),
        "seconds": round(end["time"] - launched[0], 1),
        "seconds_to_first_step": round(
            steps[0]["time"]
            - steps[0]["seconds"] * (steps[0]["step"] - start["step"])
            - launched[0],
            1,
        ),
        "workers": start["world_size"],
        "zero_stage": start["zero_stage"],
        "optimizer": start["optimizer"],
        "parameters": start["parameters"],
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "launches": len(launched),
    }


def _resources(args: dict[str, Any]) -> dict[str, float]:
    return args.get("resources_per_worker") or {"GPU": 1}


def _fit(run: Run, args: dict[str, Any], resumed: checkpoints.Checkpoint | None) -> None:
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    from ray.train import Checkpoint, RunConfig, ScalingConfig
    from ray.train.base_trainer import TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    from .worker import train_loop

    resources = _resources(args)
    on_gpu = bool(resources.get("GPU"))
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={
            "args": args,
            "metrics": str(run.metrics),
            "logs": str(run.logs),
            "variables": run.name,
        },
        scaling_config=ScalingConfig(
            num_workers=args.get("ray_num_workers", 1),
            resources_per_worker=resources,
            trainer_resources={"CPU": 0},  # the coordinating actor only waits
            use_gpu=on_gpu,
            placement_strategy=args.get("placement_strategy", "PACK"),
        ),
        torch_config=TorchConfig(
            backend="nccl" if on_gpu else "gloo", timeout_s=args.get("ddp_timeout", 1800)
        ),
        run_config=RunConfig(name=run.name, storage_path=str(run.storage), verbose=0),
        resume_from_checkpoint=Checkpoint(resumed.path) if resumed else None,
    )
    try:
        with _quiet(), tracking.variables_for_workers(run, args):
            trainer.fit()
    except (TrainingFailedError, RuntimeError, ValueError) as error:
        raise _readable(run, error) from None


def evidence(run: Run) -> list[str]:
    """Lines of the ranks' logs that say how many they were and what DeepSpeed made."""
    marks = ("world size:", "ZeRO stage", "ZeRO-3", "Zero3")
    found: list[str] = []
    for log in sorted(run.logs.glob("rank-*.log")):
        for mark in marks:
            lines = [line for line in _last_attempt(log) if mark in line]
            if lines:
                said = re.sub(r"^.*?(>> |\] (?=\S))", "", lines[0]).strip()
                found.append(f"{log.stem}: {said}"[:160])
    return found


@contextmanager
def _quiet() -> Any:
    """Keeps Ray Tune's own words (where it saves, how to open TensorBoard) out of the notebook."""
    import contextlib
    import io
    import logging
    import warnings

    loggers = [logging.getLogger(name) for name in ("ray.train", "ray.tune", "ray")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _note(run: Run, launched: float) -> None:
    path = run.logs / "launched.json"
    before = json.loads(path.read_text())["launched"] if path.is_file() else []
    path.write_text(json.dumps({"launched": [*before, launched]}))


def _readable(run: Run, error: Exception) -> TrainingError:
    """A failed training as one error: the first cause a rank named, its last lines, its log."""
    logs = sorted(run.logs.glob("rank-*.log"))
    tails = {log: _last_attempt(log) for log in logs}
    failed = [log for log in logs if any(_is_exception(line) for line in tails[log])]
    # The rank that failed first ended first; the others only lost their connection to it.
    log = min(failed, key=lambda p: p.stat().st_mtime) if failed else (logs[0] if logs else None)
    if log is None:
        reason = _last_line(str(error))
        return TrainingError(
            f"the workers could not be started: {reason}",
            where=run.folder,
            do="look at Ray's own logs in /tmp/ray/session_latest/logs on the node that failed",
        )
    lines = tails[log]
    causes = [line for line in lines if _is_exception(line)]
    died = "" if causes else " (it ended without a word: killed, or out of memory)"
    reason = causes[-1] if causes else _last_line(str(error))
    return TrainingError(
        f"training failed in a worker{died}: {reason}",
        where="\n".join([f"{log}, its last lines:", *lines[-12:]]),
        do="mend the cause and run this again: it goes on from the newest checkpoint "
        "(a change of the recipe needs a new RUN_NAME)",
    )


def _last_attempt(log: Path) -> list[str]:
    text = log.read_text("utf-8", errors="replace").replace("\r", "\n")
    attempt = re.split(r"^--- rank \d+, .*$", text, flags=re.MULTILINE)[-1]
    return [line.rstrip()[:300] for line in attempt.splitlines() if line.strip()]


def _is_exception(line: str) -> bool:
    return bool(re.match(r"^([A-Za-z_][\w.]*)?(Error|Exception|Interrupt|Exit)\b.*", line))


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no reason was given"
