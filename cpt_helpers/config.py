"""A recipe and its overrides become the files a run trains by, and the plan of what that means.

A recipe is a LLaMA-Factory YAML of ``train-configs/``. Resolving it makes every path absolute on
the storage, puts the run's own folders in, and refuses what cannot work before anything starts.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import advice, checks, ranges, refused
from .checks import line_of, names_of
from .errors import ConfigError, RunExistsError
from .registry import HELD_OUT
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
        problems: What is wrong with it, where it was only examined.
        warnings: What can be trained and is probably not what was meant.
    """

    recipe: Path
    args: dict[str, Any]
    changes: list[Change]
    deepspeed: Path | None
    problems: tuple[ConfigError, ...] = ()
    warnings: tuple[ConfigError, ...] = ()


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
    """The corpus a recipe trains on, its ``dataset``."""
    path, recipe = read_recipe(train_config)
    names = names_of((recipe | overrides).get("dataset"))
    if not names:
        raise ConfigError("the recipe names no dataset", where=path, expected="`dataset: <name>`")
    if len(names) > 1:
        raise ConfigError(
            f"the recipe names {len(names)} datasets: {', '.join(names)}",
            where=f"{path}{line_of(path, 'dataset')}",
            expected="one corpus; several need weights",
            do="give them as CORPUS: " + "{" + ", ".join(f"{n!r}: 1" for n in names) + "}",
        )
    return names[0]


def check_keys(train_config: str, overrides: dict[str, Any]) -> None:
    """Refuses a recipe whose keys or values cannot serve, before anything is fetched.

    Raises:
        ConfigError: With all of them.
    """
    path, recipe = read_recipe(train_config)
    merged = {key: value for key, value in (recipe | overrides).items() if value is not None}
    checks.refuse(checks.keys(merged, path, overrides))
    checks.numbers_as_such(merged)
    checks.refuse(_values(merged, path, overrides))


def _values(args: dict[str, Any], path: Path, overrides: dict[str, Any]) -> list[ConfigError]:
    return [*ranges.problems(args, path, overrides), *refused.problems(args, path, overrides)]


def resolve(
    run: Run,
    train_config: str,
    overrides: dict[str, Any],
    corpus: str,
    blocks: str | None = None,
    *,
    examine: bool = False,
) -> Resolved:
    """Makes a recipe the run's own: overrides, corpus, absolute paths, the run's folders.

    Args:
        run: Whose folders it is to use.
        train_config: The recipe.
        overrides: LLaMA-Factory keys to set; ``None`` takes a key out.
        corpus: The prepared corpora to train on, by their registry names, joined by commas; the
            first one is the domain.
        blocks: The folder of what was tokenised of them; without it the workers tokenise.
        examine: Whether to hand back what is wrong with it instead of raising that; keys that
            LLaMA-Factory does not know, and values of another type, are always raised.

    Raises:
        ConfigError: A key, a value, a model, a dataset or the DeepSpeed file is not known.
    """
    path, recipe = read_recipe(train_config)
    args, why = dict(recipe), {}
    for key, value in overrides.items():
        args[key], why[key] = value, "OVERRIDES"
    args = {key: value for key, value in args.items() if value is not None}
    checks.refuse(checks.keys(args, path, overrides))
    why |= dict.fromkeys(checks.numbers_as_such(args), "YAML read it as text")
    if corpus != args.get("dataset"):
        args["dataset"], why["dataset"] = corpus, "CORPUS"
        if "eval_dataset" not in overrides:
            domain = names_of(corpus)[0] + HELD_OUT
            others = [n for n in names_of(args.get("eval_dataset")) if n == "news" + HELD_OUT]
            held_out = [domain, *(name for name in others if name != domain)]
            args["eval_dataset"], why["eval_dataset"] = ",".join(held_out), "CORPUS"
    if blocks:
        args["tokenized_path"], why["tokenized_path"] = blocks, "tokenised in step 2"
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
    args.setdefault("ray_num_workers", 1)
    args.setdefault("report_to", "none")
    args.setdefault("cutoff_len", 2048)  # LLaMA-Factory's default, said out loud
    if args.get("eval_dataset") and not args.get("eval_on_each_dataset"):
        args["eval_on_each_dataset"], why["eval_on_each_dataset"] = True, "a loss for each"
    if args.get("logging_steps", 500) > max(args.get("max_steps", -1), 0) > 0:
        args["logging_steps"], why["logging_steps"] = 1, "more than there are steps"
    if taken := checks.take_secrets(args):
        why["ray_init_kwargs"] = f"taken out: {', '.join(taken)}; export them instead"
    if args.get("stage") == "pt" and args.pop("packing", None):
        why["packing"] = "stage pt packs by itself; asked to, 0.9.3 cuts blocks a token short"
    if args.get("use_cpu") and args.get("bf16") and "bf16" not in overrides and not cpu_has_bf16():
        args["bf16"], why["bf16"] = False, "this CPU has no bf16 instructions: fp32 is faster"
    problems = [*checks.secrets(args, path), *_values(args, path, overrides)]
    problems += checks.datasets(args, path)
    problems += checks.contradictions(args, path, deepspeed)
    if not examine:
        checks.refuse(problems)
    if taken:  # nor may it be shown
        recipe = recipe | {"ray_init_kwargs": f"(with {', '.join(taken)})"}
    changes = [
        Change(key, recipe.get(key), args.get(key), reason)
        for key, reason in why.items()
        if recipe.get(key) != args.get(key)
    ]
    warnings = tuple(advice.warnings(args, path, overrides))
    return Resolved(path, args, changes, deepspeed, tuple(problems), warnings)


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
        where=f"{path}{line_of(path, 'deepspeed')}",
        expected=f"a path, or one of {shipped}",
        do="correct `deepspeed`",
    )


def held_out_of(args: dict[str, Any]) -> dict[str, str]:
    """The roles of the held-out sets: ``{"domain": …, "general": …}`` by registry name.

    The domain is the held-out half of the first corpus trained on; general text the first other.
    """
    names = names_of(args.get("eval_dataset"))
    own = [name + HELD_OUT for name in names_of(args.get("dataset"))[:1]]
    roles = {"domain": next((n for n in names if n in own), None)}
    roles["general"] = next((n for n in names if n not in own), None)
    return {role: name for role, name in roles.items() if name}
