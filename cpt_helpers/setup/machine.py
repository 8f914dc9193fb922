"""The machine: package versions, CPU cores, GPUs, memory and free disk space."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import display
from ..errors import StorageError, UnreadyError
from ..run import PROJECT

if TYPE_CHECKING:
    from pandas import DataFrame

CORE_PACKAGES = ("llamafactory", "deepspeed", "ray", "torch", "transformers", "mlflow")
# By default glibc returns the memory of every large tensor to the kernel, which zeroes it again.
# That takes a third of a step on CPUs. With these settings glibc keeps the memory: 74 → 109
# tokens/s on two EPYC cores (2,048 tokens a step, SmolLM2-135M, ZeRO-3, fp32; 2026-11-22).
# A process reads them when it starts. Other C libraries ignore them.
KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30),
    "MALLOC_TOP_PAD_": str(256 * 2**20),
}
_PIN = re.compile(r"^([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?==([^\s#]+)")


class Facts(dict[str, Any]):
    """Named values that a notebook shows as a table."""

    def _table(self) -> DataFrame:
        shown = {k: f"{v:,}" if isinstance(v, int) else v for k, v in self.items()}
        return display.table([(k, "none" if v in (None, "") else str(v)) for k, v in shown.items()])

    def __repr__(self) -> str:
        return self._table().to_string(header=False)

    def _repr_html_(self) -> str:
        return self._table().to_html(header=False)


@dataclass(frozen=True)
class MachineReport:
    """What :func:`inspect_machine` finds.

    Attributes:
        versions: Installed versions of Python and :data:`CORE_PACKAGES`.
        cpus: CPU cores that this process may use.
        memory_gib: Memory of the machine.
        gpus: The names of its GPUs.
        storage: The storage folder.
        free_gib: Free space on it.
        wrong_versions: Packages that are missing or differ from their pin, in words.
    """

    versions: dict[str, str]
    cpus: int
    memory_gib: float
    gpus: list[str]
    storage: Path
    free_gib: float
    wrong_versions: list[str]

    def table(self) -> Facts:
        """The report for a reader."""
        return Facts(
            self.versions
            | {
                "platform": f"{platform.system()} {platform.machine()}",
                "CPU cores": self.cpus,
                "memory (GiB)": f"{self.memory_gib:.0f}",
                "GPUs": ", ".join(self.gpus) or "none: use the CPU recipe",
                "storage": self.storage,
                "free space on the storage (GiB)": f"{self.free_gib:.1f}",
            }
        )

    def raise_if_unready(self, *, need_gib: float = 3.0) -> None:
        """Raises where a run would fail later.

        Args:
            need_gib: Space that the run needs on the storage.

        Raises:
            UnreadyError: A package is missing or differs from its pin.
            StorageError: The storage has too little free space.
        """
        if self.wrong_versions:
            raise UnreadyError(
                f"packages differ from their pinned versions: {'; '.join(self.wrong_versions)}",
                where=sys.prefix,
                expected="the pins of requirements.txt",
                do="python -m pip install -r requirements.txt, and restart the kernel",
            )
        require_room(self.storage, need_gib)


def inspect_machine(storage: Path) -> MachineReport:
    """Reads the versions from package metadata; imports torch only where there is a GPU."""
    import psutil

    pins, wrong = _pinned_versions(), []
    versions = {"python": sys.version.split()[0]}
    for name in CORE_PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{name} is not installed (pinned: {pins.get(name, 'any')})")
            continue
        if name in pins and versions[name] != pins[name]:
            wrong.append(f"{name} {versions[name]} is installed (pinned: {pins[name]})")
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return MachineReport(
        versions=versions,
        cpus=len(affinity(0)) if affinity else os.cpu_count() or 1,
        memory_gib=psutil.virtual_memory().total / 2**30,
        gpus=_gpu_names(),
        storage=storage,
        free_gib=shutil.disk_usage(storage).free / 2**30,
        wrong_versions=wrong,
    )


def require_room(storage: Path, need_gib: float, purpose: str = "") -> None:
    """Raises where a folder's disk has too little free space.

    Args:
        storage: The folder.
        need_gib: The size of what will be written, in GiB.
        purpose: What will be written, in words.

    Raises:
        StorageError: With both sizes.
    """
    free = shutil.disk_usage(storage).free
    if free < need_gib * 2**30:
        raise StorageError(
            f"the storage has too little room: {format_bytes(free)} free, "
            f"{format_bytes(need_gib * 2**30)} needed",
            where=storage,
            expected=purpose or "room for checkpoints, the final model and the export",
            do="make room, keep fewer checkpoints (save_total_limit), or give another STORAGE",
        )


def format_bytes(count: float) -> str:
    """A number of bytes in GiB or MiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def kept_memory() -> dict[str, str]:
    """:data:`KEEP_MEMORY`; empty where a GPU trains, since glibc does not hold its tensors."""
    return {} if _has_nvidia() else KEEP_MEMORY


def _pinned_versions() -> dict[str, str]:
    """The exact pins of ``requirements.txt``; empty where the file does not exist."""
    requirements = PROJECT / "requirements.txt"
    lines = requirements.read_text("utf-8").splitlines() if requirements.is_file() else []
    return {match[1].lower(): match[2] for line in lines if (match := _PIN.match(line))}


def _has_nvidia() -> bool:
    return Path("/dev/nvidiactl").exists()


def _gpu_names() -> list[str]:
    if not _has_nvidia():
        return []
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
