"""Runs with faults have the same final weights as an uninterrupted run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpt_helpers import checkpoints, recipes
from cpt_helpers.checkpoints import manifests
from cpt_helpers.config import resolution
from cpt_helpers.data import corpora
from cpt_helpers.errors import CheckpointError
from cpt_helpers.run import Run
from cpt_helpers.setup import assets

pytestmark = [pytest.mark.training, pytest.mark.faults]

TESTS = Path(__file__).parent
LIMIT = 400  # seconds a training may take, restarts included


class Trained:
    """One training in a separate process, like a user's command."""

    def __init__(self, run: Run, **overrides: Any) -> None:
        self.run, self.seconds, self.output = run, 0.0, ""
        self.overrides = overrides

    def start(self, faults: list[dict] = (), **options: Any) -> subprocess.Popen:
        environment = os.environ | {
            "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}",
            "CPT_FAULTS": json.dumps(list(faults)),
        }
        command = [sys.executable, "-W", "ignore", "-m", "faults.drive"]
        command += [str(self.run.storage), self.run.name, json.dumps(options)]
        return subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def train(self, faults: list[dict] = (), **options: Any) -> int:
        since = time.monotonic()
        process = self.start(faults, **options)
        try:
            self.output, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        self.seconds = time.monotonic() - since
        return process.returncode

    def stop_at(self, step: int, number: signal.Signals, **options: Any) -> None:
        """Trains slowly and sends the driver a signal after a step."""
        process = self.start([{"what": "slow", "seconds": 1.5}], **options)
        deadline = time.monotonic() + LIMIT
        while not any(done == step for done, _ in self.losses):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(number)
        self.output, _ = process.communicate(timeout=60)
        start = next(e for e in reversed(self.run.events()) if e["event"] == "start")
        while any(Path(f"/proc/{rank['pid']}").exists() for rank in start["ranks"]):
            assert time.monotonic() < deadline, "workers are still running after their driver"
            time.sleep(0.1)

    @property
    def saved(self) -> list[int]:
        """The steps of its whole checkpoints."""
        return [c.step for c in manifests.listing(self.run) if c.whole]

    @property
    def weights(self) -> str:
        return assets.sha256(next(self.run.output.glob("*model.safetensors")))

    @property
    def losses(self) -> list[tuple[int, float]]:
        """Losses as written in the file: a repeated step must be in it once."""
        if not self.run.metrics.is_file():
            return []
        lines = self.run.metrics.read_text().splitlines()
        events = [json.loads(line) for line in lines if line.endswith("}")]
        return [(e["step"], e["loss"]) for e in events if e["event"] == "step"]

    @property
    def starts(self) -> list[int]:
        return [event["step"] for event in self.run.events() if event["event"] == "start"]


@pytest.fixture(scope="module")
def recipe(storage: Path, corpus: Path, tiny_gemma3: Path) -> dict[str, Any]:
    corpora.prepare(str(corpus), storage)
    run = Run("recipe", storage)
    overrides = {
        "model_name_or_path": str(tiny_gemma3),
        "eval_dataset": "handbook_heldout",
        "cutoff_len": 64,
        "max_steps": 12,
        "per_device_train_batch_size": 2,
        "save_steps": 3,
        "save_total_limit": 2,
        "eval_steps": 6,
        "eval_on_start": False,
        "learning_rate": 5e-3,
        "bf16": False,
        "report_to": "none",
    }
    resolution.write(run, resolution.resolve(run, "cpt_cpu.yaml", overrides, "handbook"))
    return recipes.load(run)


@pytest.fixture(scope="module")
def new(storage: Path, recipe: dict[str, Any]) -> Callable[..., Trained]:
    """Creates a run of the same recipe, or copies another run's folder."""

    def make(name: str, like: Trained | None = None, root: Path = storage, **keys: Any) -> Trained:
        run = Run.open(name, root)
        if like:
            shutil.copytree(like.run.folder, run.folder)
        args = recipe | keys
        args |= {"output_dir": str(run.output), "ray_run_name": name, "run_name": name}
        args |= {"ray_storage_path": str(root)}
        run.config_dir.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(recipe["deepspeed"], run.config_dir / "ds_z3_config.json")
        args["deepspeed"] = str(run.config_dir / "ds_z3_config.json")
        run.train_yaml.write_text(yaml.safe_dump(dict(args)))
        return Trained(run)

    return make


@pytest.fixture(scope="module")
def uninterrupted(new: Callable[..., Trained]) -> Trained:
    trained = new("uninterrupted")
    assert trained.train() == 0, trained.output
    assert [step for step, _ in trained.losses] == list(range(1, 13))
    return trained


@pytest.fixture(scope="module")
def killed(new: Callable[..., Trained], uninterrupted: Trained) -> Trained:
    """A run whose driver was killed after step 7; its workers end some seconds later."""
    trained = new("driver-killed")
    trained.stop_at(7, signal.SIGKILL)
    assert trained.saved in ([3, 6], [6, 9])
    return trained


@pytest.fixture
def seen(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """A row of the results table, written to the file in CPT_FAULTS_TABLE."""
    values: dict[str, Any] = {"fault": (request.function.__doc__ or "").strip().rstrip(".")}
    yield values
    path = os.environ.get("CPT_FAULTS_TABLE")
    if path and "seen" in values:  # failed tests have no row
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def same(trained: Trained, uninterrupted: Trained, seen: dict[str, Any], result: str) -> None:
    seen.update(seen=result, weights=trained.weights[:12], seconds=round(trained.seconds))
    assert trained.losses == uninterrupted.losses
    assert trained.weights == uninterrupted.weights


def restarts(trained: Trained) -> str:
    return f"restarted by Ray from step {', '.join(map(str, trained.starts[1:]))}"


STEP = {"what": "step", "step": 8}


@pytest.mark.chosen
def test_a_rank_killed_in_a_step(new, uninterrupted, seen) -> None:
    """1 · rank 1 killed in a step."""
    trained = new("rank-1")
    assert trained.train([STEP | {"ranks": [1]}]) == 0, trained.output
    assert trained.starts == [0, 6]
    assert (
        "rank 1 exited without an error message" in trained.output
    )  # may be "one of rank 0 and rank 1"
    same(trained, uninterrupted, seen, restarts(trained))


def test_rank_0_killed_in_a_step(new, uninterrupted, seen) -> None:
    """2 · rank 0 killed in a step."""
    trained = new("rank-0")
    assert trained.train([STEP | {"ranks": [0]}]) == 0, trained.output
    assert trained.starts == [0, 6]
    same(trained, uninterrupted, seen, restarts(trained))


@pytest.mark.chosen
def test_a_rank_killed_while_its_shard_is_written(new, uninterrupted, seen) -> None:
    """3 · a rank killed while DeepSpeed writes its shard."""
    trained = new("shard")
    assert trained.train([{"what": "shard", "ranks": [1], "step": 6}]) == 0, trained.output
    assert trained.starts == [0, 3]
    assert not list(trained.run.output.glob("checkpoint-*"))
    same(trained, uninterrupted, seen, restarts(trained))


def test_a_rank_killed_while_files_move_to_the_storage(new, uninterrupted, seen) -> None:
    """4 · a rank killed while the checkpoint goes to the storage."""
    trained = new("hand-over")
    assert trained.train([{"what": "hand-over", "ranks": [0], "step": 6}]) == 0, trained.output
    assert trained.starts == [0, 3]
    assert all(c.whole for c in manifests.listing(trained.run))
    same(trained, uninterrupted, seen, restarts(trained))


def test_both_workers_killed(new, uninterrupted, seen) -> None:
    """5 · both workers killed."""
    trained = new("both")
    assert trained.train([STEP | {"ranks": [0, 1]}]) == 0, trained.output
    assert trained.starts == [0, 6]
    same(trained, uninterrupted, seen, restarts(trained))


@pytest.mark.chosen
def test_the_driver_killed(new, uninterrupted, killed, seen) -> None:
    """6 · the driver killed, then the command again."""
    trained = new("driver-killed-again", like=killed)
    assert trained.train() == 0, trained.output
    step = killed.saved[-1]
    assert f"was interrupted; it resumes from step {step}" in trained.output
    assert trained.starts == [0, step]
    same(trained, uninterrupted, seen, f"resumed from step {step}")


def test_the_driver_interrupted_by_the_user(new, uninterrupted, seen) -> None:
    """7 · the driver stopped by Ctrl-C, then the command again."""
    trained = new("stopped")
    trained.stop_at(7, signal.SIGINT)
    assert (
        "Interrupted: the training of 'stopped' was stopped by the user at step" in trained.output
    )
    step = trained.saved[-1]
    assert trained.train() == 0, trained.output
    assert trained.starts == [0, step]
    same(trained, uninterrupted, seen, f"clear message, resumed from step {step}")


def _shard(trained: Trained) -> Path:
    newest = manifests.latest(trained.run)
    return next(newest.model.glob("global_step*/*pp_rank_1_*_optim_states.pt"))


def _truncate(trained: Trained) -> None:
    shard = _shard(trained)
    shard.write_bytes(shard.read_bytes()[:-1000])


def _flip(trained: Trained) -> None:
    shard = _shard(trained)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def _remove_manifest(trained: Trained) -> None:
    (manifests.latest(trained.run).path / manifests.MANIFEST).unlink()


@pytest.mark.parametrize(
    ("number", "fault", "damage", "message"),
    [
        (8, "the newest checkpoint's shard truncated", _truncate, "bytes, not the"),
        pytest.param(
            9, "a flipped byte in a shard", _flip, "sha256 differs", marks=pytest.mark.chosen
        ),
        (10, "the newest checkpoint's manifest missing", _remove_manifest, "it has no manifest"),
    ],
)
def test_a_damaged_checkpoint(
    new, uninterrupted, killed, seen, number: int, fault: str, damage: Callable, message: str
) -> None:
    trained = new(f"damaged-{number}", like=killed)
    damage(trained)
    assert trained.train() == 0, trained.output
    assert "skipped TorchTrainer_" in trained.output and message in trained.output
    step = killed.saved[-2]
    assert f"it resumes from step {step}" in trained.output
    assert trained.starts == [0, step]
    seen["fault"] = f"{number} · {fault}"
    same(trained, uninterrupted, seen, f"skipped with its reason; resumed from step {step}")


def test_every_checkpoint_damaged(new, killed, seen) -> None:
    """11 · every checkpoint broken."""
    trained = new("all-damaged", like=killed)
    _flip(trained)
    _truncate(trained)
    before = {p: p.stat().st_mtime_ns for p in trained.run.folder.rglob("*") if p.is_file()}
    assert trained.train() == 1
    assert "CheckpointError: none of the checkpoints" in trained.output
    assert "sha256 differs" in trained.output and "bytes, not the" in trained.output
    after = {p: p.stat().st_mtime_ns for p in trained.run.folder.rglob("*") if p.is_file()}
    assert {p for p in before if after.get(p) != before[p]} <= {trained.run.folder / ".lock"}
    with pytest.raises(CheckpointError, match="nothing was deleted"):
        manifests.latest(trained.run)
    seen.update(seen="a clear error, nothing deleted", weights="", seconds=round(trained.seconds))


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[Path]:
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.chosen
def test_the_storage_full(new, uninterrupted, small_file_system, seen) -> None:
    """12 · the storage full during a save."""
    trained = new("full", root=small_file_system)
    balloon = small_file_system / "balloon"
    fault = {"what": "fill", "ranks": [0], "step": 8, "path": str(balloon), "leave": 500_000}
    assert trained.train([fault]) == 1
    assert "StorageError: the storage ran full" in trained.output
    assert "MiB free, a checkpoint takes 1.8 MiB" in trained.output
    balloon.unlink()
    assert manifests.latest(trained.run).step == 6
    assert trained.train() == 0, trained.output
    assert trained.starts == [0, 6]
    same(trained, uninterrupted, seen, "a clear error; with room again, resumed from step 6")


@pytest.mark.chosen
def test_a_loss_that_is_not_a_number(new, uninterrupted) -> None:
    """The run ends with an error, is not restarted, and keeps the checkpoints before that step."""
    trained = new("diverged")
    assert trained.train([{"what": "nan", "ranks": [1], "step": 8}]) == 1
    assert "DivergedError: the training diverged at step 8, on rank 1: the loss is nan" in (
        trained.output
    )
    assert "last good checkpoint: step 6" in trained.output
    assert trained.starts == [0] and trained.saved == [3, 6]
    assert trained.losses == uninterrupted.losses[:7]
    assert trained.run.state == "started" and not list(trained.run.output.glob("*.safetensors"))


def test_killed_twice(new, uninterrupted, seen) -> None:
    """13 · killed twice in one run."""
    trained = new("twice")
    first, second = STEP | {"ranks": [1]}, {"what": "step", "step": 11, "ranks": [0]}
    assert trained.train([first, second]) == 0, trained.output
    assert trained.starts == [0, 6, 9]
    same(trained, uninterrupted, seen, restarts(trained))


@pytest.mark.parametrize("method", ["lora", "freeze"])
def test_lora_and_freeze_killed(new, seen, method: str) -> None:
    keys = {"finetuning_type": method, "lora_target": "all", "freeze_trainable_layers": 1}
    uninterrupted, killed = new(f"{method}-uninterrupted", **keys), new(f"{method}-killed", **keys)
    assert uninterrupted.train() == 0, uninterrupted.output
    assert killed.train([STEP | {"ranks": [1]}]) == 0, killed.output
    assert killed.starts == [0, 6]
    start = killed.run.events()[0]["parameters"]
    assert 0 < start["trained"] < start["all"]
    seen["fault"] = f"14 · {method}, killed once"
    same(killed, uninterrupted, seen, restarts(killed))


@pytest.mark.chosen
def test_killed_after_the_last_step(new, uninterrupted, seen) -> None:
    """A rank killed when the final model is to be written."""
    trained = new("final")
    assert trained.train([{"what": "final", "ranks": [0]}]) == 0, trained.output
    assert trained.starts == [0, 12]
    assert trained.run.events()[-1]["step"] == 12
    same(trained, uninterrupted, seen, restarts(trained))


def test_a_hung_worker_is_an_error_after_ddp_timeout(new, uninterrupted, seen) -> None:
    """A worker that hangs, `ddp_timeout` 20 s."""
    trained = new("hung", ddp_timeout=20)
    assert trained.train([{"what": "hang", "ranks": [1], "step": 8}]) == 0, trained.output
    assert "a worker hung" in trained.output
    assert trained.starts == [0, 6]
    same(trained, uninterrupted, seen, restarts(trained))


def test_other_numbers_of_workers(new, uninterrupted, killed, seen) -> None:
    """2 → 1 → 2 workers, the driver killed between."""
    trained = new("workers", like=killed)
    trained.stop_at(10, signal.SIGKILL, workers=1)
    newest = manifests.latest(trained.run)
    assert newest.world_size == 1
    assert trained.train(workers=2) == 0, trained.output
    assert "converted from 1 to 2 workers" in trained.output
    assert trained.starts == [0, killed.saved[-1], newest.step]
    for (step, ours), (_, theirs) in zip(trained.losses, uninterrupted.losses, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-4), step
    worst = max(abs(a[1] - b[1]) for a, b in zip(trained.losses, uninterrupted.losses, strict=True))
    seen.update(
        seen=f"converted; every loss within {max(worst, 5e-5):.0e} of the uninterrupted run's",
        weights="",
        seconds=round(trained.seconds),
    )
    assert not (trained.run.folder / "universal").exists()


def test_four_ranks_and_fifty_checkpoints(new, seen) -> None:
    """50 checkpoints by 4 ranks, 2 and the best kept."""
    trained = new(
        "fifty",
        max_steps=50,
        save_steps=1,
        eval_steps=10,
        ray_num_workers=4,
        per_device_train_batch_size=1,
        resources_per_worker={"CPU": 0.5},
    )
    process, most = trained.start(), 0
    while process.poll() is None:
        kept = list(trained.run.folder.glob("TorchTrainer_*/checkpoint_*"))
        most = max(most, len(kept))
        time.sleep(0.02)
    assert process.returncode == 0, process.stdout.read()
    found = manifests.listing(trained.run)
    assert all(c.whole for c in found) and [c.step for c in found][-2:] == [49, 50]
    assert len(found) <= 3 and most <= 4
    last = found[-1]
    assert checkpoints.ranks_with_shards(last) == [0, 1, 2, 3]
    on_disk = sum(f.stat().st_size for f in last.path.rglob("*") if f.is_file())
    assert on_disk <= 1.02 * last.bytes
    assert not list(trained.run.output.glob("checkpoint-*"))
    evals = {e["step"]: e["loss"] for e in trained.run.events() if e["event"] == "eval"}
    assert min(evals, key=evals.get) in [c.step for c in found]
    seen.update(
        seen=f"never more than {most} on the storage; {on_disk / last.bytes:.3f} × the files' size",
        weights="",
        seconds=0,
    )
