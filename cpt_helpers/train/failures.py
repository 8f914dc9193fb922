"""A failed training: its cause, its restarts, and one readable error.

The ranks' logs name the cause. The driver reads them when Ray is about to restart the workers.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import display
from ..checkpoints import manifests
from ..config import preflight
from ..errors import CptError, DivergedError, StorageError, TrainingError, WeightsError
from ..recipes import Recipe
from ..run import Run
from ..setup import cluster, machine

# A rank's errors after another rank is gone: consequences, not causes.
_CONSEQUENCES = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "DistBackendError",
    "DistNetworkError", "gloo", "NCCL", "Timed out",
    "nccl", "remote process",  # ncclRemoteError: "… or a remote process exiting prematurely"
)  # fmt: skip
_NEVER_RETRIED = ("DivergedError", "WeightsError")  # a restart has the same result
_TIMED_OUT = ("Timed out", "timed out", "Timeout(ms)", "Watchdog caught collective")
_FULL = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed writing")
_FEWEST_BYTES = 2**20  # with less free space no training can continue
_HEADER = re.compile(r"^--- rank \d+, .*$", re.MULTILINE)
_EXCEPTION = re.compile(r"^([A-Za-z_][\w.]*)?(Error|Exception|Interrupt|Exit)\b.*")


class Cause:
    """Why an attempt failed, according to the ranks' logs.

    Attributes:
        log: The log of the rank that failed first; ``None`` if no rank started.
        lines: That rank's output.
        reason: Its exception; empty if it was killed and the others only lost their connection.
        sentence: The cause in words.
        full: The storage had no room left.
    """

    def __init__(self, logs: list[Path]) -> None:
        outputs = {log: last_attempt(log) for log in logs}
        errors = {log: list(filter(_EXCEPTION.match, lines)) for log, lines in outputs.items()}
        causes = {
            log: lines[-1]
            for log, lines in errors.items()
            if lines and not any(mark in lines[-1] for mark in _CONSEQUENCES)
        }
        silent = [log for log in logs if not errors[log]]
        # The rank that failed first ended first; the others only lost their connection to it.
        ended = sorted(causes or silent or logs, key=lambda log: log.stat().st_mtime)
        self.log = ended[0] if ended else None
        self.lines = outputs[ended[0]] if ended else []
        self.reason = causes.get(ended[0], "") if ended else ""
        output = "\n".join(line for lines in outputs.values() for line in lines[-60:])
        self.full = any(mark in output for mark in _FULL)
        if self.reason:
            self.sentence = f"{_rank_of(ended[0])} failed: {self.reason}"
        elif any(mark in output for mark in _TIMED_OUT):
            self.sentence = "a worker hung: the other workers waited longer than ddp_timeout"
        elif silent:
            ranks = " and ".join(map(_rank_of, silent))
            ranks = f"one of {ranks}" if len(silent) > 1 else ranks
            self.sentence = f"{ranks} exited without an error message (killed, or out of memory)"
        else:
            self.sentence = "a worker was lost"

    def would_repeat(self, ray_error: str, *, trained: bool) -> bool:
        """Whether restarted workers would fail again.

        Args:
            ray_error: Ray's error message.
            trained: Whether the attempt reached its first event.
        """
        if self.log is None:  # no rank started: the node was lost, or the package is missing
            return "died" not in ray_error.lower()
        certain = any(name in self.reason for name in _NEVER_RETRIED)
        return self.full or certain or bool(self.reason and not trained)


def cause_of(run: Run, attempt: str) -> Cause:
    """Why an attempt failed; ``attempt`` is the name in the header of its ranks' logs."""
    logs = sorted(run.logs.glob("rank-*.log"))
    cause = Cause([log for log in logs if f", attempt {attempt}," in _last_header(log)])
    # The logs are on the storage: when it is full, they may not contain the error.
    free = shutil.disk_usage(run.storage).free + manifests.unfinished_bytes(run)
    cause.full |= free < (_last_checkpoint_bytes(run) or _FEWEST_BYTES)
    return cause


def readable_error(run: Run, ray_error: str, attempts: list[str]) -> CptError:
    """A failed training as one error: the first cause, that rank's last lines, its log."""
    cause = cause_of(run, attempts[-1])
    for event in run.events():
        if event["event"] == "diverged" and event.get("attempt") in attempts:
            return _diverged_error(run, event)
    if cause.log is None:
        lines = [line.strip() for line in ray_error.splitlines() if line.strip()]
        return TrainingError(
            f"the workers could not be started: {(lines or ['no reason was given'])[-1][:300]}",
            where=run.folder,
            do="look at Ray's own logs in /tmp/ray/session_latest/logs on the node that failed",
        )
    where = "\n".join([f"{cause.log}, its last lines:", *cause.lines[-12:]])
    if cause.full:
        free, size = shutil.disk_usage(run.storage).free, _last_checkpoint_bytes(run)
        needed = f", a checkpoint takes {machine.format_bytes(size)}" if size else ""
        return StorageError(
            f"the storage ran full while '{run.name}' wrote to it: "
            f"{machine.format_bytes(free)} free{needed}",
            where=where,
            expected="room for one checkpoint more than save_total_limit keeps",
            do="make room and repeat the command: it resumes from the newest whole checkpoint",
        )
    count = f" ({len(attempts)} attempts)" if len(attempts) > 1 else ""
    error = WeightsError if "WeightsError" in cause.reason else TrainingError
    return error(
        f"training failed in a worker{count}: {cause.reason or cause.sentence}",
        where=where,
        do="fix the cause and repeat the command: it resumes from the newest checkpoint "
        "(a change of the recipe needs a new RUN_NAME)",
    )


def _diverged_error(run: Run, event: dict[str, Any]) -> DivergedError:
    whole = [c for c in manifests.listing(run, deep=False) if c.whole and c.step < event["step"]]
    good = f"step {whole[-1].step}, {whole[-1].path}" if whole else "none"
    return DivergedError(
        f"the training diverged at step {event['step']}, on rank {event['rank']}: "
        f"{event['reason']}",
        where=f"{run.logs}/rank-{event['rank']}.log\nlast good checkpoint: {good}",
        expected="a loss above 0 and a gradient norm up to 1e6, both finite",
        do="train under another RUN_NAME with a lower learning_rate, a longer warm-up or a lower "
        "max_grad_norm; if it happens again, look at the documents of that step",
    )


class Attempts:
    """The launch of a training and its restarts, and whether to restart again.

    Attributes:
        names: The name of the launch, then of each restart. Workers mark their records and logs
            with it, so that the clocks of two machines are never compared.
    """

    def __init__(self, run: Run, args: Recipe, retries: int, ray: Any) -> None:
        self.run, self.args, self.retries, self.ray = run, args, retries, ray
        self.launch = uuid.uuid4().hex[:8]
        self.names = [f"{self.launch}.0"]
        self.hand_over: Callable[..., None] = lambda *_: None
        self.waiting_since = 0.0  # when the workers no longer had room on the cluster
        self.last_check = 0.0
        path = run.logs / "launched.json"
        before = json.loads(path.read_text())["launched"] if path.is_file() else []
        path.write_text(json.dumps({"launched": [*before, time.time()]}))

    def begin(self, hand_over: Callable[..., None], resumed: manifests.Checkpoint | None) -> None:
        """Hands the workers of the current attempt the checkpoint that they resume from."""
        self.hand_over = hand_over
        hand_over(self.names[-1], resumed.handle() if resumed else None)

    def failed(self, ray_error: str) -> None:
        """Called when Ray is about to restart the workers.

        The driver chooses and reads the checkpoint to resume from. If a worker did, the others
        would wait in a collective, which has a time-out.

        Args:
            ray_error: Ray's error message.

        Raises:
            TrainingError: The workers would fail again.
            CheckpointError: No finished checkpoint is whole.
        """
        cause = cause_of(self.run, self.names[-1])
        if cause.would_repeat(ray_error, trained=self._started()):
            raise readable_error(self.run, ray_error, self.names)
        display.say(
            f"{cause.sentence}; restart {len(self.names)} of {self.retries} "
            "from the newest whole checkpoint"
        )
        self.names.append(f"{self.launch}.{len(self.names)}")
        self.begin(self.hand_over, manifests.latest(self.run, display.say))

    def require_placement(self) -> None:
        """Limits how long a restart waits for lost nodes; called repeatedly.

        Raises:
            UnreadyError: The cluster had no room for the workers for as long as a start waits.
        """
        if len(self.names) == 1 or time.monotonic() - self.last_check < 5:
            return
        self.last_check = time.monotonic()
        if preflight.fits(self.ray, self.args) or self._started():
            self.waiting_since = 0.0
        elif not self.waiting_since:
            self.waiting_since = self.last_check
            seconds = cluster.placement_timeout()
            display.say(f"nodes were lost: waiting up to {seconds:.0f} s for room for the workers")
        elif self.last_check - self.waiting_since > cluster.placement_timeout():
            preflight.placement(self.ray, self.args)

    def stop_workers(self) -> None:
        """Kills the workers after an interrupt: the notebook's session continues."""
        events = self.run.events()
        starts = [e for e in events if e["event"] == "start" and e.get("attempt") in self.names]
        if not starts:
            return
        kill = remote_kill()
        for rank in starts[-1]["ranks"]:
            with contextlib.suppress(Exception):  # it has exited already
                kill(rank)

    def _started(self) -> bool:
        starts = [event for event in self.run.events() if event["event"] == "start"]
        return any(event.get("attempt") == self.names[-1] for event in starts)


def remote_kill() -> Callable[[dict[str, Any]], None]:
    """A function that kills a worker with SIGKILL, by an actor where it is on another node.

    The actors are created here, so that the kill itself takes no time. The function's argument is
    the worker's entry in the run's ``start`` event: its ``node`` (Ray's id) and ``pid``.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class Killer:
        def kill(self, pid: int) -> None:
            os.kill(pid, signal.SIGKILL)

    here = ray.get_runtime_context().get_node_id()
    others = [n["NodeID"] for n in ray.nodes() if n["Alive"] and n["NodeID"] != here]
    actor: Any = ray.remote(num_cpus=0)(Killer)
    nodes = {node: NodeAffinitySchedulingStrategy(node, soft=False) for node in others}
    actors = {n: actor.options(scheduling_strategy=place).remote() for n, place in nodes.items()}

    def kill(rank: dict[str, Any]) -> None:
        if rank["node"] == here:
            os.kill(rank["pid"], signal.SIGKILL)
        else:
            ray.get(actors[rank["node"]].kill.remote(rank["pid"]), timeout=60)

    return kill


def last_attempt(log: Path) -> list[str]:
    """The lines that a rank printed since its last start."""
    text = log.read_text("utf-8", errors="replace").replace("\r", "\n")
    return [line.rstrip()[:300] for line in _HEADER.split(text)[-1].splitlines() if line.strip()]


def _last_header(log: Path) -> str:
    headers = _HEADER.findall(log.read_text("utf-8", errors="replace"))
    return headers[-1] if headers else ""


def _rank_of(log: Path) -> str:
    return log.stem.replace("-", " ")


def _last_checkpoint_bytes(run: Run) -> int:
    return next((e["bytes"] for e in reversed(run.events()) if e["event"] == "save"), 0)
