"""What is wrong with a recipe, found before anything starts; each with where, and what to do."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from .errors import ConfigError, nearest
from .registry import HELD_OUT, read_registry

_SECRET_NAMES = ("TOKEN", "SECRET", "PASSWORD", "API_KEY")
_TOKEN = re.compile(r"\bhf_\w{8,}|\bdapi[0-9a-f]{16,}|\bAKIA[0-9A-Z]{16}\b|\bsk-\w{16,}")
_PLACEHOLDER = re.compile(r"<[^<>]*(your|YOUR|my)[^<>]*>|<[A-Z][A-Z_ -]+>")


@cache
def known_keys() -> dict[str, Any]:
    """Every key LLaMA-Factory's training takes, with its argparse action."""
    from llamafactory.hparams import parser as hparams
    from transformers import HfArgumentParser

    parser = HfArgumentParser(hparams._TRAIN_ARGS)
    return {action.dest: action for action in parser._actions if action.dest != "help"}


def check_keys(args: dict[str, Any], path: Path, overrides: dict[str, Any]) -> None:
    """Refuses keys LLaMA-Factory does not know, and values that are none of a key's choices.

    Raises:
        ConfigError: With the nearest known key, or the choices.
    """
    known = known_keys()
    for key, value in args.items():
        where = "OVERRIDES" if key in overrides else f"{path}{line_of(path, key)}"
        if key not in known:
            raise ConfigError(
                f"unknown key '{key}'",
                where=where,
                expected=f"a LLaMA-Factory argument ({nearest(key, known)})",
                do="correct the name or leave it out",
            )
        action = known[key]
        if action.choices and value not in action.choices and str(value) not in action.choices:
            raise ConfigError(
                f"{key}: {value!r} is not a choice",
                where=where,
                expected=", ".join(map(str, action.choices)),
                do="choose one of these",
            )
        if action.type in (int, float) and not isinstance(value, bool):
            try:
                action.type(value)
            except (TypeError, ValueError):
                raise ConfigError(
                    f"{key}: {value!r} is not a number",
                    where=where,
                    expected="an integer" if action.type is int else "a number",
                    do="correct the value",
                ) from None


def check_datasets(args: dict[str, Any], path: Path) -> None:
    folder = Path(str(args.get("dataset_dir", "data")))
    registry = read_registry(folder / "dataset_info.json")
    for key in ("dataset", "eval_dataset"):
        for name in names_of(args.get(key)):
            if name not in registry:
                raise ConfigError(
                    f"unknown dataset '{name}'",
                    where=f"{key} in {path}{line_of(path, key)}",
                    expected=f"a name in {folder}/dataset_info.json ({nearest(name, registry)})",
                    do="run notebook 02_data with this corpus, or correct the name",
                )
            file_name = registry[name].get("file_name")
            if file_name and not (folder / file_name).exists():
                raise ConfigError(
                    f"the dataset '{name}' is registered, but its file is not there",
                    where=folder / file_name,
                    do=f"run notebook 02_data with CORPUS={name.removesuffix(HELD_OUT)}",
                )


def take_secrets(args: dict[str, Any]) -> list[str]:
    """Takes tokens out of ``ray_init_kwargs.runtime_env.env_vars``, where guides put them.

    They would end in every checkpoint's ``training_args.bin``, in Ray's ``params.json`` and in
    MLflow. A real one goes into this process's environment, unless one is there; from there the
    workers get it through memory. Placeholders just go.

    Returns:
        The names of the variables that were taken out.
    """
    environment = (args.get("ray_init_kwargs") or {}).get("runtime_env") or {}
    variables = environment.get("env_vars") or {}
    taken = [name for name in variables if any(mark in name.upper() for mark in _SECRET_NAMES)]
    if taken:
        kept = {name: value for name, value in variables.items() if name not in taken}
        runtime = environment | {"env_vars": kept}
        args["ray_init_kwargs"] = args["ray_init_kwargs"] | {"runtime_env": runtime}
    for name in taken:
        value = str(variables[name])
        if value.strip() and not _PLACEHOLDER.search(value):
            os.environ.setdefault(name, value)
    return taken


def refuse_secrets(args: dict[str, Any], path: Path) -> None:
    """A token in a recipe would be in every checkpoint, in Ray's and in MLflow's records."""
    for key, value in _strings(args):
        named = key.lower().endswith(("_token", "password", "secret", "api_key"))
        placeholder = _PLACEHOLDER.search(value)
        if (named and value.strip() and not placeholder) or _TOKEN.search(value):
            raise ConfigError(
                f"the recipe holds a secret, {key}",
                where=f"{path}{line_of(path, key.split('.')[0])}",
                expected="secrets in the environment only",
                do="take it out of the file and `export HF_TOKEN=…` (or the variable it is for) "
                "before starting; it is handed to the workers from there",
            )
        if placeholder:
            raise ConfigError(
                f"{key}: a placeholder was left in, {placeholder[0]}",
                where=f"{path}{line_of(path, key.split('.')[0])}",
                expected="a value",
                do="fill it in, or take the line out",
            )


def has_token(value: Any) -> bool:
    """Whether something in a value looks like an access token."""
    return any(_TOKEN.search(text) for _, text in _strings(value))


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string in nested values, with its dotted key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _strings(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, key)


def check_numbers(args: dict[str, Any], path: Path) -> None:
    timeout = args.get("ddp_timeout", 1800)
    if not isinstance(timeout, int) or not 10 <= timeout <= 86400:
        raise ConfigError(
            f"ddp_timeout: {timeout!r}",
            where=f"{path}{line_of(path, 'ddp_timeout')}",
            expected="seconds that a worker may keep the others waiting, 10 to 86,400 (a day)",
            do="minutes, such as 1800: with years a hung run is never noticed, and always paid for",
        )
    if args.get("save_only_model"):
        raise ConfigError(
            "save_only_model leaves nothing to go on from",
            where=f"{path}{line_of(path, 'save_only_model')}",
            expected="checkpoints with the optimizer's state",
            do="leave it out; save_total_limit keeps the disk level, and step 6 exports the model",
        )
    if str(args.get("report_to", "none")) not in ("mlflow", "none", "['mlflow']", "['none']"):
        raise ConfigError(
            f"report_to: {args['report_to']!r}",
            where=f"{path}{line_of(path, 'report_to')}",
            expected="mlflow or none",
            do="choose one of these; metrics.jsonl in the run's folder serves other trackers",
        )
    if args.get("load_best_model_at_end"):
        raise ConfigError(
            "load_best_model_at_end looks for checkpoints in output_dir, and they are on the "
            "storage",
            where=f"{path}{line_of(path, 'load_best_model_at_end')}",
            do="leave it out: the best checkpoint is kept, and step 6 exports it",
        )
    for key, least in (
        ("cutoff_len", 2),
        ("ray_num_workers", 1),
        ("per_device_train_batch_size", 1),
        ("gradient_accumulation_steps", 1),
    ):
        if key == "cutoff_len" and key not in args:
            args[key] = 2048  # LLaMA-Factory's default, said out loud
        value = args.get(key, least)
        if not isinstance(value, int) or value < least:
            raise ConfigError(
                f"{key}: {value!r}",
                where=f"{path}{line_of(path, key)}",
                expected=f"a whole number, {least} or more",
                do="correct the value",
            )


def line_of(path: Path, key: str) -> str:
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if line.startswith(f"{key}:"):
            return f":{number}"
    return ""


def worker_variables(args: dict[str, Any]) -> dict[str, str]:
    """The environment variables a recipe sets for its workers (``ray_init_kwargs``)."""
    environment = (args.get("ray_init_kwargs") or {}).get("runtime_env") or {}
    return {name: str(value) for name, value in (environment.get("env_vars") or {}).items()}


def names_of(value: Any) -> list[str]:
    names = value if isinstance(value, list) else str(value or "").split(",")
    return [name.strip() for name in names if name.strip()]
