"""The machine, the packages, the cluster and the storage: what is here, and whether it will do."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import platform
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import StorageError, UnreadyError
from ..run import PROJECT

CORE = ("llamafactory", "deepspeed", "ray", "torch", "transformers", "mlflow")
# glibc returns every large tensor's memory to the kernel and has it zeroed again: a third of a step
# on CPUs. With these it is kept; 74 → 109 tokens/s on two EPYC cores (2026-11-22, 2,048 tokens a
# step, SmolLM2-135M, ZeRO-3, fp32). Read when a process starts; other C libraries ignore them.
KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30),
    "MALLOC_TOP_PAD_": str(256 * 2**20),
}
# For the processes of a Ray (2.48.0) started here. It starts a process a core, and would end those
# that were idle for a second when a training reserves the cores: just before it asks for them. And
# its agent looks at every process each five seconds, for a dashboard that is not there: 5 % of a
# core. It forks, and tokenizers that have used threads warn of each fork unless they are told: the
# workers read blocks that are tokenised already.
OWN_RAY = {
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
}
_PIN = re.compile(r"^([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?==([^\s#]+)")


@dataclass(frozen=True)
class Report:
    """What a run finds where it is started.

    Attributes:
        versions: Installed releases of the packages that decide a training.
        cpus: Cores this process may use.
        memory_gib: The machine's memory.
        gpus: The machine's GPUs by name.
        storage: The storage folder.
        free_gib: Room on it.
        wrong_versions: Packages that are not the pinned release: ``name: have, want``.
    """

    versions: dict[str, str]
    cpus: int
    memory_gib: float
    gpus: list[str]
    storage: Path
    free_gib: float
    wrong_versions: list[str]

    def rows(self) -> list[tuple[str, str]]:
        """The report as a table of two columns."""
        return [
            ("Python", f"{sys.version.split()[0]} on {platform.system()} {platform.machine()}"),
            *((name, version) for name, version in self.versions.items() if name != "python"),
            ("CPU cores", str(self.cpus)),
            ("memory", f"{self.memory_gib:.0f} GiB"),
            ("GPUs", ", ".join(self.gpus) or "none: the CPU recipe is the one to use"),
            ("storage", str(self.storage)),
            ("free on it", f"{self.free_gib:.1f} GiB"),
        ]

    def raise_if_unready(self, *, need_gib: float = 3.0) -> None:
        """Refuses to go on where a run would fail later.

        Args:
            need_gib: Room the run takes on the storage.

        Raises:
            UnreadyError: A package is missing or not the pinned release.
            StorageError: The storage has too little room.
        """
        if self.wrong_versions:
            raise UnreadyError(
                "these packages are not the releases this project is made for: "
                + "; ".join(self.wrong_versions),
                where=sys.prefix,
                expected="the pins of requirements.txt",
                do="python -m pip install -r requirements.txt, and restart the kernel",
            )
        require_room(self.storage, need_gib)


def report(storage: Path) -> Report:
    """Looks around; reads versions from metadata, imports torch only where there is a GPU."""
    import psutil

    pins = pinned()
    versions = {"python": sys.version.split()[0]}
    wrong = []
    for name in CORE:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{name}: not installed, want {pins.get(name, 'any')}")
            continue
        if name in pins and versions[name] != pins[name]:
            wrong.append(f"{name}: {versions[name]}, want {pins[name]}")
    return Report(
        versions=versions,
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        memory_gib=psutil.virtual_memory().total / 2**30,
        gpus=_gpus(),
        storage=storage,
        free_gib=shutil.disk_usage(storage).free / 2**30,
        wrong_versions=wrong,
    )


def machine() -> str:
    """The machine in words, as figures measured on it are marked."""
    import psutil

    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory().total / 2**30
    return ", ".join([f"{cores} cores of {name}", f"{memory:.0f} GiB", *_gpus()])


def pinned() -> dict[str, str]:
    """The exact pins of ``requirements.txt``; empty where there is no project around."""
    requirements = PROJECT / "requirements.txt"
    lines = requirements.read_text("utf-8").splitlines() if requirements.is_file() else []
    return {match[1].lower(): match[2] for line in lines if (match := _PIN.match(line))}


def require_room(storage: Path, need_gib: float, what: str = "") -> None:
    """Refuses a storage with too little room.

    Args:
        storage: The storage.
        need_gib: What will be written, in GiB.
        what: That in words.

    Raises:
        StorageError: With both numbers.
    """
    free = shutil.disk_usage(storage).free
    if free < need_gib * 2**30:
        raise StorageError(
            f"the storage has too little room: {in_words(free)} free, "
            f"{in_words(need_gib * 2**30)} needed",
            where=storage,
            expected=what or "room for checkpoints, the final model and the export",
            do="make room, keep fewer checkpoints (save_total_limit), or give another STORAGE",
        )


def in_words(count: float) -> str:
    """Bytes as a reader says them."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


@contextmanager
def cluster() -> Iterator[Any]:
    """The Ray cluster to train on: the one ``RAY_ADDRESS`` names, else one on this machine.

    Inside an Anyscale workspace or job it is that cluster. A cluster started here ends with the
    ``with`` block; one that was there is left running. The package is shipped to the workers.

    Raises:
        UnreadyError: ``RAY_ADDRESS`` names a cluster that does not answer.
    """
    import ray

    if ray.is_initialized():  # the reader's own session, with the reader's own settings
        yield ray
        return
    address = _address()
    _require_answer(address)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    variables: dict[str, str] = {}
    if address == "local":
        options |= {"include_dashboard": False, "num_cpus": os.cpu_count()}
        # Not as a runtime environment: Ray would leave the processes it has ready unused for it.
        variables = OWN_RAY | kept_memory()
    else:
        options["runtime_env"] = {"py_modules": [str(PROJECT / "cpt_helpers")]}
    try:
        with _variables(variables):
            ray.init(address, **options)
    except (ConnectionError, RuntimeError) as error:
        raise _no_answer(address, str(error).splitlines()[0]) from None
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _variables(added: dict[str, str]) -> Iterator[None]:
    """Variables for processes started in the block; what the reader has set stays."""
    added = {name: value for name, value in added.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def kept_memory() -> dict[str, str]:
    """:data:`KEEP_MEMORY`; nothing where a GPU trains, whose tensors glibc does not hold."""
    return {} if _has_nvidia() else KEEP_MEMORY


def cluster_rows(ray: Any) -> list[tuple[str, str]]:
    """A Ray cluster's nodes as a table: address, what it offers."""
    rows = []
    for node in ray.nodes():
        if node["Alive"]:
            offers = node["Resources"]
            parts = [f"{offers.get('CPU', 0):.0f} CPUs", f"{offers.get('GPU', 0):.0f} GPUs"]
            parts.append(f"{offers.get('memory', 0) / 2**30:.0f} GiB for workers")
            rows.append((node["NodeManagerAddress"], ", ".join(parts)))
    return rows


def require_workers(
    ray: Any, workers: int, each: dict[str, float], *, strategy: str = "PACK", wait: bool = True
) -> None:
    """Makes sure a training's workers can be placed, instead of waiting for ever.

    What a cluster has is known at once. One that starts nodes on demand (Anyscale's, one on
    Kubernetes, one made by ``ray up``), or that is busy, is asked for the placement and waited for
    as long as ``CPT_PLACEMENT_TIMEOUT`` says (seconds; default 900).

    Args:
        ray: The cluster.
        workers: How many.
        each: What each asks for, by Ray's resource names.
        strategy: ``placement_strategy``; the strict ones ask for one node, or one for each.
        wait: Whether to wait at all.

    Raises:
        UnreadyError: With what was asked for and what is there.
    """
    total, free = ray.cluster_resources(), ray.available_resources()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fitting = fitting_workers(ray, each, strategy)
    busy = fitting >= workers and any(free.get(k, 0) < need * workers for k, need in each.items())
    if fitting >= workers and not busy:
        return
    seconds = placement_timeout(900.0 if grows() or busy else 0.0)
    timeout = seconds if wait and (busy or _address() != "local") else 0.0
    if timeout and _can_be_placed(ray, workers, each, strategy, timeout):
        return
    wanted = ", ".join(f"{need:g} {kind}" for kind, need in each.items())
    have = ", ".join(f"{total.get(kind, 0):g} {kind}" for kind in each)
    if busy:
        have += f"; free are {', '.join(f'{free.get(kind, 0):g} {kind}' for kind in each)}"
    waited = f", after {timeout:.0f} s" if timeout else ""
    raise UnreadyError(
        f"{workers} workers with {wanted} each cannot be placed{waited}: "
        + ("other work takes the room" if busy else f"room for {fitting}"),
        where=f"the Ray cluster has {have} on {len(nodes)} node{'s' * (len(nodes) > 1)}"
        + (f", placement_strategy {strategy}" if strategy.startswith("STRICT") else ""),
        expected=f"room for ray_num_workers: {workers}",
        do="wait for it, or stop it (`ray list jobs`)"
        if busy
        else f"OVERRIDES = {{'ray_num_workers': {max(fitting, 1)}}}, a smaller "
        "resources_per_worker, or a larger cluster",
    )


def fitting_workers(ray: Any, each: dict[str, float], strategy: str = "PACK") -> int:
    """Workers that fit on the nodes that are alive, busy or not."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    on_each = [min(int(n.get(k, 0) / need) for k, need in each.items() if need) for n in nodes]
    if strategy == "STRICT_PACK":
        return max(on_each, default=0)
    if strategy == "STRICT_SPREAD":
        return sum(room > 0 for room in on_each)
    return sum(on_each)


def placement_timeout(default: float = 900.0) -> float:
    """Seconds to wait for workers to be placed: ``CPT_PLACEMENT_TIMEOUT``, else the default."""
    return float(os.environ.get("CPT_PLACEMENT_TIMEOUT", default))


def grows() -> bool:
    """Whether the cluster is of a kind that starts nodes when they are asked for."""
    marks = ("ANYSCALE_", "KUBERNETES_SERVICE_HOST")
    return _address() != "local" and (
        any(name.startswith(marks) for name in os.environ)
        or Path("~/ray_bootstrap_config.yaml").expanduser().is_file()
    )


def _require_answer(address: str) -> None:
    """Ray itself goes on asking a dead address for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # "local", "auto": nothing to ask
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise _no_answer(address, str(error)) from None


def _no_answer(address: str, reason: str) -> UnreadyError:
    return UnreadyError(
        f"the Ray cluster does not answer: {reason}",
        where=f"RAY_ADDRESS={address}",
        expected="the address of a running Ray cluster",
        do="start it, correct RAY_ADDRESS, or unset it to train on this machine",
    )


def _address() -> str:
    """Ray's address: the environment's, the surrounding Anyscale cluster's, or this machine's."""
    on_anyscale = any(name.startswith("ANYSCALE_") for name in os.environ)
    return os.environ.get("RAY_ADDRESS") or ("auto" if on_anyscale else "local")


def _can_be_placed(
    ray: Any, workers: int, each: dict[str, float], strategy: str, timeout: float
) -> bool:
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group([dict(each)] * workers, strategy=strategy)
    try:
        ray.get(group.ready(), timeout=timeout)
    except ray.exceptions.GetTimeoutError:
        return False
    finally:
        remove_placement_group(group)
    return True


def _has_nvidia() -> bool:
    return Path("/dev/nvidiactl").exists()


def _gpus() -> list[str]:
    if not _has_nvidia():
        return []
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
