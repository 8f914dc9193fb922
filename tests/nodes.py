"""A Ray cluster of several nodes on one machine, each as strange to the others as a test wants."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

RAY = Path(sys.executable).with_name("ray")


def can_hide() -> bool:
    """Whether a process here may have its own mounts."""
    tried = ["unshare", "-m", "true"]
    return (
        bool(shutil.which("unshare")) and subprocess.run(tried, capture_output=True).returncode == 0
    )


@dataclass(frozen=True)
class Node:
    """A node beside the head.

    Attributes:
        cpus: What it offers.
        hides: Folders that are empty there: it has other disks than the head.
        variables: Of its environment.
        options: More of `ray start`'s.
    """

    cpus: int = 1
    hides: Sequence[Path] = ()
    variables: dict[str, str] = field(default_factory=dict)
    options: Sequence[str] = ()


@contextlib.contextmanager
def cluster(cpus: int, *nodes: Node, **variables: str) -> Iterator[str]:
    """A head and more nodes while the block runs; gives the address.

    Args:
        cpus: The head's.
        nodes: The others.
        variables: Of every node's environment.
    """
    port = free_port()
    address = f"127.0.0.1:{port}"
    common = ["--disable-usage-stats", "--block"]
    head = [RAY, "start", "--head", "--port", port, "--num-cpus", cpus, *common]
    own = ["--node-ip-address", "127.0.0.1", "--include-dashboard", "false"]
    commands = [([*head, *own], Node())]
    for number, node in enumerate(nodes, 2):
        own = ["--node-ip-address", f"127.0.0.{number}", "--num-cpus", node.cpus]
        join = [RAY, "start", "--address", address, *own, *common, *node.options]
        commands.append((join, node))
    running: list[subprocess.Popen] = []
    try:
        for command, node in commands:
            words = shlex.join(map(str, command))
            hide = "".join(f"mount -t tmpfs none {shlex.quote(str(p))} && " for p in node.hides)
            if hide:
                words = f"unshare -m bash -c {shlex.quote(hide + 'exec ' + words)}"
            running.append(
                subprocess.Popen(
                    ["bash", "-c", "exec " + words],
                    env=os.environ | variables | node.variables,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
            )
            _wait(address, len(running))
        yield address
    finally:
        for process in reversed(running):
            _end(process)


def _wait(address: str, nodes: int) -> None:
    """Until so many nodes have joined."""
    from ray._raylet import GcsClient

    until = time.monotonic() + 60
    while time.monotonic() < until:
        with contextlib.suppress(Exception):
            known = GcsClient(address=address).get_all_node_info(timeout=2)
            if sum(info.state == 0 for info in known.values()) >= nodes:
                return
        time.sleep(0.2)
    raise TimeoutError(f"{nodes} nodes did not come up at {address}")


def _end(process: subprocess.Popen) -> None:
    """A node and all its children; `ray stop` would end every cluster of the machine."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        family = [*psutil.Process(process.pid).children(recursive=True)]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=8)
        for left in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
    process.wait(timeout=20)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
