"""A recipe and its overrides become the files a run trains by, and the plan of what that means.

A recipe is a LLaMA-Factory YAML of ``train-configs/``. Resolving it makes every path absolute on
the storage, puts the run's own folders in, and refuses what cannot work before anything starts.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .data import HELD_OUT, read_registry
from .errors import ConfigError, RunExistsError, nearest
from .run import PROJECT, Run

RECIPES = PROJECT / "train-configs"
DEEPSPEED_CONFIGS = PROJECT / "deepspeed-configs"
_STORAGE_PREFIXES = ("/mnt/cluster_storage", "cluster_storage")
# What may differ when a run is taken up again: where and how it runs, not what it learns. The sizes
# of a batch may as long as their product stays.
MAY_CHANGE = frozenset(
    {
        "ray_num_workers", "per_device_train_batch_size", "gradient_accumulation_steps",
        "resources_per_worker", "placement_strategy", "ray_init_kwargs", "ddp_timeout",
        "save_steps", "save_total_limit", "eval_steps", "per_device_eval_batch_size",
        "report_to", "plot_loss", "preprocessing_num_workers", "dataloader_num_workers",
        "overwrite_cache", "disable_gradient_checkpointing", "include_num_input_tokens_seen",
    }
)  # fmt: skip
_OWN_BY_RUN = ("output_dir", "ray_run_name", "ray_storage_path", "run_name")


@dataclass(frozen=True)
class Change:
    """One key that differs from the recipe: what it was, what it is, and why."""

    key: str
    before: Any
    now: Any
    why: str


@dataclass(frozen=True)
class Resolved:
    """A recipe as the workers will read it.

    Attributes:
        recipe: The file it began as.
        args: All keys, paths absolute.
        changes: Where that differs from the recipe.
        deepspeed: The DeepSpeed file to copy into the run; ``None`` without DeepSpeed.
    """

    recipe: Path
    args: dict[str, Any]
    changes: list[Change]
    deepspeed: Path | None


def read_recipe(train_config: str) -> tuple[Path, dict[str, Any]]:
    """A recipe by its file name in ``train-configs/`` or by path.

    Raises:
        ConfigError: There is no such file, or it is not YAML of a mapping.
    """
    import yaml

    named = RECIPES / Path(train_config).name
    path = Path(train_config).expanduser()
    path = path if path.is_file() else PROJECT / train_config
    path = path if path.is_file() else named
    shipped = [recipe.name for recipe in sorted(RECIPES.glob("*.yaml"))]
    if not path.is_file() or not train_config:
        raise ConfigError(
            f"the recipe '{train_config}' does not exist",
            where=Path(train_config).absolute(),
            expected=f"a path, or one of {', '.join(shipped)}",
            do="correct TRAIN_CONFIG",
        )
    try:
        recipe = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise ConfigError(
            f"the recipe is not YAML: {problem}", where=f"{path}{line}", do="mend that line"
        ) from None
    if not isinstance(recipe, dict):
        raise ConfigError("the recipe has no keys", where=path, expected="`key: value` lines")
    return path.resolve(), recipe


def model_of(train_config: str, overrides: dict[str, Any], storage: Path) -> str:
    """The model a recipe names: an absolute folder, or a name on the Hugging Face hub."""
    path, recipe = read_recipe(train_config)
    merged = recipe | overrides
    if "model_name_or_path" not in merged:
        raise ConfigError("the recipe names no model", where=path, expected="model_name_or_path")
    return str(_on_storage(merged["model_name_or_path"], storage, path_like=True))


def corpus_of(train_config: str, overrides: dict[str, Any]) -> str:
    """The corpus a recipe trains on: the first name of its ``dataset``."""
    path, recipe = read_recipe(train_config)
    names = str((recipe | overrides).get("dataset") or "")
    if not names:
        raise ConfigError("the recipe names no dataset", where=path, expected="`dataset: <name>`")
    return names.split(",")[0].strip()


def resolve(run: Run, train_config: str, overrides: dict[str, Any], corpus: str) -> Resolved:
    """Makes a recipe the run's own: overrides, corpus, absolute paths, the run's folders.

    Args:
        run: Whose folders it is to use.
        train_config: The recipe.
        overrides: LLaMA-Factory keys to set; ``None`` takes a key out.
        corpus: The prepared corpus to train on, by its registry name.

    Raises:
        ConfigError: A key, a value, a model, a dataset or the DeepSpeed file is not known.
    """
    path, recipe = read_recipe(train_config)
    args, why = dict(recipe), {}
    for key, value in overrides.items():
        args[key], why[key] = value, "OVERRIDES"
    args = {key: value for key, value in args.items() if value is not None}
    check_keys(args, path, overrides)
    if corpus != args.get("dataset"):
        args["dataset"], why["dataset"] = corpus, "CORPUS"
        others = [n for n in _names(args.get("eval_dataset")) if n == "news" + HELD_OUT]
        args["eval_dataset"] = ",".join([corpus + HELD_OUT, *others])
        why["eval_dataset"] = "CORPUS"
    for key, value in args.items():
        rebased = _on_storage(value, run.storage, path_like=key in ("model_name_or_path",))
        if rebased != value:
            args[key] = rebased
            why.setdefault(key, "absolute, on the storage")
    own = (run.output, run.name, run.storage, run.name)
    for key, value in zip(_OWN_BY_RUN, map(str, own), strict=True):
        if args.get(key) != value:
            args[key], why[key] = value, "the run's own"
    deepspeed = None
    if args.get("deepspeed"):
        deepspeed = _deepspeed_file(str(args["deepspeed"]), path)
        args["deepspeed"] = str(run.config_dir / deepspeed.name)
        why["deepspeed"] = f"a copy of {deepspeed.name} the workers can read"
    _refuse_secrets(args, path)
    if args.get("stage") == "pt" and args.pop("packing", None):
        why["packing"] = "stage pt packs by itself; asked to, 0.9.3 cuts blocks a token short"
    if args.get("use_cpu") and args.get("bf16") and "bf16" not in overrides and not cpu_has_bf16():
        args["bf16"], why["bf16"] = False, "this CPU has no bf16 instructions: fp32 is faster"
    _check_datasets(args, path)
    _check_numbers(args, path)
    changes = [
        Change(key, recipe.get(key), args.get(key), reason)
        for key, reason in why.items()
        if recipe.get(key) != args.get(key)
    ]
    return Resolved(path, args, changes, deepspeed)


def write(run: Run, resolved: Resolved) -> Path:
    """Writes the resolved recipe and its DeepSpeed file into the run.

    Returns:
        The YAML, valid for ``llamafactory-cli train`` as well.

    Raises:
        RunExistsError: The run has been trained, and by other settings.
    """
    import yaml

    args = resolved.args
    text = f"# {resolved.recipe.name}, resolved for the run '{run.name}'\n" + yaml.safe_dump(
        args, sort_keys=False, allow_unicode=True
    )
    if run.state != "new" and run.train_yaml.is_file():
        before = yaml.safe_load(run.train_yaml.read_text("utf-8"))
        if before == args:
            return run.train_yaml
        _refuse_other_training(run, before, args)
    run.config_dir.mkdir(parents=True, exist_ok=True)
    if resolved.deepspeed:
        shutil.copyfile(resolved.deepspeed, run.config_dir / resolved.deepspeed.name)
    run.train_yaml.write_text(text, "utf-8")
    return run.train_yaml


def global_batch(args: dict[str, Any]) -> int:
    """Blocks of one optimizer step, over all workers."""
    micro = args.get("per_device_train_batch_size", 8)
    return micro * args.get("gradient_accumulation_steps", 1) * args.get("ray_num_workers", 1)


def with_workers(args: dict[str, Any], workers: int | None) -> dict[str, Any]:
    """A recipe for another number of workers and the same global batch, by its accumulation.

    Raises:
        ConfigError: The global batch cannot be divided so.
    """
    if not workers or workers == args.get("ray_num_workers", 1):
        return args
    micro, batch = args.get("per_device_train_batch_size", 8), global_batch(args)
    fitting = [m for m in range(micro, 0, -1) if batch % (m * workers) == 0]
    if workers < 0 or not fitting:
        divisors = [n for n in range(1, batch + 1) if batch % n == 0]
        raise ConfigError(
            f"{workers} workers cannot share a step of {batch} blocks",
            where="ray_num_workers",
            expected=f"a divisor of the global batch: {', '.join(map(str, divisors[:12]))}",
            do="choose one of these; another global batch would be another training",
        )
    return args | {
        "ray_num_workers": workers,
        "per_device_train_batch_size": fitting[0],
        "gradient_accumulation_steps": batch // (fitting[0] * workers),
    }


def _refuse_other_training(run: Run, before: dict[str, Any], args: dict[str, Any]) -> None:
    """What has begun to train is taken up with the same steps, data and global batch, or not."""
    keys = sorted(before.keys() | args.keys())
    changed = {k: (before.get(k), args.get(k)) for k in keys if before.get(k) != args.get(k)}
    refused = {k: v for k, v in changed.items() if k not in MAY_CHANGE or run.state == "complete"}
    if global_batch(before) != global_batch(args):
        refused["the global batch"] = (global_batch(before), global_batch(args))
    if not refused:
        return
    raise RunExistsError(
        f"the run '{run.name}' has been trained with other settings: "
        + ", ".join(f"{k} was {old!r}, is {new!r}" for k, (old, new) in refused.items()),
        where=run.train_yaml,
        expected="the same training (the workers may be others, and what is saved), or a new run",
        do="choose another RUN_NAME, or move that folder away; nothing was changed",
    )


def load(run: Run) -> dict[str, Any]:
    """The resolved recipe of a run.

    Raises:
        ConfigError: It has not been written.
    """
    import yaml

    if not run.train_yaml.is_file():
        raise ConfigError(
            f"the run '{run.name}' has no resolved recipe",
            where=run.train_yaml,
            do="run notebook 03_config for it",
        )
    return yaml.safe_load(run.train_yaml.read_text("utf-8"))


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware; emulated, it is about eight times slower."""
    import platform

    import torch

    if platform.machine().lower() in ("x86_64", "amd64"):
        return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


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
        where = "OVERRIDES" if key in overrides else f"{path}{_line_of(path, key)}"
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


def _names(value: Any) -> list[str]:
    names = value if isinstance(value, list) else str(value or "").split(",")
    return [name.strip() for name in names if name.strip()]


def _on_storage(value: Any, storage: Path, *, path_like: bool) -> Any:
    """A recipe's ``cluster_storage/…`` as a path of this storage; local model folders absolute."""
    if not isinstance(value, str):
        return value
    for prefix in _STORAGE_PREFIXES:
        if value == prefix or value.startswith(prefix + "/"):
            return str(storage / value[len(prefix) :].lstrip("/"))
    if path_like and Path(value).expanduser().is_dir():
        return str(Path(value).expanduser().absolute())
    return value


def _deepspeed_file(name: str, path: Path) -> Path:
    """The DeepSpeed file a recipe means: that path, or the project's file of the same name."""
    tried = [Path(name).expanduser(), PROJECT / name, DEEPSPEED_CONFIGS / Path(name).name]
    for candidate in tried:
        if candidate.is_file():
            try:
                json.loads(candidate.read_text("utf-8"))
            except ValueError as error:
                raise ConfigError(
                    f"the DeepSpeed file is not JSON: {error}", where=candidate, do="mend it"
                ) from None
            return candidate
    shipped = ", ".join(p.name for p in sorted(DEEPSPEED_CONFIGS.glob("*.json")))
    raise ConfigError(
        f"the DeepSpeed file '{name}' does not exist",
        where=f"{path}{_line_of(path, 'deepspeed')}",
        expected=f"a path, or one of {shipped}",
        do="correct `deepspeed`",
    )


def _check_datasets(args: dict[str, Any], path: Path) -> None:
    folder = Path(str(args.get("dataset_dir", "data")))
    registry = read_registry(folder / "dataset_info.json")
    for key in ("dataset", "eval_dataset"):
        for name in _names(args.get(key)):
            if name not in registry:
                raise ConfigError(
                    f"unknown dataset '{name}'",
                    where=f"{key} in {path}{_line_of(path, key)}",
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


def _refuse_secrets(args: dict[str, Any], path: Path) -> None:
    """A token in a recipe would be in every checkpoint, in Ray's and in MLflow's records."""
    for name in worker_variables(args):
        if any(mark in name.upper() for mark in ("TOKEN", "SECRET", "PASSWORD", "API_KEY")):
            raise ConfigError(
                f"the recipe holds a secret, {name}",
                where=f"ray_init_kwargs in {path}",
                expected="secrets in the environment only",
                do=f"take it out of the file and `export {name}=…` before starting; "
                "it is handed to the workers from there",
            )


def _check_numbers(args: dict[str, Any], path: Path) -> None:
    timeout = args.get("ddp_timeout", 1800)
    if not isinstance(timeout, int) or not 10 <= timeout <= 86400:
        raise ConfigError(
            f"ddp_timeout: {timeout!r}",
            where=f"{path}{_line_of(path, 'ddp_timeout')}",
            expected="seconds that a worker may keep the others waiting, 10 to 86,400 (a day)",
            do="minutes, such as 1800: with years a hung run is never noticed, and always paid for",
        )
    if args.get("load_best_model_at_end"):
        raise ConfigError(
            "load_best_model_at_end looks for checkpoints in output_dir, and they are on the "
            "storage",
            where=f"{path}{_line_of(path, 'load_best_model_at_end')}",
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
                where=f"{path}{_line_of(path, key)}",
                expected=f"a whole number, {least} or more",
                do="correct the value",
            )


def _line_of(path: Path, key: str) -> str:
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if line.startswith(f"{key}:"):
            return f":{number}"
    return ""


def worker_variables(args: dict[str, Any]) -> dict[str, str]:
    """The environment variables a recipe sets for its workers (``ray_init_kwargs``)."""
    environment = (args.get("ray_init_kwargs") or {}).get("runtime_env") or {}
    return {name: str(value) for name, value in (environment.get("env_vars") or {}).items()}


def held_out_of(args: dict[str, Any]) -> dict[str, str]:
    """The roles of the held-out sets: ``{"domain": …, "general": …}`` by registry name.

    The domain is the held-out half of what is trained on; general text is the first other one.
    """
    names = _names(args.get("eval_dataset"))
    own = [name + HELD_OUT for name in _names(args.get("dataset"))]
    roles = {"domain": next((n for n in names if n in own), None)}
    roles["general"] = next((n for n in names if n not in own), None)
    return {role: name for role, name in roles.items() if name}
