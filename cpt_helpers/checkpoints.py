"""What a run left behind: its checkpoints, its curves, and where its time went."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError
from .run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KINDS = (
    ("_optim_states.pt", "a rank's ZeRO shard: fp32 weights and the optimizer's two moments"),
    ("_model_states.pt", "a rank's engine state: counters, scheduler, shapes"),
    (".safetensors", "the model's weights, gathered, as transformers loads them"),
    ("rng_state", "a rank's random state"),
    ("trainer_state.json", "the trainer's step and log"),
    ("training_args.bin", "the trainer's arguments"),
    ("scheduler.pt", "the learning-rate schedule"),
    ("tokenizer", "the tokenizer"),
    ("config.json", "the model's or its generation's configuration"),
    ("zero_to_fp32.py", "DeepSpeed's script that gathers fp32 weights from the shards"),
    ("latest", "the name of the folder of shards"),
)


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint as Ray keeps it.

    Attributes:
        step: The optimizer step it was written after.
        path: ``TorchTrainer_*/checkpoint_<number>``; the Hugging Face checkpoint is inside.
        bytes: Size of all its files.
        losses: Held-out losses at that step, by dataset; empty where none were measured.
    """

    step: int
    path: Path
    bytes: int
    losses: dict[str, float]

    @property
    def model(self) -> Path:
        """The Hugging Face checkpoint: weights, tokenizer, trainer state, ZeRO shards."""
        return self.path / "checkpoint"

    def files(self) -> list[dict[str, Any]]:
        """Its files, largest first: name, bytes, and what each is."""
        files = sorted(self.model.rglob("*"), key=lambda p: -p.stat().st_size)
        return [
            {"file": str(p.relative_to(self.model)), "MB": _mb(p), "what": _kind(p.name)}
            for p in files
            if p.is_file()
        ]


def listing(run: Run) -> list[Checkpoint]:
    """The run's whole checkpoints, in the order of their steps."""
    losses: dict[int, dict[str, float]] = {}
    for event in run.events():
        if event["event"] == "eval":
            losses.setdefault(event["step"], {})[event["dataset"]] = event["loss"]
    found = {}
    for path in sorted(run.folder.glob("TorchTrainer_*/checkpoint_*")):
        state = path / "checkpoint" / "trainer_state.json"
        if not _is_whole(path):
            continue
        step = json.loads(state.read_text("utf-8"))["global_step"]
        size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
        found[step] = Checkpoint(step, path, size, losses.get(step, {}))
    return [found[step] for step in sorted(found)]


def latest(run: Run) -> Checkpoint | None:
    """The newest whole checkpoint; ``None`` where there is none."""
    return (listing(run) or [None])[-1]


def pick(run: Run, which: str, held_out: str | None) -> Checkpoint:
    """The last checkpoint, or the best by held-out loss.

    Args:
        run: Whose.
        which: ``"last"`` or ``"best"``.
        held_out: The dataset whose loss decides.

    Raises:
        CheckpointError: There is none.
    """
    found = listing(run)
    if not found:
        raise CheckpointError(
            f"the run '{run.name}' has no whole checkpoint",
            where=run.folder / "TorchTrainer_*",
            do="run notebook 04_train for it",
        )
    if which == "last":
        return found[-1]
    if which != "best":
        raise CheckpointError(f"checkpoint {which!r}", expected="'last' or 'best'")
    measured = [c for c in found if held_out in c.losses]
    return min(measured, key=lambda c: c.losses[held_out]) if measured else found[-1]


def perplexities(run: Run, roles: dict[str, str]) -> dict[str, dict[str, float]]:
    """Held-out perplexity before the first and after the last step, by role.

    Args:
        run: Whose.
        roles: ``{"domain": <dataset>, "general": <dataset>}``.
    """
    found: dict[str, dict[str, float]] = {}
    for role, dataset in roles.items():
        curve = [(s, math.exp(loss)) for s, loss in held_out_curve(run, dataset)]
        if len(curve) > 1:
            found[role] = {"before": round(curve[0][1], 3), "after": round(curve[-1][1], 3)}
    return found


def held_out_curve(run: Run, dataset: str) -> list[tuple[int, float]]:
    """Step and loss of every measurement of one held-out dataset."""
    return [
        (event["step"], event["loss"])
        for event in run.events()
        if event["event"] == "eval" and event["dataset"] == dataset
    ]


def plot(run: Run, roles: dict[str, str]) -> Figure:
    """Training loss by step, and held-out perplexity beside it."""
    import matplotlib.pyplot as plt

    steps = [event for event in run.events() if event["event"] == "step"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    x = [event["step"] for event in steps]
    y = [event["loss"] for event in steps]
    left.plot(x, y, color="tab:blue", alpha=0.35, linewidth=1, label="a step")
    window = max(len(y) // 8, 1)
    smooth = [statistics.mean(y[max(i - window, 0) : i + window + 1]) for i in range(len(y))]
    left.plot(x, smooth, color="tab:blue", linewidth=2, label=f"mean over {2 * window + 1}")
    left.set(xlabel="step", ylabel="training loss", title="What it is trained on")
    left.legend(frameon=False)
    for (role, dataset), colour in zip(roles.items(), ("tab:green", "tab:gray"), strict=False):
        curve = held_out_curve(run, dataset)
        values = [math.exp(loss) for _, loss in curve]
        right.plot([s for s, _ in curve], values, "o-", color=colour, label=f"{role}: {dataset}")
        for (step, _), value in zip(curve, values, strict=True):
            right.annotate(
                f"{value:.1f}", (step, value), (0, 6), textcoords="offset points", ha="center"
            )
    right.set(xlabel="step", ylabel="perplexity", title="What it has never seen")
    right.margins(y=0.18)
    right.set_ylim(bottom=0)
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def time_spent(run: Run) -> dict[str, float]:
    """Where the wall clock went, in seconds: start-up, steps, evaluation, checkpoints, the rest."""
    events = run.events()
    launched = json.loads((run.logs / "launched.json").read_text("utf-8"))["launched"][-1]
    by = {kind: [e for e in events if e["event"] == kind] for kind in ("step", "eval", "save")}
    done = [0] + [e["step"] for e in by["step"]]
    starts = [e for e in events if e["event"] == "start"]
    parts = {
        "start-up": starts[-1]["time"] - launched,
        "steps": sum(
            e["seconds"] * (e["step"] - before)
            for e, before in zip(by["step"], done, strict=False)
            if e["time"] >= launched
        ),
        "evaluation": sum(e["seconds"] for e in by["eval"] if e["time"] >= launched),
        "checkpoints": sum(e["seconds"] for e in by["save"] if e["time"] >= launched),
    }
    rest = events[-1]["time"] - launched - sum(parts.values())
    return {what: round(seconds, 1) for what, seconds in (parts | {"other": max(rest, 0)}).items()}


def save_figure(run: Run, figure: Figure, name: str) -> Path:
    """Keeps a figure in the run, as ``figures/<name>.png``."""
    run.figures.mkdir(parents=True, exist_ok=True)
    path = run.figures / f"{name}.png"
    figure.savefig(path, dpi=130)
    return path


def ranks_with_shards(checkpoint: Checkpoint) -> list[int]:
    """The ranks whose ZeRO shard is in a checkpoint."""
    names = (p.name for p in checkpoint.model.rglob("*_optim_states.pt"))
    return sorted({int(name.split("pp_rank_")[1].split("_")[0]) for name in names})


def _is_whole(path: Path) -> bool:
    """Whether every rank's files are there: the trainer's state, and as many shards as ranks."""
    inside = path / "checkpoint"
    if not (inside / "trainer_state.json").is_file():
        return False
    random_states = len(list(inside.glob("rng_state_*.pth"))) or 1
    shards = len(list(inside.rglob("*_optim_states.pt")))
    return shards in (0, random_states)


def _kind(name: str) -> str:
    return next((what for mark, what in _KINDS if mark in name), "")


def _mb(path: Path) -> float:
    return round(path.stat().st_size / 1e6, 2)
