"""Two Ray nodes: another number of workers on them, and a node that is lost for good."""

from __future__ import annotations

import json
import os
import signal
import time

import psutil
import pytest
from nodes import Node, cluster
from test_faults import LIMIT, TESTS, new, recipe, uninterrupted  # noqa: F401 (fixtures)

pytestmark = [pytest.mark.training, pytest.mark.faults]

SPREAD = {"placement_strategy": "STRICT_SPREAD"}
PATH = {"PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}  # the nodes import the planted faults


def test_one_worker_then_two_on_two_nodes(new, uninterrupted, monkeypatch) -> None:  # noqa: F811
    """Ray counts LOCAL_RANK per node: both ranks are 0, and each takes its own slices."""
    trained = new("one-then-two", **SPREAD)
    trained.stop_at(7, signal.SIGKILL, workers=1)
    step = trained.saved[-1]
    with cluster(1, Node(), **PATH) as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert trained.train(workers=2) == 0, trained.output
    assert "converted from 1 to 2 workers" in trained.output
    start = next(e for e in reversed(trained.run.events()) if e["event"] == "start")
    assert start["step"] == step and len({rank["node"] for rank in start["ranks"]}) == 2
    assert start["weights"]["share"] == 1 and start["weights"]["parameters"] > 10
    for (at, ours), (_, theirs) in zip(trained.losses, uninterrupted.losses, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-4), at


def test_a_node_that_is_lost_for_good_is_an_error(new, monkeypatch) -> None:  # noqa: F811
    """The workers cannot be placed again: the wait ends, and the checkpoints are named."""
    trained = new("node-lost", **SPREAD)
    soon = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3"}
    slow = {"CPT_FAULTS": json.dumps([{"what": "slow", "seconds": 1.5}])}
    with cluster(1, Node(), **PATH, **slow, **soon) as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        monkeypatch.setenv("CPT_PLACEMENT_TIMEOUT", "10")
        process = trained.start()
        until = time.monotonic() + LIMIT
        while not any(done == 4 for done, _ in trained.losses):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < until
            time.sleep(0.1)
        _kill_node(address, "127.0.0.2")  # the driver is on the other one
        output, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 1, output
    assert "nodes were lost: waiting up to 10 s for room for the workers" in output
    assert "UnreadyError" in output and "2 workers" in output, output[-3000:]
    assert trained.saved[-1] == 3


def _kill_node(address: str, ip: str) -> None:
    """Kills a node's raylet, and with it all that the node runs."""
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or [])
        if "raylet/raylet" in words and f"={ip} " in words and address.split(":")[1] in words:
            process.kill()
