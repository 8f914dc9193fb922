"""A fault demonstration: a small run loses a worker and is compared with an uninterrupted run."""

from __future__ import annotations

import json
import shutil
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import display, recipes
from ..errors import Interrupted, TrainingError
from ..recipes import Recipe
from ..redirect import hushed
from ..run import Run
from ..setup import assets, cluster
from . import launch
from .failures import remote_kill

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS, SAVE_EVERY, KILL_AT, RANK = 20, 5, 8, 1


@dataclass(frozen=True)
class FaultDemo:
    """Two trainings of one recipe, one of which lost a worker; shown as a table.

    Attributes:
        folder: Contains the runs ``uninterrupted`` and ``killed``.
        killed_at: The last step before the kill.
        resumed_from: The step of the checkpoint that the run resumed from.
        seconds_lost: From the kill to the end of the first new step.
        weights: Each run's sha256 of the final weights.
        error: Why the demonstration failed; the trained run is not affected.
    """

    folder: Path
    killed_at: int = 0
    resumed_from: int = 0
    seconds_lost: float = 0.0
    weights: dict[str, str] = field(default_factory=dict)
    error: str = ""

    @property
    def same_weights(self) -> bool:
        return len(set(self.weights.values())) == 1

    @property
    def same_losses(self) -> bool:
        uninterrupted, killed = map(_losses, _runs(self.folder))
        return not self.error and uninterrupted == killed

    @property
    def equal(self) -> bool:
        """Whether every loss and every bit of the weights is the same."""
        return self.same_losses and self.same_weights

    def as_dict(self) -> dict[str, Any]:
        if self.error:
            return {"failed": self.error}
        equal = {"same_weights": self.same_weights, "same_losses": self.same_losses}
        return asdict(self) | equal | {"folder": str(self.folder)}

    def _repr_html_(self) -> str:
        rows: list[tuple[str, Any]] = [
            ("demonstration failed, the trained run is not affected", self.error)
        ]
        if not self.error:
            rows = [
                ("killed after step", self.killed_at),
                ("resumed from step", self.resumed_from),
                ("time lost", f"{self.seconds_lost:.0f} s"),
                ("losses of all steps are equal", self.same_losses),
                *((f"sha256 of the weights, {name}", sha) for name, sha in self.weights.items()),
            ]
        return display.table(rows)._repr_html_()  # type: ignore[operator]  # missing in the stubs

    def plot(self) -> Figure:
        """Both loss curves in one plot; the repeated steps are marked."""
        import matplotlib.pyplot as plt
        from matplotlib.ticker import MaxNLocator

        figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
        uninterrupted, killed = map(_losses, _runs(self.folder))
        wide: dict[str, Any] = {
            "color": "tab:gray",
            "lw": 6,
            "alpha": 0.4,
            "label": "uninterrupted",
        }
        axes.plot(*zip(*uninterrupted, strict=True), **wide)
        axes.plot(*zip(*killed, strict=True), "o-", color="tab:blue", ms=4, label="killed")
        label = f"repeated after the kill at step {self.killed_at}"
        axes.axvspan(self.resumed_from, self.killed_at, color="tab:red", alpha=0.15, label=label)
        title = "A run that lost a worker, and an uninterrupted run"
        axes.set(xlabel="step", ylabel="training loss", title=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        return figure


def demonstrate_fault(run: Run, args: Recipe) -> FaultDemo:
    """Trains a small model twice with a run's own settings, and kills a worker of the second.

    Both runs are in ``<run>/fault_demo/``. A complete run is not trained again. A second run that
    was interrupted otherwise is: it would show nothing. A failure is a result, not an error: the
    trained model can still be exported.

    Args:
        run: Whose tokenizer, corpus, workers and DeepSpeed file are used.
        args: Its resolved recipe.

    Raises:
        Interrupted: The user stopped it.
    """
    folder = run.folder / "fault_demo"
    try:
        return _demonstrate(run, args, folder)
    except Interrupted:
        raise
    except Exception as error:
        return FaultDemo(folder, error=f"{type(error).__name__}: {error}")


def _demonstrate(run: Run, args: Recipe, folder: Path) -> FaultDemo:
    recipe = _recipe(args, folder)
    uninterrupted, killed = _runs(folder)
    record = folder / "killed.json"
    with cluster.ray_cluster():
        if uninterrupted.state != "complete":
            launch.train(uninterrupted, _recipe_of(uninterrupted, recipe))
        if killed.state != "complete" or not record.is_file():
            if not record.is_file():
                shutil.rmtree(killed.folder, ignore_errors=True)
            record.write_text(json.dumps(_train_and_kill(killed, _recipe_of(killed, recipe))))
    recorded = json.loads(record.read_text("utf-8"))
    runs = (uninterrupted, killed)
    weights = {r.name: assets.sha256(r.output / "model.safetensors") for r in runs}
    return FaultDemo(folder, **recorded, weights=weights)


def _runs(folder: Path) -> tuple[Run, Run]:
    return Run("uninterrupted", folder), Run("killed", folder)


def _losses(run: Run) -> list[tuple[int, float]]:
    return [(event["step"], event["loss"]) for event in run.events() if event["event"] == "step"]


def _recipe(args: Recipe, folder: Path) -> Recipe:
    """The run's own recipe for a model of a few million parameters."""
    small = folder / "model"
    if not (small / "config.json").is_file():
        with hushed():
            small_model(args["model_name_or_path"], small)
    kept = recipes.MAY_CHANGE | {
        "stage", "do_train", "use_cpu", "deepspeed", "dataset", "dataset_dir", "template",
        "bf16", "fp16", "optim", "lr_scheduler_type", "lr_scheduler_kwargs", "tokenized_path",
    }  # fmt: skip
    return Recipe({key: value for key, value in args.items() if key in kept}) | {
        "model_name_or_path": str(small),
        "finetuning_type": "full",
        "cutoff_len": args.block_size,
        "max_samples": 2000,
        "max_steps": STEPS,
        "save_steps": SAVE_EVERY,
        "save_total_limit": 2,
        "logging_steps": 1,
        # Some GPU kernels, such as flash attention's backward pass, add in no fixed order.
        "full_determinism": True,
        "learning_rate": 3e-3,
        "report_to": "none",
    }


def _recipe_of(run: Run, recipe: Recipe) -> Recipe:
    return recipe | {
        "output_dir": str(run.output),
        "run_name": run.name,
        "ray_run_name": run.name,
        "ray_storage_path": str(run.storage),
    }


def small_model(like: str, folder: Path) -> None:
    """Writes a random Llama of 3 million parameters with another model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = assets.tokenizer_of(like)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def _train_and_kill(run: Run, args: Recipe) -> dict[str, Any]:
    """Trains a run and kills a worker; returns the steps and the lost seconds."""
    killed: dict[str, Any] = {}
    done = threading.Event()
    kill = remote_kill()  # created before the training: its steps take milliseconds on GPUs

    def watch() -> None:
        since = time.time()
        while not done.wait(0.05):
            events = [e for e in run.events() if e["time"] >= since]
            if any(e["event"] == "step" and e["step"] >= KILL_AT for e in events):
                start = next(e for e in reversed(events) if e["event"] == "start")
                kill(start["ranks"][min(RANK, len(start["ranks"]) - 1)])
                killed.update(step=_losses(run)[-1][0], time=time.time())
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        launch.train(run, args)
    finally:
        done.set()
        thread.join()
    events = run.events()
    starts = [event["step"] for event in events if event["event"] == "start"]
    if len(starts) < 2 or not killed:
        raise TrainingError(
            "the small run ended before its worker was killed",
            where=run.folder,
            do="run the cell again",
        )
    times = {event["step"]: event["time"] for event in events if event["event"] == "step"}
    lost = round(times[starts[-1] + 1] - killed["time"], 1)
    return {"killed_at": killed["step"], "resumed_from": starts[-1], "seconds_lost": lost}
