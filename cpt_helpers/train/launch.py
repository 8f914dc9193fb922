"""The driver's side of a training: place the workers, follow them, summarize the result.

LLaMA-Factory 0.9.3 builds its own ``TorchTrainer`` for GPUs only, without a failure policy. This
module runs the same training function on GPUs or CPUs, and Ray restarts it when a worker dies.
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
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .. import display
from ..checkpoints import manifests, resharding
from ..config import preflight
from ..errors import CptError, Interrupted, TrainingError
from ..recipes import Recipe
from ..run import Run
from ..setup import cluster
from . import tracking
from .failures import Attempts, last_attempt, readable_error
from .worker_env import handed_to_workers, set_variables

if TYPE_CHECKING:
    from pandas import DataFrame

RETRIES = 3  # restarts after a failure, by default
_SETTLE_SECONDS = 30.0  # until a shared storage shows the driver what a worker wrote last


class Summary(dict[str, Any]):
    """Results of a training, shown as a table.

    ``tokens_per_second`` is the median over steady steps, ``mfu`` the share of the peak of all
    workers' devices (``None`` if the peak is unknown), ``peak_memory`` the bytes of the worker that
    used most. ``seconds`` count from the first launch to the end, ``seconds_to_first_step`` from
    the launch that took the first step.
    """

    def _repr_html_(self) -> str:
        parameters = self["parameters"]
        rows = [
            ("steps", self["steps"]),
            ("tokens", f"{self['tokens']:,}"),
            ("workers", self["workers"]),
            ("ZeRO stage", self["zero_stage"] or "not used"),
            ("parameters trained", f"{parameters['trained']:,} of {parameters['all']:,}"),
            ("tokens per second, median step", f"{self['tokens_per_second']:.0f}"),
            ("share of the peak (MFU)", f"{self['mfu']:.0%}" if self["mfu"] else "peak not known"),
            ("peak memory of a worker", f"{self['peak_memory'] / 2**30:.1f} GiB"),
            ("launch to first step", f"{self['seconds_to_first_step']:.0f} s"),
            ("launch to end", f"{self['seconds']:.0f} s"),
            ("training loss, first step", f"{self['first_loss']:.3f}"),
            ("training loss, last step", f"{self['last_loss']:.3f}"),
        ]
        if compared := self.get("weights"):
            text = f"{compared['parameters']} parameters, {compared['share']:.0%} of each, "
            text += f"{compared['seconds']:.1f} s"
            rows.append(("loaded weights equal their files", compared["skipped"] or text))
        return display.table(rows)._repr_html_()  # type: ignore[operator]  # missing in the stubs


def settings(run: Run, args: Recipe, retries: int = RETRIES) -> DataFrame:
    """What a launch uses: model, data, workers, precision, and when it saves.

    Args:
        run: The run; its plan is read from step 3.
        args: The resolved recipe.
        retries: As for :func:`train`.
    """
    plan = run.read_step("03_config")["plan"]
    kept = args.get("save_total_limit")
    return display.table(
        [
            ("model", args["model_name_or_path"]),
            ("training data", args["dataset"]),
            ("held-out data", args.get("eval_dataset", "none")),
            ("workers", f"{args.workers} × {args.resources}"),
            ("precision", args.precision),
            ("DeepSpeed", args.get("deepspeed", "not used")),
            ("one step", f"{plan['global_batch']} blocks = {plan['tokens_per_step']:,} tokens"),
            ("steps planned", plan["steps"]),
            ("checkpoint", f"every {args.save_steps} steps, {plan['disk']['checkpoint']:.2f} GiB"),
            ("checkpoints kept", f"the last {kept} and the best" if kept else "all"),
            ("restarts after a failure", f"up to {retries}"),
        ]
    )


def train(run: Run, args: Recipe, *, retries: int = RETRIES, workers: int | None = None) -> Summary:
    """Trains a run to its end, or resumes an interrupted one. A complete run is not changed.

    Args:
        run: Whose storage, logs and events are used.
        args: The resolved recipe (``recipes.load(run)``).
        retries: Restarts from the newest whole checkpoint after workers died.
        workers: Another number of workers than the recipe's, with the same global batch.

    Raises:
        UnreadyError: The workers cannot be placed.
        StorageError: The storage has too little room for the run.
        CheckpointError: No checkpoint is whole, or not for this number of workers.
        RunExistsError: Another process is training this run.
        TrainingError: Workers failed more often than ``retries``, or would fail again.
        Interrupted: The user stopped it.
    """
    if run.state == "complete":
        print(f"the run '{run.name}' is complete: nothing to train, {run.folder} is unchanged")
        tracking.catch_up(run, args)
        return summary(run)
    args = args.with_workers(workers)
    preflight.before_launch(run, args)
    with run.held():
        _launch(run, args, retries)
    return summary(run)


def _launch(run: Run, args: Recipe, retries: int) -> None:
    resumed = manifests.latest(run)
    if run.state == "started" or resumed:
        start = f"step {resumed.step}, {resumed.path}" if resumed else "the first step"
        print(f"the run '{run.name}' was interrupted; it resumes from {start}")
    preflight.room(run, args)
    preflight.model(args)
    if resumed and args.get("deepspeed") and resumed.world_size != args.workers:
        print(f"its checkpoint is converted from {resumed.world_size} to {args.workers} workers")
        resharding.universal(run, resumed, args.workers)
    # While Ray starts, this process waits: half of a launch's imports fit into that time.
    threading.Thread(target=importlib.import_module, args=["torch"], daemon=True).start()
    with cluster.ray_cluster() as ray:
        args = preflight.placed(ray, args)
        preflight.raise_if_wrong(preflight.nodes(run, args, ray))
        run.logs.mkdir(parents=True, exist_ok=True)
        attempts = Attempts(run, args, retries, ray)
        with display.follow(run, attempts.names), tracking.mirrored(run, args):
            _fit(run, args, resumed, attempts)
            # NFS and FUSE mounts may show the last event late.
            until = time.monotonic() + _SETTLE_SECONDS
            while run.state != "complete" and time.monotonic() < until:
                time.sleep(0.5)
    shutil.rmtree(run.folder / "universal", ignore_errors=True)


def _fit(run: Run, args: Recipe, resumed: manifests.Checkpoint | None, attempts: Attempts) -> None:
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # Tune would catch Ctrl-C, wait for the training to notice, and call it finished.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    from ray.train.base_trainer import TrainingFailedError

    trainer = _torch_trainer(run, args, attempts)
    try:
        with _quiet_ray(), handed_to_workers(run, args) as hand_over:
            attempts.begin(hand_over, resumed)
            _keep_variables_from_tune()
            trainer.fit()
    except KeyboardInterrupt:
        attempts.stop_workers()
        steps = [event["step"] for event in run.events() if event["event"] == "step"]
        raise Interrupted(
            f"the training of '{run.name}' was stopped by the user at step {max(steps, default=0)}",
            where=run.folder,
            do="repeat the command: it resumes from the newest checkpoint",
        ) from None
    except CptError:
        raise
    except (TrainingFailedError, RuntimeError, ValueError, OSError) as error:
        texts = (str(e) for e in (error.__cause__, error) if e)
        reason = next(filter(None, texts), repr(error))
        raise readable_error(run, reason, attempts.names) from None


def _torch_trainer(run: Run, args: Recipe, attempts: Attempts) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from .worker import train_loop

    on_gpu = bool(args.resources.get("GPU"))
    return TorchTrainer(
        train_loop,
        train_loop_config={"args": dict(args), "run": run.name, "storage": str(run.storage)},
        scaling_config=ScalingConfig(
            num_workers=args.workers,
            resources_per_worker=args.resources,
            trainer_resources={"CPU": 0},  # the coordinating actor only waits
            use_gpu=on_gpu,
            placement_strategy=args.placement_strategy,
        ),
        torch_config=_torch_config(run, "nccl" if on_gpu else "gloo", args.ddp_timeout),
        run_config=RunConfig(
            name=run.name,
            storage_path=str(run.storage),
            failure_config=FailureConfig(max_failures=attempts.retries),
            callbacks=[_tune_callback(attempts)],
            verbose=0,
        ),
    )


def _torch_config(run: Run, backend: str, timeout: int) -> Any:
    """Ray's process group, created after the workers have their variables.

    torch and NCCL read some variables when they are imported, or when the group is created.
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

    return Config(backend=backend, timeout_s=timeout)


def _keep_variables_from_tune() -> None:
    """Keeps Ray Tune (2.48.0) from giving its actor a runtime environment with variables.

    It would contain the driver's AWS keys, and Ray writes it into its logs. Ray also leaves its
    prestarted processes unused for an actor with a runtime environment.
    """
    from ray.tune.execution import class_cache

    class_cache.DEFAULT_ENV_VARS = {}
    class_cache.ENV_VARS_TO_PROPAGATE = set()


def _tune_callback(attempts: Attempts) -> Any:
    from ray.tune import Callback as TuneCallback

    class Restarts(TuneCallback):
        def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            attempts.failed(str(trial.get_error() or ""))

        def on_step_begin(self, iteration: int, trials: Any, **info: Any) -> None:
            attempts.require_placement()

    return Restarts()


@contextmanager
def _quiet_ray() -> Iterator[None]:
    """Keeps Ray Tune's messages (where it saves, how to open TensorBoard) out of the notebook."""
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


def summary(run: Run) -> Summary:
    """The results of a complete training, from its events.

    Raises:
        TrainingError: It is not complete, or no step was logged.
    """
    events = run.events()
    if run.state != "complete":
        raise TrainingError(
            f"the training of '{run.name}' is not complete",
            where=run.metrics,
            do="run notebook 04_train for it: it resumes from the newest checkpoint",
        )
    starts = [event for event in events if event["event"] == "start"]
    steps = [event for event in events if event["event"] == "step"]
    if not steps:
        raise TrainingError(
            f"the run '{run.name}' logged no step",
            where=run.metrics,
            expected="logging_steps of at most max_steps",
            do="train it under another RUN_NAME with logging_steps: 1",
        )
    start, end, workers = starts[-1], events[-1], starts[-1]["world_size"]
    launched = json.loads((run.logs / "launched.json").read_text())["launched"]
    first_step = steps[0]["time"] - steps[0]["seconds"] * steps[0]["step"]
    launch = max((t for t in launched if t < first_step), default=launched[-1])
    speed = start["tokens_per_step"] / statistics.median(step["seconds"] for step in steps)
    mfu = [step["mfu"] for step in steps if step.get("mfu") is not None]
    memory = [*(end.get("memory") or [0]), *(step.get("memory") or 0 for step in steps)]
    return Summary(
        steps=end["step"],
        tokens=end["step"] * start["tokens_per_step"],
        tokens_per_second=round(speed, 1),
        tokens_per_second_per_worker=round(speed / workers, 1),
        mfu=statistics.median(mfu) if mfu else None,
        peak_memory=max(memory),
        seconds=round(end["time"] - launched[0], 1),
        seconds_to_first_step=round(first_step - launch, 1),
        workers=workers,
        **{key: start[key] for key in ("zero_stage", "optimizer", "parameters")},
        first_loss=steps[0]["loss"],
        last_loss=steps[-1]["loss"],
        weights=start.get("weights"),  # runs of 0.1.0 did not compare them
        launches=len(launched),
        starts=len(starts),
    )


def evidence(run: Run) -> DataFrame:
    """Lines of the ranks' logs about the world size and the optimizer that DeepSpeed built."""
    rows = []
    for log in sorted(run.logs.glob("rank-*.log")):
        for mark in ("world size:", "ZeRO stage", "ZeRO-3", "Zero3"):
            line = next((line for line in last_attempt(log) if mark in line), "")
            message = re.sub(r"^.*?(>> |\] (?=\S))", "", line).strip()
            if message:
                rows.append({"log": log.stem, "line": message[:160]})
    return display.table(rows, columns=["log", "line"])


def perplexity_table(measured: dict[str, dict[str, float]], roles: dict[str, str]) -> DataFrame:
    """Held-out perplexity before and after training, with the relative change.

    Args:
        measured: As :func:`cpt_helpers.plots.perplexities` returns it.
        roles: The held-out dataset of each role.
    """
    rows = [
        (role, roles[role], v["before"], v["after"], f"{v['after'] / v['before'] - 1:+.1%}")
        for role, v in measured.items()
    ]
    return display.table(rows, columns=["role", "held-out text", "before", "after", "change"])
