"""Shows that a run survives: a small one loses a worker and is compared with another."""

from __future__ import annotations

import json
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import recipes
from ..errors import Interrupted, TrainingError
from ..recipes import Recipe
from ..redirect import hushed
from ..run import Run
from ..setup import assets, cluster
from . import launch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS, SAVE_EVERY, KILL_AT, RANK = 20, 5, 8, 1


@dataclass(frozen=True)
class Survival:
    """Two trainings of one recipe, one of which lost a worker.

    Attributes:
        undisturbed: The uninterrupted one.
        killed: The one whose worker was killed.
        killed_at: The last step it had taken then.
        resumed_from: The step of the checkpoint it resumed from.
        seconds_lost: From the last step before to the first one after.
        weights: Each run's sha256 of the final weights.
    """

    undisturbed: Run
    killed: Run
    killed_at: int
    resumed_from: int
    seconds_lost: float
    weights: dict[str, str]

    @property
    def equal(self) -> bool:
        """Whether every loss and every bit of the weights is the same."""
        return self.same_losses and self.same_weights

    @property
    def sentence(self) -> str:
        return (
            f"killed after step {self.killed_at}, resumed from step {self.resumed_from}, "
            f"{self.seconds_lost:.0f} s later"
        )

    @property
    def same_weights(self) -> bool:
        return len(set(self.weights.values())) == 1

    @property
    def same_losses(self) -> bool:
        return losses(self.undisturbed) == losses(self.killed)

    def as_dict(self) -> dict[str, Any]:
        return {
            "killed_at": self.killed_at,
            "resumed_from": self.resumed_from,
            "seconds_lost": self.seconds_lost,
            "same_weights": self.same_weights,
            "same_losses": self.same_losses,
            "weights": self.weights,
        }


@dataclass(frozen=True)
class Failed:
    """A demonstration that did not reach its end: the run itself is not affected.

    Attributes:
        why: The error in its own words.
    """

    why: str
    equal: bool = False

    @property
    def sentence(self) -> str:
        return f"the demonstration failed, the run is not affected: {self.why}"

    def as_dict(self) -> dict[str, Any]:
        return {"failed": self.why}


def attempt(run: Run, args: Recipe) -> Survival | Failed:
    """As :func:`demonstrate`, with a failure as a result: it says nothing about the run itself.

    Raises:
        Interrupted: Stopped by hand.
    """
    try:
        return demonstrate(run, args)
    except Interrupted:
        raise
    except Exception as error:  # whatever it is, the trained model can be exported
        return Failed(f"{type(error).__name__}: {error}")


def demonstrate(run: Run, args: Recipe) -> Survival:
    """Trains a small model twice under a run's own settings, and kills a worker of the second.

    Both are in ``<run>/survival/``. What is there already is not trained again, except a second one
    that was itself interrupted: it can no longer show anything.

    Args:
        run: Whose tokenizer, corpus, workers and DeepSpeed file are used.
        args: Its resolved recipe.

    Raises:
        TrainingError: The worker could not be killed while it trained.
    """
    folder = run.folder / "survival"
    recipe = _recipe(run, args, folder)
    undisturbed, killed = Run("undisturbed", folder), Run("killed", folder)
    record = folder / "killed.json"
    if not record.is_file():
        shutil.rmtree(killed.folder, ignore_errors=True)
    with cluster.ray_cluster():
        for each in (undisturbed, killed):
            if each.state == "complete" and record.is_file() | (each is undisturbed):
                continue
            own = _own(each, recipe)
            if each is undisturbed:
                launch.train(each, own)
            else:
                seen = _train_and_kill(each, own)
                record.write_text(json.dumps(seen))
    seen = json.loads(record.read_text("utf-8"))
    weights = {r.name: assets.sha256(r.output / "model.safetensors") for r in (undisturbed, killed)}
    return Survival(undisturbed, killed, **seen, weights=weights)


def losses(run: Run) -> list[tuple[int, float]]:
    """Every step's training loss."""
    return [(event["step"], event["loss"]) for event in run.events() if event["event"] == "step"]


def plot(survival: Survival) -> Figure:
    """Both loss curves in one plot, with the kill and the restart marked."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    for run, style in (
        (survival.undisturbed, {"color": "tab:gray", "lw": 6, "alpha": 0.4}),
        (survival.killed, {"color": "tab:blue", "marker": "o", "ms": 4}),
    ):
        curve = losses(run)
        axes.plot([s for s, _ in curve], [loss for _, loss in curve], label=run.name, **style)
    axes.axvspan(
        survival.resumed_from,
        survival.killed_at,
        color="tab:red",
        alpha=0.15,
        label=f"repeated after the kill at step {survival.killed_at}",
    )
    axes.set(
        xlabel="step",
        ylabel="training loss",
        title="A run that lost a worker, and an uninterrupted one",
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def _recipe(run: Run, args: Recipe, folder: Path) -> Recipe:
    """The run's own recipe for a model of a few million parameters."""
    small = folder / "model"
    if not (small / "config.json").is_file():
        with hushed():
            small_model(args["model_name_or_path"], small)
    keep = set(recipes.MAY_CHANGE) | {
        "stage", "do_train", "use_cpu", "deepspeed", "dataset", "dataset_dir", "template",
        "bf16", "fp16", "optim", "lr_scheduler_type", "lr_scheduler_kwargs", "tokenized_path",
    }  # fmt: skip
    return Recipe({key: value for key, value in args.items() if key in keep}) | {
        "model_name_or_path": str(small),
        "finetuning_type": "full",
        "cutoff_len": args.block_size,
        "max_samples": 2000,
        "max_steps": STEPS,
        "save_steps": SAVE_EVERY,
        "save_total_limit": 2,
        "logging_steps": 1,
        # On GPUs some kernels, such as flash attention's backward pass, add in any order.
        "full_determinism": True,
        "learning_rate": 3e-3,
        "report_to": "none",
    }


def _own(run: Run, recipe: Recipe) -> Recipe:
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
    seen: dict[str, Any] = {}
    done = threading.Event()
    hands = launch.hands()  # ready before the training is: its steps take milliseconds on GPUs

    def watch() -> None:
        since = time.time()
        while not done.wait(0.05):
            events = [e for e in run.events() if e["time"] >= since]
            if any(e["event"] == "step" and e["step"] >= KILL_AT for e in events):
                start = next(e for e in reversed(events) if e["event"] == "start")
                launch.kill(start["ranks"][min(RANK, len(start["ranks"]) - 1)], hands)
                seen.update(killed_at=losses(run)[-1][0], time=time.time())
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        launch.train(run, args)
    finally:
        done.set()
        thread.join()
    starts = [event for event in run.events() if event["event"] == "start"]
    if len(starts) < 2 or not seen:
        raise TrainingError(
            "the small run ended before its worker was killed",
            where=run.folder,
            do="run this again",
        )
    again = next(
        e for e in run.events() if e["event"] == "step" and e["step"] == starts[-1]["step"] + 1
    )
    return {
        "killed_at": seen["killed_at"],
        "resumed_from": starts[-1]["step"],
        "seconds_lost": round(again["time"] - seen["time"], 1),
    }
