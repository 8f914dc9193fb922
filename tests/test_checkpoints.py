"""Checkpoints without a training: manifests, damage, order, retention, resuming."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from cpt_helpers import checkpoints, recipes
from cpt_helpers.checkpoints import manifests
from cpt_helpers.config import planning, preflight, resolution
from cpt_helpers.errors import (
    CheckpointError,
    ConfigError,
    RunExistsError,
    StorageError,
    TrainingError,
)
from cpt_helpers.run import Run
from cpt_helpers.train import fault_demo, launch, worker

ATTEMPT = "TorchTrainer_ab12c_00000_0_2026-11-22_10-00-00"
LATER = "TorchTrainer_ff12c_00000_0_2026-11-22_12-00-00"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.open("r", tmp_path)


def write(run: Run, number: int, step: int, loss: float | None = None, attempt=ATTEMPT) -> Path:
    """Writes a checkpoint of two ranks as the workers do."""
    written = run.folder / f"checkpoint-{step}"
    shards = written / f"global_step{step}"
    shards.mkdir(parents=True)
    for rank in (0, 1):
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        (shards / name).write_bytes(bytes([rank]) * 5000)
        (written / f"rng_state_{rank}.pth").write_bytes(bytes([rank]) * 10)
    (written / "model.safetensors").write_bytes(b"weights" * 1000)
    (written / "preprocessor_config.json").write_text("{}")
    path = run.folder / attempt / f"checkpoint_{number:06d}"
    files = {}
    for rank in (0, 1):
        files |= manifests.move_own(written, path / "checkpoint", rank)
    shutil.rmtree(written)
    losses = {} if loss is None else {"d_heldout": loss}
    manifests.write_manifest(path, step, 2, files, losses)
    return path


def note(run: Run, *events: dict) -> None:
    run.folder.mkdir(exist_ok=True)
    with run.metrics.open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)


def shard(checkpoint: Path) -> Path:
    return next(checkpoint.glob("checkpoint/global_step*/*rank_1_*"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_each_rank_moves_its_files(run: Run) -> None:
    written = run.folder / "checkpoint-5"
    (written / "global_step5").mkdir(parents=True)
    names = [
        "model.safetensors",
        "rng_state_0.pth",
        "rng_state_10.pth",
        "global_step5/zero_pp_rank_1_mp_rank_00_model_states.pt",
        "global_step5/bf16_zero_pp_rank_10_mp_rank_00_optim_states.pt",
        "preprocessor_config.json",
    ]
    for name in names:
        (written / name).write_text(name)
    moved = {rank: set(manifests.move_own(written, run.folder / "c", rank)) for rank in (0, 1, 10)}
    assert moved[0] == {"c/model.safetensors", "c/rng_state_0.pth", "c/preprocessor_config.json"}
    assert moved[1] == {f"c/{names[3]}"}
    assert moved[10] == {f"c/{names[2]}", f"c/{names[4]}"}
    assert not [p for p in written.rglob("*") if p.is_file()], "a file was not moved"


def test_files_on_another_file_system_are_copied_and_removed(run: Run) -> None:
    local = Path("/dev/shm/cpt-helpers-test")
    if not local.parent.is_dir() or local.parent.stat().st_dev == run.storage.stat().st_dev:
        pytest.skip("no second file system here")
    shutil.rmtree(local, ignore_errors=True)
    local.mkdir()
    (local / "model.safetensors").write_bytes(b"abc" * 10_000)
    try:
        moved = manifests.move_own(local, run.folder / "c" / "checkpoint", 0)
        assert not list(local.iterdir())
    finally:
        shutil.rmtree(local)
    manifests.write_manifest(run.folder / "c", 1, 1, moved, {})
    assert manifests._read(run.folder / "c", deep=True).whole


def test_listing_gives_the_order_and_the_reason_for_damage(run: Run) -> None:
    paths = {step: write(run, n, step) for n, step in enumerate((5, 10, 15, 20, 25))}
    paths[30] = write(run, 0, 30, attempt=LATER)
    flip(shard(paths[5]))
    shard(paths[10]).write_bytes(b"short")
    shard(paths[15]).unlink()
    (paths[20] / manifests.MANIFEST).unlink()
    (paths[25] / manifests.MANIFEST).write_text("{")
    found = manifests.listing(run)
    assert [c.step for c in found] == [5, 10, 15, 20, 25, 30]
    reasons = [c.broken for c in found]
    assert "sha256 differs" in reasons[0] and "rank_1" in reasons[0]
    assert "has 5 bytes, not the 5,000" in reasons[1]
    assert reasons[2].endswith("is missing")
    assert reasons[3].startswith("it has no manifest")
    assert reasons[4].startswith("its manifest cannot be read")
    assert found[5].whole and found[5].world_size == 2 and found[5].bytes > 17_000
    assert manifests.listing(run, deep=False)[0].whole, "only reading every byte finds it"


def test_latest_skips_damaged_checkpoints_with_a_message(run: Run) -> None:
    paths = [write(run, n, step) for n, step in enumerate((5, 10, 15))]
    flip(shard(paths[2]))
    messages: list[str] = []
    assert manifests.latest(run, messages.append).step == 10
    assert (
        len(messages) == 1
        and "checkpoint_000002, step 15" in messages[0]
        and "sha256" in messages[0]
    )
    again = write(run, 0, 15, attempt=LATER)
    messages.clear()
    assert manifests.latest(run, messages.append).path == again and not messages


def test_no_whole_checkpoint_is_an_error_if_one_was_finished(run: Run) -> None:
    assert manifests.latest(run) is None
    half = run.folder / ATTEMPT / "checkpoint_000000" / "checkpoint"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    messages: list[str] = []
    assert manifests.latest(run, messages.append) is None  # killed in its first save: starts again
    assert "never finished" in messages[0]
    note(run, {"event": "save", "step": 5})  # here one had been finished
    with pytest.raises(CheckpointError, match=r"none of the checkpoints(?s:.*)nothing was deleted"):
        manifests.latest(run)
    assert (half / "model.safetensors").is_file()
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        manifests.pick(run, "last", None)


def test_checkpoints_are_shown_as_tables(run: Run) -> None:
    write(run, 0, 5, 2.0)
    shard(write(run, 1, 10)).unlink()
    found = checkpoints.listing(run)
    table = checkpoints.table(found, ["d_heldout"])
    assert list(table["step"]) == [5, 10]
    assert list(table["loss, d_heldout"]) == ["2.0000", "not measured"]
    assert table["state"].iloc[0] == "whole" and table["state"].iloc[1].endswith("is missing")
    files = checkpoints.files(found[0])
    assert files["file"].iloc[0] == "model.safetensors" and all(files["content"])
    sizes = checkpoints.sizes(found[0], 1000)
    assert sizes.ranks_with_shards == [0, 1] and 1 < sizes.storage_ratio < 1.2
    assert sizes.bytes_per_trained_parameter == pytest.approx(found[0].bytes / 1000, abs=0.01)
    assert "ranks with a shard" in sizes._repr_html_()


def test_a_training_is_shown_as_a_table(run: Run) -> None:
    start = {"event": "start", "step": 0, "time": 10.0, "tokens_per_step": 8, "world_size": 2}
    start |= {"zero_stage": 3, "optimizer": "O", "parameters": {"all": 20, "trained": 10}}
    step = {"event": "step", "seconds": 2.0, "mfu": 0.25, "memory": 2**30}
    note(run, start, step | {"step": 1, "time": 14.0, "loss": 3.0})
    with pytest.raises(TrainingError, match="is not complete"):
        launch.summary(run)
    end = {"event": "end", "step": 2, "time": 20.0, "memory": [2**31, 2**30]}
    note(run, step | {"step": 2, "time": 16.0, "loss": 2.5}, end)
    run.logs.mkdir()
    (run.logs / "launched.json").write_text('{"launched": [4.0]}')
    summary = launch.summary(run)
    assert (summary["steps"], summary["tokens"], summary["tokens_per_second"]) == (2, 16, 4.0)
    assert (summary["seconds"], summary["seconds_to_first_step"]) == (16.0, 8.0)
    assert (summary["first_loss"], summary["last_loss"], summary["mfu"]) == (3.0, 2.5, 0.25)
    shown = summary._repr_html_()
    assert "2.0 GiB" in shown and "10 of 20" in shown and "25%" in shown


def test_a_failed_demonstration_is_shown_and_recorded(run: Run) -> None:
    demo = fault_demo.FaultDemo(run.folder, error="OSError: no file")
    assert not demo.equal and demo.as_dict() == {"failed": "OSError: no file"}
    assert "the trained run is not affected" in demo._repr_html_()


def test_pruning_keeps_the_last_and_the_best(run: Run) -> None:
    for n, (step, loss) in enumerate([(5, 2.0), (10, 1.0), (15, None), (20, 1.5), (25, 3.0)]):
        write(run, n, step, loss)
    unfinished = run.folder / ATTEMPT / "checkpoint_000009"
    unfinished.mkdir()
    assert manifests.prune(run, 2, "d_heldout") == [5, 15]
    assert [c.step for c in manifests.listing(run)] == [10, 20, 25]
    assert not unfinished.exists()
    assert manifests.pick(run, "best", "d_heldout").step == 10
    assert manifests.pick(run, "last", "d_heldout").step == 25
    assert manifests.prune(run, None, "d_heldout") == []


def test_pruning_removes_damaged_checkpoints_of_later_steps(run: Run) -> None:
    """After resuming from an older checkpoint, they do not count and are removed."""
    write(run, 0, 5)
    later = [write(run, n, step) for n, step in ((1, 50), (2, 55))]
    for path in later:
        flip(shard(path))
    now = write(run, 0, 7, attempt=LATER)
    assert manifests.prune(run, 2, None, newest=now) == [50, 55]
    assert [c.step for c in manifests.listing(run)] == [5, 7]
    assert manifests.latest(run).path == now


def test_a_finished_checkpoint_is_not_overwritten(run: Run) -> None:
    path = write(run, 0, 5)
    with pytest.raises(CheckpointError, match="over a finished one"):
        manifests.clear(path)
    (path / manifests.MANIFEST).unlink()
    manifests.clear(path)
    assert not path.exists()


def test_rewind_removes_records_after_the_step(run: Run) -> None:
    start = {"event": "start", "step": 0, "time": 1.0, "max_steps": 9}
    note(run, start, {"event": "eval", "step": 0, "time": 2.0})
    note(run, *({"event": "step", "step": s, "loss": 9 - s, "time": 3.0 + s} for s in (1, 2, 3, 4)))
    with run.metrics.open("a") as file:
        file.write('{"event": "step", "st')  # cut short by a crash
    run.output.mkdir()
    log = run.output / "trainer_log.jsonl"
    log.write_text("".join(json.dumps({"current_steps": s}) + "\n" for s in (1, 2, 3)))
    worker.rewind(run, 2)
    note(run, start | {"step": 2, "time": 99.0})
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [(e["event"], e["step"]) for e in lines] == [
        ("start", 0),
        ("eval", 0),
        ("step", 1),
        ("step", 2),
        ("start", 2),
    ]
    assert len(log.read_text().splitlines()) == 2
    worker.rewind(run, 0)  # from the start: only the start events stay
    assert [e["event"] for e in run.events()] == ["start", "start"]


def test_only_one_process_trains_a_run(run: Run) -> None:
    refused = pytest.raises(RunExistsError, match="being trained by another process")
    with run.held(), refused, run.held():
        pass
    with run.held():
        pass


def test_another_number_of_workers_keeps_the_global_batch() -> None:
    args = recipes.Recipe(ray_num_workers=4, per_device_train_batch_size=2)
    two = args.with_workers(2)
    assert (two["ray_num_workers"], two["gradient_accumulation_steps"]) == (2, 2)
    eight = args.with_workers(8)
    assert (eight["per_device_train_batch_size"], eight["gradient_accumulation_steps"]) == (1, 1)
    assert two.global_batch == eight.global_batch == args.global_batch == 8
    assert args.with_workers(None) is args
    with pytest.raises(ConfigError, match=r"3 workers cannot share a step of 8(?s:.*)1, 2, 4, 8"):
        args.with_workers(3)


def test_keys_that_may_change_when_a_run_resumes(run: Run) -> None:
    before = recipes.Recipe(max_steps=9, dataset="d", ray_num_workers=2, save_steps=5)
    before["per_device_train_batch_size"] = 2
    note(run, {"event": "start", "step": 0, "time": 1.0})
    one = {"ray_num_workers": 1, "gradient_accumulation_steps": 2, "save_steps": 3}
    resolution.refuse_other_training(run, before, before | one)
    with pytest.raises(RunExistsError, match="the global batch was 4, is 2"):
        resolution.refuse_other_training(run, before, before | {"ray_num_workers": 1})
    with pytest.raises(RunExistsError, match=r"dataset was 'd', is 'e', max_steps was 9, is 10"):
        resolution.refuse_other_training(run, before, before | {"max_steps": 10, "dataset": "e"})
    note(run, {"event": "end", "step": 9, "time": 2.0})
    with pytest.raises(RunExistsError, match="save_steps was 5, is 3"):
        resolution.refuse_other_training(run, before, before | {"save_steps": 3})


def test_equal_parameter_groups_are_merged() -> None:
    groups = [
        {"params": [1], "weight_decay": 0.0, "lr": 1.0},
        {"params": [2], "weight_decay": 0.0, "lr": 1.0},
        {"params": [], "weight_decay": 0.1, "lr": 1.0},
        {"params": [3], "weight_decay": 0.1, "lr": 2.0},
    ]
    optimizer = SimpleNamespace(param_groups=groups)
    from cpt_helpers.train.trainer import merge_groups

    merge_groups(optimizer)
    assert [group["params"] for group in optimizer.param_groups] == [[1, 2], [3]]


def test_failures_that_are_retried(tmp_path: Path) -> None:
    from cpt_helpers.train.failures import Cause

    log = tmp_path / "rank-0.log"
    lost = Cause([])
    assert not lost.would_repeat("The actor died unexpectedly", trained=False)
    assert lost.would_repeat("ModuleNotFoundError: cpt_helpers", trained=False)
    log.write_text("--- rank 0, now, pid 1\nValueError: no such template\n")
    assert Cause([log]).would_repeat("", trained=False)
    assert not Cause([log]).would_repeat("", trained=True)
    log.write_text("--- rank 0, now, pid 1\nRuntimeError: [gloo] Connection closed by peer\n")
    assert not Cause([log]).would_repeat("", trained=False)
    log.write_text("--- rank 0, now, pid 1\nOSError: [Errno 28] No space left on device\n")
    assert Cause([log]).would_repeat("", trained=True)


def test_the_cause_is_the_rank_that_died_first(run: Run) -> None:
    from cpt_helpers.train.failures import cause_of, readable_error

    run.logs.mkdir(parents=True)
    old = "--- rank 1, attempt aa.0, now, pid 1\nValueError: of an earlier launch\n"
    (run.logs / "rank-0.log").write_text(
        "--- rank 0, attempt aa.1, now, pid 1\n"
        "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:3690\n"
        "ncclRemoteError: A call failed possibly due to a network error or a remote process "
        "exiting prematurely.\n"
    )
    (run.logs / "rank-1.log").write_text(old + "--- rank 1, attempt aa.1, now, pid 2\n")
    (run.logs / "rank-2.log").write_text(old.replace("rank 1", "rank 2"))
    cause = cause_of(run, "aa.1")
    assert cause.sentence.startswith("rank 1 exited without an error message")
    assert not cause.would_repeat("", trained=False), "a rank lost while it loads is retried"
    assert "rank 1 exited" in str(readable_error(run, "", ["aa.0", "aa.1"]))


@pytest.mark.parametrize("name", ["DivergedError", "WeightsError"])
def test_failures_that_a_restart_would_repeat_are_not_retried(run: Run, name: str) -> None:
    from cpt_helpers import errors
    from cpt_helpers.train.failures import cause_of, readable_error

    run.logs.mkdir(parents=True)
    line = f"cpt_helpers.errors.{name}: the training cannot be used\n"
    (run.logs / "rank-0.log").write_text(f"--- rank 0, attempt aa.0, now, pid 1\n{line}")
    assert cause_of(run, "aa.0").would_repeat("", trained=True)
    if name == "DivergedError":
        note(run, {"event": "start", "step": 0, "time": 1.0, "attempt": "aa.0"})
        diverged = {"event": "diverged", "step": 7, "time": 2.0, "attempt": "aa.0"}
        note(run, diverged | {"rank": 1, "reason": "the loss is nan"})
        write(run, 0, 5)
        write(run, 1, 7)
    error = readable_error(run, "", ["aa.0"])
    assert type(error) is getattr(errors, name)
    if name == "DivergedError":
        assert "at step 7, on rank 1: the loss is nan" in str(error)
        assert "last good checkpoint: step 5" in str(error)
        assert run.state == "started"


def test_too_little_storage_is_an_error_with_both_sizes(run: Run) -> None:
    disk = {"checkpoint": 1e6, "kept": 4, "model": 1.0, "total": 4e6}
    run.record("03_config", {"plan": {"disk": disk}})
    with pytest.raises(StorageError, match=r"GiB free, 4000000\.0 GiB needed(?s:.*)4 checkpoints"):
        preflight.room(run, recipes.Recipe())


def test_storage_that_a_run_needs() -> None:
    """SmolLM2-135M in fp32: its checkpoints have 16.0 bytes per parameter (measured)."""
    size = planning.ModelSize("m", 134_515_008, 1, trained=134_515_008)
    args = recipes.Recipe(finetuning_type="full", deepspeed="z3", save_steps=10)
    disk = planning.disk(args, size, steps=20)
    assert disk.checkpoint == pytest.approx(2.16e9 / 2**30, rel=0.01) and disk.kept == 2
    many = planning.disk(args | {"save_total_limit": 2}, size, steps=500)
    assert many.kept == 4  # two, the best, and the one being written
    assert many.total == pytest.approx(4 * many.checkpoint + 2 * many.model, rel=0.01)
