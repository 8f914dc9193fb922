"""Trains many tiny models in a row: the libraries are imported once, each rank is a fork.

``python -m forked JOBS``, where JOBS is a JSON file of a list of ``{"run", "storage", "workers",
"args", "before"}``. Each rank runs :func:`cpt_helpers.train.worker.train_rank`, as Ray's workers
do. Other tests cover Ray. ``before`` names functions of this module that each rank calls first.
Prints a line of JSON per job: its exit codes and seconds.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

SECONDS = 120  # the limit of a job


def main() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import llamafactory.train.tuner  # noqa: F401

    import cpt_helpers.train.callback
    import cpt_helpers.train.trainer
    import cpt_helpers.train.worker  # noqa: F401

    for job in json.loads(Path(sys.argv[1]).read_text("utf-8")):
        since = time.monotonic()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = [_fork(job, rank, port) for rank in range(job["workers"])]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps([job["run"], codes, round(time.monotonic() - since, 1)]), flush=True)


def _fork(job: dict[str, Any], rank: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        _rank(job, rank, port)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _rank(job: dict[str, Any], rank: int, port: int) -> None:
    import torch
    import torch.distributed as dist

    from cpt_helpers import redirect
    from cpt_helpers.recipes import Recipe
    from cpt_helpers.run import Run
    from cpt_helpers.train import patches, worker

    run = Run(job["run"], Path(job["storage"]))
    run.logs.mkdir(parents=True, exist_ok=True)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(job.get("local_rank", rank)),
        "WORLD_SIZE": str(job["workers"]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    with redirect.redirected(run.logs / f"rank-{rank}.log"):
        try:
            dist.init_process_group("gloo", timeout=timedelta(seconds=SECONDS))
            for name in job.get("before", ()):
                globals()[name]()
            patches.join_cpu_group()
            args = Recipe(job["args"])
            worker.train_rank(run, args, job.get("resume"), {"attempt": "forked.0"})
        except BaseException:
            traceback.print_exc()
            raise


def lazily() -> None:
    """Runs every asynchronous collective as late as possible.

    It runs when it is waited for, or when a collective of another kind begins. Code that uses a
    result without waiting then always trains on garbage.
    """
    import torch.distributed as dist

    begun: list[Lazy] = []

    class Lazy:
        def __init__(self, kind: str, act: Any) -> None:
            self.kind, self.act = kind, act
            begun.append(self)

        def wait(self, *_: Any) -> bool:
            if self in begun:
                begun.remove(self)
                self.act()
            return True

    def collective(kind: str, eager: Any) -> Any:
        def call(*args: Any, async_op: bool = False, **kwargs: Any) -> Any:
            for other in [other for other in begun if other.kind != kind]:
                other.wait()
            if async_op:
                return Lazy(kind, lambda: eager(*args, **kwargs))
            return eager(*args, **kwargs)

        return call

    for kind in ("all_gather_into_tensor", "all_gather", "all_reduce", "broadcast"):
        setattr(dist, kind, collective(kind, getattr(dist, kind)))


def lazily_without_waiting() -> None:
    """The same with uncorrected DeepSpeed, which waits only for the last of several gathers."""
    from cpt_helpers.train import patches

    lazily()
    patches.wait_for_every_gather = lambda: None


def sampled() -> None:
    """Compares a part of each parameter with its file, as of a model beyond the limit."""
    from cpt_helpers.train import weights

    weights.LIMIT, weights._FEWEST = 50_000, 64


def own_checkpoints() -> None:
    """Writes checkpoints to the folder that Ray would use."""
    from cpt_helpers.train import callback

    def next_checkpoint(run: Any) -> Path:
        trial = run.folder / "TorchTrainer_forked"
        return trial / f"checkpoint_{len(list(trial.glob('checkpoint_*'))):06d}"

    callback._next_checkpoint = next_checkpoint
    callback._register = lambda *_: None


if __name__ == "__main__":
    main()
