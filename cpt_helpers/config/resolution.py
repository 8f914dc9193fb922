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

from .. import recipes
from ..errors import ConfigError, RunExistsError
from ..recipes import (
    DEEPSPEED_CONFIGS,
    HELD_OUT,
    MAY_CHANGE,
    Recipe,
    line_of,
    load,
    names_of,
    on_storage,
    read_recipe,
)
from ..run import PROJECT, Run
from . import advice, ranges, refused, validation

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
    args: Recipe
    changes: list[Change]
    deepspeed: Path | None
    problems: tuple[ConfigError, ...] = ()
    warnings: tuple[ConfigError, ...] = ()


def check_keys(train_config: str, overrides: dict[str, Any]) -> None:
    """Refuses a recipe whose keys or values cannot serve, before anything is fetched.

    Raises:
        ConfigError: With all of them.
    """
    path, recipe = read_recipe(train_config)
    merged = Recipe({k: v for k, v in (recipe | overrides).items() if v is not None})
    validation.refuse(validation.keys(merged, path, overrides))
    recipes.numbers_as_such(merged)
    validation.refuse(_values(merged, path, overrides))


def _values(args: Recipe, path: Path, overrides: dict[str, Any]) -> list[ConfigError]:
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
    args = Recipe({k: v for k, v in (recipe | overrides).items() if v is not None})
    why = dict.fromkeys(overrides, "OVERRIDES")
    validation.refuse(validation.keys(args, path, overrides))
    why |= dict.fromkeys(recipes.numbers_as_such(args), "YAML read it as text")
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
        rebased = on_storage(value, run.storage, path_like=key in ("model_name_or_path",))
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
    if taken := validation.take_secrets(args):
        why["ray_init_kwargs"] = f"taken out: {', '.join(taken)}; export them instead"
    if args.get("stage") == "pt" and args.pop("packing", None):
        why["packing"] = "stage pt packs by itself; asked to, 0.9.3 cuts blocks a token short"
    if args.get("use_cpu") and args.get("bf16") and "bf16" not in overrides and not cpu_has_bf16():
        args["bf16"], why["bf16"] = False, "this CPU has no bf16 instructions: fp32 is faster"
    problems = [*validation.secrets(args, path), *_values(args, path, overrides)]
    problems += validation.datasets(args, path)
    problems += validation.contradictions(args, path, deepspeed)
    if not examine:
        validation.refuse(problems)
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
        dict(args), sort_keys=False, allow_unicode=True
    )
    if run.state != "new" and run.train_yaml.is_file():
        before = load(run)
        if before == args:
            return run.train_yaml
        _refuse_other_training(run, before, args)
    run.config_dir.mkdir(parents=True, exist_ok=True)
    if resolved.deepspeed:
        shutil.copyfile(resolved.deepspeed, run.config_dir / resolved.deepspeed.name)
    run.train_yaml.write_text(text, "utf-8")
    return run.train_yaml


def _refuse_other_training(run: Run, before: Recipe, args: Recipe) -> None:
    """What has begun to train is taken up with the same steps, data and global batch, or not."""
    keys = sorted(before.keys() | args.keys())
    changed = {k: (before.get(k), args.get(k)) for k in keys if before.get(k) != args.get(k)}
    refused = {k: v for k, v in changed.items() if k not in MAY_CHANGE or run.state == "complete"}
    if before.global_batch != args.global_batch:
        refused["the global batch"] = (before.global_batch, args.global_batch)
    if not refused:
        return
    raise RunExistsError(
        f"the run '{run.name}' has been trained with other settings: "
        + ", ".join(f"{k} was {old!r}, is {new!r}" for k, (old, new) in refused.items()),
        where=run.train_yaml,
        expected="the same training (the workers may be others, and what is saved), or a new run",
        do="choose another RUN_NAME, or move that folder away; nothing was changed",
    )


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware; emulated, it is about eight times slower."""
    import platform

    import torch

    if platform.machine().lower() in ("x86_64", "amd64"):
        return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


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
