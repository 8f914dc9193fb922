"""A description of the machine that runs a benchmark."""

from __future__ import annotations

import platform
from pathlib import Path

from cpt_helpers.setup import machine


def describe_machine() -> str:
    """Returns the number and model of the CPU cores, the memory and the GPUs as text."""
    report = machine.inspect_machine(Path.cwd())
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cores = f"{report.cpus} cores of {(models or [platform.processor()])[0]}"
    return ", ".join([cores, f"{report.memory_gib:.0f} GiB", *report.gpus])
