"""Why a training failed, from what its ranks printed: one readable error."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from ..checkpoints import manifests
from ..errors import CptError, DivergedError, StorageError, TrainingError, WeightsError
from ..run import Run
from ..setup.machine import format_bytes

# What a rank says when another one is gone: no cause, but its consequence.
_CONSEQUENCES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "DistBackendError",
    "DistNetworkError",
    "gloo",
    "NCCL",
    "nccl",  # ncclRemoteError: «… or a remote process exiting prematurely»
    "remote process",
    "Timed out",
)
_NEVER_RETRIED = ("DivergedError", "WeightsError")  # a restart has the same result
_TIMED_OUT = ("Timed out", "timed out", "Timeout(ms)", "Watchdog caught collective")
_LITTLE = 2**20  # bytes with which no training goes on
_FULL = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed writing")


class Cause:
    """Why an attempt failed, as far as the ranks' logs say.

    Attributes:
        log: The log of the rank that failed first; ``None`` where no rank began.
        reason: Its exception; empty where it was killed and the others only noticed.
        sentence: The same in words.
        full: The storage had no room left.
    """

    def __init__(self, logs: list[Path]) -> None:
        tails = {log: last_attempt(log) for log in logs}
        errors = {log: [line for line in tails[log] if _is_exception(line)] for log in logs}
        causes = {
            log: lines[-1]
            for log, lines in errors.items()
            if lines and not any(mark in lines[-1] for mark in _CONSEQUENCES)
        }
        silent = [log for log in logs if not errors[log]]
        said = "\n".join(line for log in logs for line in tails[log][-60:])
        # The rank that failed first ended first; the others only lost their connection to it.
        ended = sorted(causes or silent or logs, key=lambda log: log.stat().st_mtime)
        self.log = ended[0] if ended else None
        self.lines = tails[self.log] if self.log else []
        self.reason = causes.get(self.log, "") if self.log else ""
        self.full = any(mark in said for mark in _FULL)
        names = " and ".join(log.stem.replace("-", " ") for log in silent)
        if self.reason:
            self.sentence = f"{self.log.stem.replace('-', ' ')} failed: {self.reason}"
        elif any(mark in said for mark in _TIMED_OUT):
            self.sentence = "a worker hung: the others waited for it as long as ddp_timeout says"
        elif silent:
            one = "one of " if len(silent) > 1 else ""
            self.sentence = (
                f"{one}{names} exited without an error message: killed, or out of memory"
            )
        else:
            self.sentence = "a worker was lost"

    def hopeless(self, said: str, *, trained: bool) -> bool:
        """Whether the workers would only fail again.

        Args:
            said: What Ray gives as the reason.
            trained: Whether the attempt came as far as training.
        """
        if self.log is None:  # no rank began: lost on the way, or never able to
            return "died" not in said.lower()
        certain = any(name in self.reason for name in _NEVER_RETRIED)
        return self.full or certain or bool(self.reason and not trained)


def cause_of(run: Run, attempt: str) -> Cause:
    """Why an attempt failed; ``attempt`` is the name in the header of its ranks' logs."""
    logs = sorted(run.logs.glob("rank-*.log"))
    cause = Cause([log for log in logs if f", attempt {attempt}," in _last_header(log)])
    # On a full storage the logs cannot say so: they are on it.
    free = shutil.disk_usage(run.storage).free + manifests.unfinished_bytes(run)
    cause.full |= free < (last_save(run) or _LITTLE)
    return cause


def last_save(run: Run) -> int:
    """Bytes of the newest checkpoint; 0 where none was written."""
    return next((e["bytes"] for e in reversed(run.events()) if e["event"] == "save"), 0)


def readable(run: Run, said: str, attempts: list[str]) -> CptError:
    """A failed training as one error: the first cause a rank named, its last lines, its log."""
    cause = cause_of(run, attempts[-1])
    for event in run.events():
        if event["event"] == "diverged" and event.get("attempt") in attempts:
            return _diverged(run, event)
    if cause.log is None:
        return TrainingError(
            f"the workers could not be started: {_last_line(said)}",
            where=run.folder,
            do="look at Ray's own logs in /tmp/ray/session_latest/logs on the node that failed",
        )
    where = "\n".join([f"{cause.log}, its last lines:", *cause.lines[-12:]])
    if cause.full:
        free = shutil.disk_usage(run.storage).free
        size = last_save(run)
        each = f", a checkpoint takes {format_bytes(size)}" if size else ""
        return StorageError(
            f"the storage ran full while '{run.name}' wrote to it: {format_bytes(free)} free{each}",
            where=where,
            expected="room for one checkpoint more than save_total_limit keeps",
            do="make room and give the same command again: it goes on from the newest whole "
            "checkpoint",
        )
    tried = f" ({len(attempts)} attempts)" if len(attempts) > 1 else ""
    kind = WeightsError if "WeightsError" in cause.reason else TrainingError
    return kind(
        f"training failed in a worker{tried}: {cause.reason or cause.sentence}",
        where=where,
        do="fix the cause and run this again: it resumes from the newest checkpoint "
        "(a change of the recipe needs a new RUN_NAME)",
    )


def _diverged(run: Run, event: dict[str, Any]) -> DivergedError:
    """A training that was stopped because its numbers were no longer usable."""
    whole = [c for c in manifests.listing(run, deep=False) if c.whole and c.step < event["step"]]
    good = f"step {whole[-1].step}, {whole[-1].path}" if whole else "none"
    return DivergedError(
        f"the training diverged at step {event['step']}, on rank {event['rank']}: "
        f"{event['reason']}",
        where=f"{run.logs}/rank-{event['rank']}.log\nlast good checkpoint: {good}",
        expected="a loss above 0 and a gradient norm up to 1e6, both finite",
        do="train under another RUN_NAME with a lower learning_rate, a longer warm-up or a lower "
        "max_grad_norm; look at the documents of that step if it happens again",
    )


def _last_header(log: Path) -> str:
    headers = re.findall(r"^--- rank \d+, .*$", log.read_text("utf-8", errors="replace"), re.M)
    return headers[-1] if headers else ""


def last_attempt(log: Path) -> list[str]:
    text = log.read_text("utf-8", errors="replace").replace("\r", "\n")
    attempt = re.split(r"^--- rank \d+, .*$", text, flags=re.MULTILINE)[-1]
    return [line.rstrip()[:300] for line in attempt.splitlines() if line.strip()]


def _is_exception(line: str) -> bool:
    return bool(re.match(r"^([A-Za-z_][\w.]*)?(Error|Exception|Interrupt|Exit)\b.*", line))


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no reason was given"
