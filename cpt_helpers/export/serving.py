"""Commands and folders for servers of exported models.

vLLM takes each adapter by name (``--lora-modules name=folder``). Ray Serve LLM loads an adapter at
its first request (``dynamic_lora_loading_path``, a copy of the folder in a bucket).
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
from ..setup.models import ADAPTER, base_of
from .huggingface import is_made, write_note

FILES = (ADAPTER, "adapter_model.safetensors")
NOTE = "adapters.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# What vLLM 0.9.2 accepts (vllm/lora/peft_helper.py).
_ACCEPTED: dict[str, Any] = {"use_dora": False, "modules_to_save": None}


def serve_command(folder: Path) -> str:
    """The shell command that serves an exported model with LLaMA-Factory's API on this machine."""
    model = f"--model_name_or_path {folder}"
    if base := base_of(folder):
        model = f"--model_name_or_path {base} --adapter_name_or_path {folder}"
    return (
        "API_HOST=127.0.0.1 API_PORT=8000 llamafactory-cli api \\\n"
        f"    {model} --template empty --infer_backend huggingface"
    )


def lay_out_adapters(adapters: Mapping[str, Path], target: Path) -> dict[str, Any]:
    """Copies adapters into the folder from which a server loads them; the same ones are kept.

    Args:
        adapters: Folders of adapters on one base model (the ``output`` of a LoRA run), by the name
            that clients request.
        target: The folder to make: ``<target>/<name>/adapter_config.json`` and its safetensors.

    Returns:
        ``base``, their base model; ``rank``, the largest rank, which servers need; ``adapters``,
        the sha256 of each adapter's weights.

    Raises:
        ExportError: A folder holds no adapter, an adapter belongs to another base or is of a type
            that servers do not load, a name cannot name a folder, or the target holds something
            else.
    """
    configs = {name: _config(name, folder) for name, folder in adapters.items()}
    bases = {config["base_model_name_or_path"] for config in configs.values()}
    if len(bases) != 1:
        raise ExportError(
            f"the adapters belong to {len(bases)} base models: {', '.join(sorted(bases))}",
            where=", ".join(str(folder) for folder in adapters.values()),
            expected="at least one adapter, all trained on one base",
            do="make one folder per base",
        )
    facts = {
        "base": bases.pop(),
        "rank": max(config["r"] for config in configs.values()),
        "adapters": {name: assets.sha256(path / FILES[1]) for name, path in adapters.items()},
    }
    if not is_made(target / NOTE, facts, "the same adapters with the same names"):
        with in_one_piece(target) as new:
            for name, folder in adapters.items():
                (new / name).mkdir()
                for file in FILES:
                    shutil.copyfile(folder / file, new / name / file)
            write_note(new / NOTE, facts)
    return facts


def _config(name: str, folder: Path) -> dict[str, Any]:
    """The configuration of an adapter that servers load."""
    if not _NAME.fullmatch(name):
        raise ExportError(
            f"{name!r} cannot name an adapter",
            expected="up to 64 letters, digits, '.', '_' or '-'",
            do="choose another name",
        )
    missing = [file for file in FILES if not (folder / file).is_file()]
    if missing:
        raise ExportError(
            f"'{name}' is no adapter: {' and '.join(missing)} missing",
            where=folder,
            expected="the output folder of a run with finetuning_type: lora",
            do="train one with train-configs/cpt_cpu_lora.yaml, or serve the full model",
        )
    config = json.loads((folder / ADAPTER).read_text("utf-8"))
    for key, value in _ACCEPTED.items():
        if config.get(key):
            raise ExportError(
                f"servers do not load the adapter '{name}': {key} is {config[key]!r}",
                where=folder / ADAPTER,
                expected=f"{key}: {json.dumps(value)}",
                do="merge it into its base and serve that, or train it without this option",
            )
    return config
