"""The driver's side of a training: place it on the cluster, follow it, and say what went wrong.

LLaMA-Factory 0.9.3 builds its own ``TorchTrainer`` for GPUs only, without a failure policy; this
one places the same training function on GPUs or CPUs and has Ray restart it when a worker dies.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import shutil
import statistics
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

from .. import display
from ..checkpoints import manifests, resharding
from ..config import preflight
from ..errors import CptError, Interrupted, TrainingError
from ..recipes import Recipe
from ..run import Run
from ..setup import cluster
from . import failures, tracking
from .worker_env import handed_to_workers, set_variables

RETRIES = 3  # restarts after a failure, by default
_SETTLE_SECONDS = 30.0  # until a shared storage shows the driver what a worker wrote last


def train(
    run: Run, args: Recipe, *, retries: int = RETRIES, workers: int | None = None
) -> dict[str, Any]:
    """Trains a run to its end, or takes up one that was interrupted; a finished one is left alone.

    Args:
        run: Whose storage, logs and events are used.
        args: The resolved recipe (``recipes.load(run)``).
        retries: How often a training whose workers died is restarted, from the newest whole
            checkpoint.
        workers: Another number of workers than the recipe's, with the same global batch.

    Returns:
        ``steps``, ``tokens``, ``tokens_per_second`` (median over steady steps), ``mfu`` (of the
        peak of all workers' devices), ``peak_memory`` (bytes, the worker with the most),
        ``seconds`` (from the launch to the end), ``seconds_to_first_step``, ``workers``, ….

    Raises:
        UnreadyError: The workers cannot be placed.
        StorageError: The storage has too little room for the run.
        CheckpointError: No checkpoint is whole, or not for this number of workers.
        RunExistsError: Another process is training this run.
        TrainingError: Workers failed more often than ``retries``, or would fail again; with a
            worker's own last lines and its log's path.
        Interrupted: Stopped by hand.
    """
    if run.state == "complete":
        print(f"the run '{run.name}' is trained: nothing to do, {run.folder} is as it was")
        tracking.catch_up(run, args)
        return summary(run)
    args = args.with_workers(workers)
    preflight.before_launch(run, args)
    with run.held():
        resumed = manifests.latest(run)
        if run.state == "started" or resumed:
            at = f"from step {resumed.step}, {resumed.path}" if resumed else "from its start"
            print(f"the run '{run.name}' was interrupted: it goes on {at}")
        preflight.room(run, args)
        preflight.model(args)
        world_size = args.workers
        if resumed and args.get("deepspeed") and resumed.world_size != world_size:
            print(f"its checkpoint is converted from {resumed.world_size} to {world_size} workers")
            resharding.universal(run, resumed, world_size)
        # Ray's start is waiting for other processes: half of a launch's imports fit into it.
        threading.Thread(target=importlib.import_module, args=["torch"], daemon=True).start()
        with cluster.ray_cluster() as ray:
            args = preflight.placed(ray, args)
            preflight.raise_if_wrong(preflight.nodes(run, args, ray))
            run.logs.mkdir(parents=True, exist_ok=True)
            attempts = _Attempts(run, args, retries, ray)
            with display.follow(run, attempts.names), tracking.mirrored(run, args):
                _fit(run, args, resumed, attempts)
                _wait_for_end(run)
        shutil.rmtree(run.folder / "universal", ignore_errors=True)
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
    starts = [event for event in events if event["event"] == "start"]
    end = events[-1]
    launched = json.loads((run.logs / "launched.json").read_text())["launched"]
    steps = [event for event in events if event["event"] == "step"]
    tokens = starts[-1]["tokens_per_step"]
    if not steps:
        raise TrainingError(
            f"the run '{run.name}' logged no step",
            where=run.metrics,
            expected="logging_steps of at most max_steps",
            do="train it under another RUN_NAME with logging_steps: 1",
        )
    first = steps[0]["time"] - steps[0]["seconds"] * steps[0]["step"]
    return {
        "steps": end["step"],
        "tokens": end["step"] * tokens,
        "tokens_per_second": round(tokens / statistics.median(s["seconds"] for s in steps), 1),
        "tokens_per_second_per_worker": round(
            tokens / statistics.median(s["seconds"] for s in steps) / starts[-1]["world_size"], 1
        ),
        "mfu": _median_of(steps, "mfu"),
        "peak_memory": max([*(end.get("memory") or [0]), *(s.get("memory") or 0 for s in steps)]),
        "seconds": round(end["time"] - launched[0], 1),
        "seconds_to_first_step": round(
            first - max((t for t in launched if t < first), default=launched[-1]), 1
        ),
        "workers": starts[-1]["world_size"],
        "zero_stage": starts[-1]["zero_stage"],
        "optimizer": starts[-1]["optimizer"],
        "parameters": starts[-1]["parameters"],
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "launches": len(launched),
        "starts": len(starts),
    }


def _median_of(steps: list[dict[str, Any]], key: str) -> float | None:
    values = [step[key] for step in steps if step.get(key) is not None]
    return statistics.median(values) if values else None


def _wait_for_end(run: Run) -> None:
    """Waits until the storage shows that the training ended: NFS and FUSE mounts may lag."""
    until = time.monotonic() + _SETTLE_SECONDS
    while run.state != "complete" and time.monotonic() < until:
        time.sleep(0.5)


def _resources(args: Recipe) -> dict[str, float]:
    return args.resources


def _fit(
    run: Run,
    args: Recipe,
    resumed: manifests.Checkpoint | None,
    attempts: _Attempts,
) -> None:
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # Tune would catch Ctrl-C, wait for the training to notice, and call it finished.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.base_trainer import TrainingFailedError
    from ray.train.torch import TorchTrainer

    from .worker import train_loop

    resources = _resources(args)
    on_gpu = bool(resources.get("GPU"))
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={
            "args": args,
            "run": run.name,
            "storage": str(run.storage),
        },
        scaling_config=ScalingConfig(
            num_workers=args.workers,
            resources_per_worker=resources,
            trainer_resources={"CPU": 0},  # the coordinating actor only waits
            use_gpu=on_gpu,
            placement_strategy=args.placement_strategy,
        ),
        torch_config=_torch_config(run, "nccl" if on_gpu else "gloo", args),
        run_config=RunConfig(
            name=run.name,
            storage_path=str(run.storage),
            failure_config=FailureConfig(max_failures=attempts.retries),
            callbacks=[_tune_callback(attempts)],
            verbose=0,
        ),
    )
    try:
        with _quiet(), handed_to_workers(run, args) as hand_over:
            attempts.begin(hand_over, resumed)
            _no_variables_by_tune()
            trainer.fit()
    except KeyboardInterrupt:
        _stop_workers(run, attempts.names)
        done = [event["step"] for event in run.events() if event["event"] == "step"]
        raise Interrupted(
            f"the training of '{run.name}' was stopped by hand at step {max(done, default=0)}",
            where=run.folder,
            do="the same command goes on from the newest checkpoint",
        ) from None
    except CptError:
        raise
    except (TrainingFailedError, RuntimeError, ValueError, OSError) as error:
        said = next(filter(None, (str(e) for e in (error.__cause__, error) if e)), repr(error))
        raise failures.readable(run, said, attempts.names) from None


def _torch_config(run: Run, backend: str, args: Recipe) -> Any:
    """Ray's process group, made after the workers have their variables.

    torch and NCCL read some variables when they are imported, or when the group is made.
    """
    from ray.train.torch import TorchConfig
    from ray.train.torch.config import _TorchBackend

    name, storage = run.name, str(run.storage)

    class Backend(_TorchBackend):
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(set_variables, name, storage)
            super().on_start(worker_group, backend_config)

    class Config(TorchConfig):
        @property
        def backend_cls(self) -> type:
            return Backend

    return Config(backend=backend, timeout_s=args.ddp_timeout)


def _no_variables_by_tune() -> None:
    """Keeps Ray Tune (2.48.0) from giving its actor a runtime environment of variables.

    It holds the driver's AWS keys, which Ray writes into its logs; ours reach the workers in
    another way. And for a runtime environment Ray leaves the processes it has ready unused.
    """
    from ray.tune.execution import class_cache

    class_cache.DEFAULT_ENV_VARS = {}
    class_cache.ENV_VARS_TO_PROPAGATE = set()


def _stop_workers(run: Run, attempts: list[str]) -> None:
    """Ends the workers of a training that was stopped by hand, in a session that continues."""
    starts = [e for e in run.events() if e["event"] == "start" and e.get("attempt") in attempts]
    at = hands() if starts else {}
    for rank in starts[-1]["ranks"] if starts else ():
        with contextlib.suppress(Exception):  # it has ended already
            kill(rank, at)


def hands() -> dict[str, Any]:
    """An actor on every other node that can end a process there; by node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class Hand:
        def kill(self, pid: int, number: int) -> None:
            os.kill(pid, number)

    here = ray.get_runtime_context().get_node_id()
    others = [n["NodeID"] for n in ray.nodes() if n["Alive"] and n["NodeID"] != here]
    actor = ray.remote(num_cpus=0)(Hand)
    there = {node: NodeAffinitySchedulingStrategy(node, soft=False) for node in others}
    return {node: actor.options(scheduling_strategy=at).remote() for node, at in there.items()}


def kill(rank: dict[str, Any], at: dict[str, Any]) -> None:
    """Kills a worker with SIGKILL, on whatever node it is.

    Args:
        rank: Its ``node`` (Ray's id) and ``pid``, as the run's ``start`` event names them.
        at: :func:`hands` of the cluster.
    """
    import signal

    import ray

    if rank["node"] == ray.get_runtime_context().get_node_id():
        os.kill(rank["pid"], signal.SIGKILL)
    else:
        ray.get(at[rank["node"]].kill.remote(rank["pid"], signal.SIGKILL), timeout=60)


class _Attempts:
    """The launch of a training and its restarts: their names, and whether to restart once more.

    Attributes:
        names: The launch, then each restart. Workers mark their records and logs with them, so that
            the clocks of two machines are never compared.
    """

    def __init__(self, run: Run, args: Recipe, retries: int, ray: Any) -> None:
        self.run, self.args, self.retries, self.ray = run, args, retries, ray
        self.launch = uuid.uuid4().hex[:8]
        self.names = [f"{self.launch}.0"]
        self.hand_over: Callable[..., None] = lambda *_: None
        self.waiting = 0.0  # when workers that do not fit on the cluster were first waited for
        self.looked = 0.0
        path = run.logs / "launched.json"
        before = json.loads(path.read_text())["launched"] if path.is_file() else []
        path.write_text(json.dumps({"launched": [*before, time.time()]}))

    def begin(self, hand_over: Callable[..., None], resumed: manifests.Checkpoint | None) -> None:
        """Hands the workers of the current attempt the checkpoint that they resume from."""
        self.hand_over = hand_over
        hand_over(self.names[-1], resumed.handle() if resumed else None)

    def failed(self, said: str) -> None:
        """Called when Ray is about to restart the workers.

        The checkpoint to resume from is chosen and read here: the workers would wait for that in a
        collective, which has a time-out.

        Args:
            said: What Ray gives as the reason.

        Raises:
            TrainingError: They would only fail again.
            CheckpointError: No finished checkpoint is whole.
        """
        cause = failures.cause_of(self.run, self.names[-1])
        if cause.hopeless(said, trained=self._started()):
            raise failures.readable(self.run, said, self.names)
        display.say(
            f"{cause.sentence}; restart {len(self.names)} of {self.retries} "
            "from the newest whole checkpoint"
        )
        self.names.append(f"{self.launch}.{len(self.names)}")
        self.begin(self.hand_over, manifests.latest(self.run, display.say))

    def require_placement(self) -> None:
        """Called again and again: limits how long a restart waits for nodes that were lost.

        Raises:
            UnreadyError: The workers have not fitted on the cluster for as long as the start waits.
        """
        if len(self.names) == 1 or time.monotonic() - self.looked < 5:
            return
        self.looked = time.monotonic()
        if preflight.fits(self.ray, self.args) or self._started():
            self.waiting = 0.0
        elif not self.waiting:
            self.waiting = self.looked
            seconds = cluster.placement_timeout()
            display.say(f"nodes were lost: waiting up to {seconds:.0f} s for room for the workers")
        elif self.looked - self.waiting > cluster.placement_timeout():
            preflight.placement(self.ray, self.args)

    def _started(self) -> bool:
        starts = [event for event in self.run.events() if event["event"] == "start"]
        return any(event.get("attempt") == self.names[-1] for event in starts)


def _tune_callback(attempts: _Attempts) -> Any:
    from ray.tune import Callback

    class Restarts(Callback):
        def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            attempts.failed(str(trial.get_error() or ""))

        def on_step_begin(self, iteration: int, trials: Any, **info: Any) -> None:
            attempts.require_placement()

    return Restarts()


def evidence(run: Run) -> list[str]:
    """Lines of the ranks' logs that say how many they were and what DeepSpeed made."""
    marks = ("world size:", "ZeRO stage", "ZeRO-3", "Zero3")
    found: list[str] = []
    for log in sorted(run.logs.glob("rank-*.log")):
        for mark in marks:
            lines = [line for line in failures.last_attempt(log) if mark in line]
            if lines:
                said = re.sub(r"^.*?(>> |\] (?=\S))", "", lines[0]).strip()
                found.append(f"{log.stem}: {said}"[:160])
    return found


@contextmanager
def _quiet() -> Any:
    """Keeps Ray Tune's own words (where it saves, how to open TensorBoard) out of the notebook."""
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
