"""A run's name, storage, steps and results; the machine it is to run on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from cpt_helpers import display, notebook, pipeline, plots, run
from cpt_helpers.errors import ParameterError, RunExistsError, StepError, StorageError, UnreadyError
from cpt_helpers.setup import cluster, machine


@pytest.mark.parametrize("name", ["", "a/b", "../up", "-x", "models", "x" * 65, "a b", None, 7])
def test_invalid_run_names_are_refused(name: object, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="RUN_NAME"):
        run.Run.open(name, tmp_path)


def test_order_of_the_storage_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "CLUSTER_STORAGE", tmp_path / "nomount")
    monkeypatch.chdir(tmp_path)
    assert run.storage_root() == tmp_path / "cluster_storage"
    monkeypatch.setattr(run, "CLUSTER_STORAGE", tmp_path / "mount")
    (tmp_path / "mount").mkdir()
    assert run.storage_root() == tmp_path / "mount"
    monkeypatch.setenv("CPT_STORAGE", str(tmp_path / "env"))
    assert run.storage_root() == tmp_path / "env"
    assert run.storage_root(tmp_path / "given") == tmp_path / "given"


def test_an_unwritable_storage_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        run.storage_root(tmp_path / "file" / "storage")
    with pytest.raises(StorageError, match="cannot be written"):
        run.storage_root("/proc/storage")
    with pytest.raises(StorageError, match="s3://bucket/x is not a path"):
        run.storage_root("s3://bucket/x")


def test_too_little_free_space_is_refused(tmp_path: Path) -> None:
    need = shutil.disk_usage(tmp_path).free / 2**30 + 9
    with pytest.raises(StorageError, match=rf"[\d.]+ GiB free, {need:.1f} GiB needed"):
        machine.require_room(tmp_path, need)


def test_a_step_records_and_the_next_one_needs_it(tmp_path: Path) -> None:
    given = {"RUN_NAME": "r", "STORAGE": str(tmp_path)}
    with pytest.raises(StepError, match="01_setup has not been run"):
        notebook.begin("02_data", needs="01_setup", **given)
    first = notebook.begin("01_setup", **given)
    with pytest.raises(StepError, match="a check of 01_setup failed: the sky is green"):
        first.finish({"a": 1}, {"the sky is blue": True, "the sky is green": False})
    assert not first.run.step_json("01_setup").exists(), "a broken step was recorded"
    first.finish({"model": {"path": "p"}}, {"the sky is blue": True}, shown={"a star falls": False})
    second = notebook.begin("02_data", needs="01_setup", **given)
    second.finish({"model": {"size": 2}}, {})
    results = json.loads(second.run.results_json.read_text())
    assert results["model"] == {"path": "p", "size": 2}
    assert set(results["notebooks"]) == {"01_setup", "02_data"}
    assert results["notebooks"]["01_setup"]["warnings"] == ["a star falls"]
    assert results["notebooks"]["02_data"]["warnings"] == []


def test_a_trained_run_refuses_other_settings(tmp_path: Path) -> None:
    given = {"RUN_NAME": "r", "STORAGE": str(tmp_path), "CORPUS": "news", "OVERRIDES": {}}
    step = notebook.begin("02_data", **given)
    step.finish({}, {})
    notebook.begin("02_data", **given | {"CORPUS": "ray_docs"})  # nothing trained: free to change
    step.run.metrics.write_text('{"event": "start", "step": 0}\n')
    notebook.begin("02_data", **given)
    with pytest.raises(RunExistsError, match="CORPUS was 'news', is now 'ray_docs'"):
        notebook.begin("02_data", **given | {"CORPUS": "ray_docs"})


def test_progress_line(tmp_path: Path) -> None:
    here = run.Run.open("r", tmp_path)
    here.metrics.parent.mkdir(parents=True, exist_ok=True)
    begun = {"event": "start", "step": 0, "time": 1.0, "max_steps": 2, "tokens_per_step": 100}
    step = {"event": "step", "step": 1, "time": 2.0, "seconds": 0.5, "loss": 3.0, "mfu": 0.25}
    held_out = {"eval_on_start": True, "eval_strategy": "steps"}
    none = {"eval_on_start": False, "eval_strategy": "no"}
    for measures, events, said in (
        ({}, [], "workers are starting (imports, model, data)"),
        (held_out, [begun], "measuring held-out text, then the first step"),
        (none, [begun], "the first step"),
        (none, [begun, step], "loss 3.000, 200 tokens/s, 25% of the peak, 0:00 of steps left"),
        (held_out, [begun, step, step | {"step": 2}], "measuring held-out text"),
        (none, [begun, step, step | {"step": 2}], "writing the final model"),
        (none, [begun, step, {"event": "end", "step": 2, "time": 3.0}], "trained"),
    ):
        lines = [json.dumps(e | (measures if e is begun else {})) + "\n" for e in events]
        here.metrics.write_text("".join(lines))
        assert display.progress(here)[2].endswith(said)


def test_overrides_as_dict_or_yaml() -> None:
    assert notebook.as_overrides("{max_steps: 3}") == {"max_steps": 3}
    assert notebook.as_overrides("") == notebook.as_overrides(None) == {}
    for bad in ("max_steps 3", [1], 7, {1: 2}, "{a: "):
        with pytest.raises(ParameterError, match="OVERRIDES"):
            notebook.as_overrides(bad)


def test_events_of_a_resumed_run_appear_once(tmp_path: Path) -> None:
    one = run.Run.open("r", tmp_path)
    assert one.state == "new"
    steps = [("start", 0), ("step", 1), ("step", 2), ("step", 3)]
    again = [("start", 2), ("step", 3), ("step", 4), ("end", 4)]
    one.folder.mkdir()
    lines = [json.dumps({"event": event, "step": step}) for event, step in steps]
    one.metrics.write_text("\n".join(lines) + '\n{"event": "st')
    assert one.state == "started"
    more = [json.dumps({"event": event, "step": step}) for event, step in again]
    one.metrics.write_text("\n".join(lines + more) + "\n")
    assert [e["step"] for e in one.events() if e["event"] == "step"] == [1, 2, 3, 4]
    assert one.state == "complete"


def test_a_token_in_a_parameter_is_refused(tmp_path: Path) -> None:
    secret = {"ray_init_kwargs": {"runtime_env": {"env_vars": {"HF_TOKEN": "hf_canary0123"}}}}
    given = {"RUN_NAME": "r", "STORAGE": str(tmp_path), "OVERRIDES": secret}
    with pytest.raises(ParameterError, match="OVERRIDES holds a token") as refused:
        notebook.begin("01_setup", **given)
    assert "canary" not in str(refused.value)
    assert not (tmp_path / "r").exists()


def test_the_machine_is_reported(tmp_path: Path) -> None:
    report = machine.inspect_machine(tmp_path)
    assert report.wrong_versions == []
    assert {"ray", "torch", "llamafactory", "deepspeed"} <= set(report.versions)
    report.raise_if_unready(need_gib=0.001)
    wrong = SimpleNamespace(**vars(report) | {"wrong_versions": ["ray: 2.55.1, want 2.48.0"]})
    with pytest.raises(UnreadyError, match=r"ray: 2\.55\.1, want 2\.48\.0"):
        machine.MachineReport.raise_if_unready(wrong)


def test_workers_without_room_are_refused() -> None:
    """Refused at once on one machine; after a wait where a cluster might still start nodes."""
    import os

    with cluster.ray_cluster() as ray:
        cores = os.cpu_count()
        cluster.require_workers(ray, cores, {"CPU": 1})
        with pytest.raises(UnreadyError, match=rf"room for {cores}\n"):
            cluster.require_workers(ray, cores + 1, {"CPU": 1})
        with pytest.raises(UnreadyError, match=r"4 workers with 1 GPU each"):
            cluster.require_workers(ray, 4, {"GPU": 1})
        assert not cluster._can_be_placed(ray, 1, {"GPU": 1}, "PACK", timeout=1.0)
        assert cluster._can_be_placed(ray, 1, {"CPU": 1}, "PACK", timeout=30.0)
    assert not ray.is_initialized()


def test_an_unreachable_cluster_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with (
        pytest.raises(UnreadyError, match=r"does not answer(?s:.*)RAY_ADDRESS"),
        cluster.ray_cluster(),
    ):
        pass


def test_the_parts_of_a_launch_add_up(tmp_path: Path) -> None:
    """Every second lies in one part: a restart's, steps that were not logged, the last save."""
    opened = run.Run.open("r", tmp_path)
    opened.logs.mkdir(parents=True)
    (opened.logs / "launched.json").write_text(json.dumps({"launched": [0.0, 100.0]}))
    log = [("start", 0, 40.0), ("step", 2, 60.0), ("save", 2, 65.0),  # of the launch before
           ("start", 2, 130.0), ("step", 4, 150.0), ("eval", 5, 167.0), ("save", 5, 170.0),
           ("step", 6, 180.0), ("diverged", 7, 190.0), ("start", 5, 200.0),  # step 6 was lost
           ("step", 6, 210.0), ("end", 6, 214.0)]  # fmt: skip
    lines = [{"event": what, "step": step, "time": at, "seconds": 10.0} for what, step, at in log]
    opened.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    spent = plots.time_spent(opened)
    assert spent == {
        "start-up": 30.0 + 30.0,
        "steps": 20.0 + 10.0 + 10.0,  # 4 and, not logged, 5; then 6 again
        "evaluation": 7.0,
        "checkpoints": 3.0,
        "final save": 4.0,
    }
    assert sum(spent.values()) == 214.0 - 100.0
    (axes,) = plots.plot_time(spent).axes
    assert [bar.get_width() for bar in axes.patches] == list(spent.values())
    assert axes.get_legend_handles_labels()[1][1] == "steps\n40 s · 35%"


@pytest.mark.parametrize("on_gpu", [True, False])
def test_memory_settings_of_glibc_are_for_cpus(
    on_gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the notebooks' kernels start with, and the workers with them."""
    monkeypatch.setattr(machine, "_has_nvidia", lambda: on_gpu)
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if "MALLOC" not in k})
    with pytest.raises(ParameterError, match="unknown parameter NOBODY"):
        pipeline.run_all(run.Run.open("glibc", tmp_path), {"NOBODY": 1})
    assert {name for name in os.environ if "MALLOC" in name} == (
        set() if on_gpu else set(machine.KEEP_MEMORY)
    )
