"""Adapters laid out as servers load them: a folder of folders, each an adapter.

vLLM takes each by name (``--lora-modules name=folder``), Ray Serve LLM loads them when they are
first asked for (``dynamic_lora_loading_path``, a copy of the folder in a bucket).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ExportError
from ..run import in_one_piece
from ..setup import assets

FILES = ("adapter_config.json", "adapter_model.safetensors")
NOTE = "adapters.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# What vLLM's loader refuses (vllm/lora/peft_helper.py of 0.9.2), by the value it takes.
_TAKEN: dict[str, Any] = {"use_dora": False, "modules_to_save": None}


def layout(adapters: Mapping[str, Path], target: Path) -> dict[str, Any]:
    """Copies adapters to where a server loads them from; the same ones again are left alone.

    Args:
        adapters: Folders of adapters on one base model (a LoRA run's ``output``), by the name
            each is to be asked for.
        target: The folder to make: ``<target>/<name>/adapter_config.json`` and its safetensors.

    Returns:
        ``base``, the model they belong to; ``rank``, the largest, which servers want to know;
        ``adapters``, the sha256 of each one's weights by name.

    Raises:
        ExportError: One is no adapter, belongs to another base, or is of a kind that servers do
            not load; a name cannot name a folder; the target holds something else.
    """
    configs = {name: _config(name, folder) for name, folder in adapters.items()}
    bases = {config["base_model_name_or_path"] for config in configs.values()}
    if len(bases) != 1:
        raise ExportError(
            f"the adapters belong to {len(bases)} base models: {', '.join(sorted(bases))}",
            where=", ".join(str(folder) for folder in adapters.values()),
            expected="at least one adapter, and all trained on one base",
            do="lay out those of each base in a folder of their own",
        )
    weights = {name: assets.sha256(folder / FILES[1]) for name, folder in adapters.items()}
    rank = max(config["r"] for config in configs.values())
    facts = {"base": bases.pop(), "rank": rank, "adapters": weights}
    note = target / NOTE
    if target.exists():
        if note.is_file() and json.loads(note.read_text("utf-8")) == facts:
            return facts
        raise ExportError(
            "the folder for the adapters exists and holds something else",
            where=target,
            expected="no folder, or the same adapters by the same names",
            do="move it away, or give another; nothing was changed",
        )
    with in_one_piece(target) as new:
        for name, folder in adapters.items():
            (new / name).mkdir()
            for file in FILES:
                shutil.copyfile(folder / file, new / name / file)
        (new / NOTE).write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
    return facts


def _config(name: str, folder: Path) -> dict[str, Any]:
    if not _NAME.fullmatch(name):
        raise ExportError(
            f"{name!r} cannot name an adapter",
            expected="letters, digits, '.', '_' or '-': it is a folder, and part of a model's name",
            do="choose another name",
        )
    lacking = [file for file in FILES if not (folder / file).is_file()]
    if lacking:
        raise ExportError(
            f"'{name}' is no adapter: {' and '.join(lacking)} missing",
            where=folder,
            expected="the output folder of a run with finetuning_type: lora",
            do="train one with train-configs/cpt_cpu_lora.yaml; a full model is served as it is",
        )
    config = json.loads((folder / FILES[0]).read_text("utf-8"))
    for key, value in _TAKEN.items():
        if config.get(key):
            raise ExportError(
                f"servers do not load the adapter '{name}': {key} is {config[key]!r}",
                where=folder / FILES[0],
                expected=f"{key}: {json.dumps(value)}",
                do="merge it into its base and serve that, or train it without",
            )
    return config
