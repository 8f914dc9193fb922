"""What runs in each Ray worker: its log, its process group, its callbacks, then LLaMA-Factory.

Ray Train calls :func:`train_loop` in every worker with a plain dict. Rank 0 writes the run's events
to ``metrics.jsonl`` on the storage; the driver, the notebooks and the figures read them there.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from . import checkpoints, models, resharding, throughput
from .config import global_batch, held_out_of
from .run import Run
from .streams import redirected
from .variables import take_variables

# Optional packages that the libraries import where they find them and that no step needs: the
# driver reports to MLflow, nothing here is scored with scikit-learn, detects objects (what
# transformers has SciPy for) or, without ``plot_loss``, draws. Seconds of every start.
_NOT_NEEDED = ("mlflow", "sklearn", "scipy", "matplotlib")


def train_loop(config: dict[str, Any]) -> None:
    """Trains one rank to the end, from the newest whole checkpoint where there is one.

    Args:
        config: ``args`` (the resolved recipe), ``run`` and ``storage`` (whose, where), ``launched``
            (when the driver started this), ``resume`` (the checkpoint it chose, or ``None``).
    """
    entered = time.time()
    import ray.train

    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    run = Run(config["run"], Path(config["storage"]))
    args = dict(config["args"])
    for name in _NOT_NEEDED[: 3 if args.get("plot_loss") else 4]:
        sys.modules.setdefault(name, None)
    with _log_of(rank, run.logs):
        variables = take_variables(run)
        os.environ.update(variables)
        print(f"variables from the driver: {', '.join(sorted(variables))}", flush=True)
        if args.get("use_cpu"):
            join_cpu_group()
        if args.get("deepspeed"):
            _bound_waiting(args.get("ddp_timeout", 1800))
        resumed = _agree(run, config, rank)
        _clear_output(Path(args["output_dir"]), context.get_local_rank())
        args |= _taking_up(run, args, resumed, world_size)
        callback = _make_callback(run, args, resumed)
        _use_own_trainer(callback)
        import torch
        from llamafactory.train.tuner import _training_function

        # DeepSpeed collects garbage a dozen times while it sets up; what was imported is none.
        gc.freeze()
        torch.serialization.set_crc32_options(False)  # the manifest has a sha256 of every file
        callback.memory_before = throughput.peak_memory()
        callback.came = {"entered": round(entered, 3), "imported": round(time.time(), 3)}
        _training_function({"args": args, "callbacks": [callback]})
        callback.end()  # the final model is written too


def join_cpu_group() -> None:
    """Has DeepSpeed take over the process group on CPUs; unasked, it would think it is alone."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # Only DeepSpeed's inference uses this operator (0.16.9), and making it takes a C++ compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def _bound_waiting(seconds: int) -> None:
    """Has DeepSpeed's groups wait as long as ``ddp_timeout`` says.

    DeepSpeed 0.16.9 clones the world group for ZeRO, and a clone has torch's own time-out: half an
    hour with gloo, ten minutes with NCCL.
    """
    import torch.distributed as dist
    from deepspeed.utils import groups

    every = list(range(dist.get_world_size()))
    groups._WORLD_GROUP = dist.new_group(every, timeout=timedelta(seconds=seconds))


def _agree(run: Run, config: dict[str, Any], rank: int) -> dict[str, Any] | None:
    """The checkpoint all ranks go on from: rank 0 chooses, so that they never choose differently.

    The driver's choice holds for its first attempt; after a failure newer ones may be there, and
    each is checked again. Rank 0 also takes the run's records back to that step.
    """
    import torch.distributed as dist

    chosen = [config["resume"]]
    if rank == 0:
        restarted = any(
            event["event"] == "start" and event["time"] >= config["launched"]
            for event in run.events()
        )
        if restarted:
            newest = checkpoints.latest(run)
            chosen = [newest.handle() if newest else None]
        rewind(run, chosen[0]["step"] if chosen[0] else 0)
    dist.broadcast_object_list(chosen, src=0)
    if chosen[0]:
        print(f"going on from step {chosen[0]['step']}, {chosen[0]['path']}", flush=True)
    return chosen[0]


def rewind(run: Run, step: int) -> None:
    """Takes the run's records back to a step, so that the steps done again stand in them once.

    ``start`` events stay: they tell how often the run was begun.
    """
    for path, key in ((run.metrics, "step"), (run.output / "trainer_log.jsonl", "current_steps")):
        if not path.is_file():
            continue
        kept = []
        for line in path.read_text("utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # cut short by the crash
                continue
            if record.get("event") == "start" or 0 < step >= record.get(key, 0):
                kept.append(line + "\n")
        part = path.with_name(f".{path.name}")
        part.write_text("".join(kept), "utf-8")
        part.replace(path)


def _clear_output(output: Path, local_rank: int) -> None:
    """Removes what an earlier attempt left half-written; whole checkpoints are on the storage."""
    import torch.distributed as dist

    if local_rank == 0:
        for left in output.glob("checkpoint-*"):
            shutil.rmtree(left, ignore_errors=True)
    dist.barrier()


def _taking_up(
    run: Run, args: dict[str, Any], resumed: dict[str, Any] | None, world_size: int
) -> dict[str, Any]:
    """The arguments by which LLaMA-Factory goes on from a checkpoint, or from none."""
    changed: dict[str, Any] = {"report_to": "none"}  # the driver reports
    if not resumed:
        # Without it LLaMA-Factory would resume from whatever it finds in its output folder.
        return changed | {"overwrite_output_dir": True, "resume_from_checkpoint": None}
    folder = Path(resumed["path"], "checkpoint")
    if args.get("deepspeed") and resumed["world_size"] != world_size:
        folder = resharding.universal_folder(run, resumed["step"], world_size)
        settings = json.loads(Path(args["deepspeed"]).read_text("utf-8"))
        changed["deepspeed"] = settings | {"checkpoint": {"load_universal": True}}
    return changed | {
        "overwrite_output_dir": False,  # keeps the trainer's own log
        "resume_from_checkpoint": str(folder),
        "eval_on_start": False,
    }


def _use_own_trainer(callback: Any) -> None:
    """Puts three things right in LLaMA-Factory 0.9.3's trainer for pre-training.

    Its callback that saves a multimodal model's processor comes after all others, so that ours
    would miss it. And DeepSpeed 0.16.9 drops empty parameter groups, which under LoRA torch ≥ 2.13
    ends with «zip() argument 2 is longer than argument 1»; groups that differ in nothing are made
    one, which is also what DeepSpeed's universal checkpoints need.
    """
    from llamafactory.train.pt import workflow
    from llamafactory.train.pt.trainer import CustomTrainer

    class CptTrainer(CustomTrainer):
        def create_optimizer(self) -> Any:
            optimizer = super().create_optimizer()
            merge_groups(optimizer)
            return optimizer

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step >= self.state.max_steps:
                # Taken up from the last step's checkpoint, transformers 4.52.4 would do one more.
                self.control.should_training_stop = True
                return [], None
            return super().get_batch_samples(*args, **kwargs)

        def train(self, *args: Any, **kwargs: Any) -> Any:
            self.callback_handler.callbacks.sort(key=lambda other: other is callback)
            return super().train(*args, **kwargs)

    workflow.CustomTrainer = CptTrainer


def merge_groups(optimizer: Any) -> None:
    """Makes one parameter group of those with the same settings; drops empty ones."""
    merged: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        settings = {key: value for key, value in group.items() if key != "params"}
        alike = [g for g in merged if {k: v for k, v in g.items() if k != "params"} == settings]
        if alike:
            alike[0]["params"] = [*alike[0]["params"], *group["params"]]
        elif group["params"]:
            merged.append(group)
    optimizer.param_groups[:] = merged


def _make_callback(run: Run, args: dict[str, Any], resumed: dict[str, Any] | None) -> Any:
    """The callback that writes events and hands checkpoints to Ray; made where torch is loaded."""
    import ray
    import torch.distributed as dist
    from transformers import TrainerCallback

    context, recipe = ray.get_runtime_context(), args
    tokens_per_step = global_batch(args) * args["cutoff_len"]
    keep, held_out = args.get("save_total_limit"), held_out_of(args).get("domain")
    on_gpu, precision = not args.get("use_cpu"), "bfloat16" if args.get("bf16") else "float32"

    class RunCallback(TrainerCallback):
        """Rank 0's events, an evaluation after the last step, and every rank's checkpoint files."""

        def __init__(self) -> None:
            self.rank = ray.train.get_context().get_world_rank()
            self.logged = (0, 0.0)  # step and time of the last step event
            self.measured: tuple[int, dict[str, float]] = (-1, {})  # held-out losses, and when
            self.last = 0.0  # when the trainer last came by: what follows began then
            self.memory_before = 0  # bytes, the libraries loaded and no model
            self.base = ""  # of an adapter: the sha256 of the weights it is trained on
            self.came: dict[str, float] = {}  # when this worker began, and had imported all
            self.flops_per_token = 0.0
            self.peaks: list[int] = []  # of each rank, when the last step was done

        def write(self, event: str, state: Any, **values: Any) -> None:
            if self.rank == 0:
                line = {"event": event, "step": state.global_step, "time": round(time.time(), 3)}
                with run.metrics.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line | values) + "\n")

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            # Of a checkpoint's state these would win over the recipe's.
            state.compute_steps(args, state.max_steps)
            engine = kwargs.get("optimizer")
            device, peak = throughput.peak_flops(on_gpu, precision)
            own = {"node": context.get_node_id(), "pid": os.getpid(), "device": device}
            places = _all_ranks(own | {"peak_flops": peak})
            every, trained = throughput.text_parameters(model)
            self.flops_per_token = throughput.flops_per_token(
                model.config, every, trained, recipe["cutoff_len"]
            )
            peaks = [place["peak_flops"] for place in places]
            self.peak_flops = sum(peaks) if all(peaks) else None
            self.write(
                "start",
                state,
                max_steps=state.max_steps,
                world_size=args.world_size,
                tokens_per_step=tokens_per_step,
                optimizer=type(engine).__name__,
                zero_stage=_zero_stage(args),
                parameters=_parameters(model),
                ranks=places,
                resumed_from=resumed and str(Path(resumed["path"]).relative_to(run.folder)),
                flops_per_token=self.flops_per_token,
                memory_before=self.memory_before,
                eval_on_start=bool(args.eval_on_start),
                eval_strategy=str(args.eval_strategy.value),
                **self.came,
            )
            base = Path(recipe["model_name_or_path"])
            if self.rank == 0 and recipe.get("finetuning_type") == "lora" and base.is_dir():
                self.base = models.weights_sha256(base)
            self.logged = (state.global_step, time.time())
            self.last = time.time()

        def on_step_begin(self, args, state, control, **kwargs):
            if not self.logged[1]:
                self.logged = (state.global_step, time.time())

        def on_step_end(self, args, state, control, **kwargs):
            self.last = time.time()
            if state.global_step >= state.max_steps and args.eval_strategy == "steps":
                control.should_evaluate = True  # also where max_steps is no multiple of eval_steps
            return control

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" not in logs or "learning_rate" not in logs:
                return
            step, since = self.logged
            seconds = (time.time() - since) / max(state.global_step - step, 1)
            self.write(
                "step",
                state,
                loss=logs["loss"],
                learning_rate=logs["learning_rate"],
                grad_norm=logs.get("grad_norm"),
                seconds=round(seconds, 3),
                tokens_per_second=round(tokens_per_step / seconds, 1),
                mfu=self.mfu(tokens_per_step / seconds),
                memory=throughput.peak_memory(on_gpu),
            )
            self.logged = (state.global_step, time.time())
            self.last = time.time()

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            losses = self.measured[1] if self.measured[0] == state.global_step else {}
            for key, value in metrics.items():
                if key.startswith("eval_") and key.endswith("_loss"):
                    name = key.removeprefix("eval_").removesuffix("_loss")
                    seconds = time.time() - self.last
                    losses[name] = value
                    self.write("eval", state, dataset=name, loss=value, seconds=round(seconds, 3))
            self.measured = (state.global_step, losses)
            self.last = time.time()
            self.logged = (state.global_step, 0.0)

        def on_save(self, args, state, control, **kwargs):
            written = Path(args.output_dir, f"checkpoint-{state.global_step}")
            place = _next_place(run)
            if self.rank == 0:
                checkpoints.clear(place)
                self.note_base(written)
            dist.barrier()  # every rank has written its files, and the place is free
            moved = _all_ranks(checkpoints.move_own(written, place / "checkpoint", self.rank))
            files = {name: file for own in moved for name, file in own.items()}
            losses = self.measured[1] if self.measured[0] == state.global_step else {}
            _register(state.global_step, losses)
            dist.barrier()  # Ray knows it of every rank
            shutil.rmtree(written, ignore_errors=True)  # empty folders, on each node's disk
            if self.rank == 0:
                size = checkpoints.write_manifest(
                    place, state.global_step, args.world_size, files, losses
                )
                seconds = round(time.time() - self.last, 3)  # the trainer's writing too
                self.write("save", state, bytes=size, seconds=seconds, path=str(place))
                checkpoints.prune(run, keep, held_out, newest=place)
            self.logged = (state.global_step, 0.0)

        def mfu(self, tokens_per_second: float) -> float | None:
            if not self.peak_flops:
                return None
            return round(tokens_per_second * self.flops_per_token / self.peak_flops, 4)

        def note_base(self, folder):
            if self.base:
                models.note_base(folder, recipe["model_name_or_path"], self.base)

        def end(self):
            self.note_base(run.output)  # the final model is there
            peaks = [throughput.peak_memory(on_gpu), *self.peaks[1:]]
            self.write("end", self.state, memory=peaks)

        def on_train_end(self, args, state, control, **kwargs):
            self.state = state
            ranks = _all_ranks({"memory": throughput.peak_memory(on_gpu)})
            self.peaks = [rank["memory"] for rank in ranks]
            before = resumed and resumed["step"] >= state.max_steps
            if self.measured[1] or before:  # after the last step; it would be done once more
                args.do_eval = False

    return RunCallback()


def _next_place(run: Run) -> Path:
    """Where Ray will look for the checkpoint that is reported next."""
    import ray.train

    storage = ray.train.get_context().get_storage()
    name = storage._make_checkpoint_dir_name(storage.current_checkpoint_index + 1)
    return run.folder / storage.trial_dir_name / name


def _all_ranks(own: dict[str, Any]) -> list[dict[str, Any]]:
    """What every rank has to say, in the order of the ranks; none goes on before all have."""
    import torch.distributed as dist

    everyone: list[Any] = [own] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return everyone


def _register(step: int, losses: dict[str, float]) -> None:
    """Tells Ray of a checkpoint whose files are in their place: it has nothing left to copy."""
    import ray.train

    measured = {"step": step, **{f"loss_{name}": loss for name, loss in losses.items()}}
    with tempfile.TemporaryDirectory() as empty:
        ray.train.report(measured, checkpoint=ray.train.Checkpoint.from_directory(empty))


def _zero_stage(args: Any) -> int | None:
    plugin = args.hf_deepspeed_config
    return plugin.config.get("zero_optimization", {}).get("stage") if plugin else None


def _parameters(model: Any) -> dict[str, int]:
    """Parameters in all and trained; under ZeRO-3 a rank holds shards, and DeepSpeed the sizes."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return {"all": sum(n for n, _ in sizes), "trained": sum(n for n, grad in sizes if grad)}


@contextmanager
def _log_of(rank: int, folder: Path) -> Iterator[None]:
    """Sends all a rank prints to ``rank-<n>.log``, a traceback at its end too; a restart adds."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank-{rank}.log"
    with path.open("a", encoding="utf-8") as log:
        log.write(f"--- rank {rank}, {time.strftime('%Y-%m-%d %H:%M:%S')}, pid {os.getpid()}\n")
    with redirected(path):
        try:
            yield
        except BaseException:
            traceback.print_exc()
            raise
