"""A recipe and its overrides become the files of a run: resolved YAML and DeepSpeed JSON.

A recipe is a LLaMA-Factory YAML of ``train-configs/``. Resolving it makes paths absolute on the
storage, sets the run's folders, takes secrets out, and finds errors and warnings.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import display, recipes
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
from ..redact import SECRET, strings
from ..run import PROJECT, Run
from . import findings, ranges, validation

if TYPE_CHECKING:
    from pandas import DataFrame

_SECRET_NAMES = ("TOKEN", "SECRET", "PASSWORD", "API_KEY")
_PLACEHOLDER = re.compile(r"<[^<>]*(your|YOUR|my)[^<>]*>|<[A-Z][A-Z_ -]+>")


@dataclass(frozen=True)
class Change:
    """A key whose value differs from the recipe, with the reason."""

    key: str
    before: Any
    now: Any
    why: str


@dataclass(frozen=True)
class Resolved:
    """A recipe as the workers will read it. Shows as a table of its changes."""

    recipe: Path  # the file of the recipe
    args: Recipe  # all keys, with absolute paths
    changes: list[Change]  # the differences from the recipe
    deepspeed: Path | None  # the DeepSpeed file to copy into the run; ``None`` without DeepSpeed
    problems: tuple[ConfigError, ...] = ()  # errors, if the recipe was only examined
    # settings that can be trained and are probably not intended
    warnings: tuple[ConfigError, ...] = ()

    @property
    def readable(self) -> Recipe:
        """``args`` with the original DeepSpeed file, which is there before :func:`write`."""
        return self.args | ({"deepspeed": str(self.deepspeed)} if self.deepspeed else {})

    def table(self) -> DataFrame:
        rows = [(change.key, change.before, change.now, change.why) for change in self.changes]
        return display.table(rows, columns=["key", "recipe", "this run", "reason"])

    def __repr__(self) -> str:
        return self.table().to_string()

    def _repr_html_(self) -> str:
        return self.table().to_html()


def check_keys(train_config: str, overrides: dict[str, Any]) -> None:
    """Refuses a recipe with wrong keys or values, before anything is fetched.

    Raises:
        ConfigError: With all of them.
    """
    path, recipe = read_recipe(train_config)
    merged = Recipe({k: v for k, v in (recipe | overrides).items() if v is not None})
    validation.refuse(validation.keys(merged, path, overrides))
    recipes.numbers_as_such(merged)
    validation.refuse(_value_errors(merged, path, overrides))


def _value_errors(args: Recipe, path: Path, overrides: dict[str, Any]) -> list[ConfigError]:
    errors = list(ranges.problems(args, path, overrides))
    return [*errors, *validation.unusable(args, path, overrides)]


def resolve(
    run: Run,
    train_config: str,
    overrides: dict[str, Any],
    corpus: str,
    blocks: str | None = None,
    *,
    examine: bool = False,
) -> Resolved:
    """Resolves a recipe for a run: overrides, corpus, absolute paths, the run's folders.

    Args:
        run: The run.
        train_config: The recipe.
        overrides: LLaMA-Factory keys to set; ``None`` removes a key.
        corpus: Registry names of the prepared corpora, joined by commas; the first is the domain.
        blocks: The folder of the tokenised blocks; without it the workers tokenise.
        examine: Whether to return errors instead of raising them. Unknown keys and values of the
            wrong type are always raised.

    Raises:
        ConfigError: A key, a value, a model, a dataset or the DeepSpeed file is not known.
    """
    path, recipe = read_recipe(train_config)
    args = Recipe({k: v for k, v in (recipe | overrides).items() if v is not None})
    why = dict.fromkeys(overrides, "OVERRIDES")
    validation.refuse(validation.keys(args, path, overrides))
    why |= dict.fromkeys(recipes.numbers_as_such(args), "YAML read it as text")
    _set_corpus(args, why, corpus, blocks, keep_held_out="eval_dataset" in overrides)
    deepspeed = _set_paths(args, why, run, path)
    _set_defaults(args, why, overrides)
    if taken := take_secrets(args):
        why["ray_init_kwargs"] = f"taken out: {', '.join(taken)}; export them instead"
        recipe = recipe | {"ray_init_kwargs": f"(with {', '.join(taken)})"}  # never shown
    problems = [*secrets(args, path), *_value_errors(args, path, overrides)]
    problems += validation.datasets(args, path)
    problems += validation.contradictions(args, path, deepspeed)
    if not examine:
        validation.refuse(problems)
    changes = [
        Change(key, recipe.get(key), args.get(key), reason)
        for key, reason in why.items()
        if recipe.get(key) != args.get(key)
    ]
    warnings = tuple(findings.warnings(args, path, overrides))
    return Resolved(path, args, changes, deepspeed, tuple(problems), warnings)


def _set_corpus(
    args: Recipe, why: dict[str, str], corpus: str, blocks: str | None, *, keep_held_out: bool
) -> None:
    """Sets the corpus, its held-out set next to the general one, and the tokenised blocks."""
    if corpus != args.get("dataset"):
        args["dataset"], why["dataset"] = corpus, "CORPUS"
        if not keep_held_out:
            domain = names_of(corpus)[0] + HELD_OUT
            general = [n for n in names_of(args.get("eval_dataset")) if n == "news" + HELD_OUT]
            args["eval_dataset"] = ",".join(dict.fromkeys([domain, *general]))
            why["eval_dataset"] = "CORPUS"
    if blocks:
        args["tokenized_path"], why["tokenized_path"] = blocks, "tokenised in step 2"


def _set_paths(args: Recipe, why: dict[str, str], run: Run, path: Path) -> Path | None:
    """Makes paths absolute and sets the run's folders; returns the DeepSpeed file."""
    for key, value in args.items():
        absolute = on_storage(value, run.storage, path_like=key == "model_name_or_path")
        if absolute != value:
            args[key] = absolute
            why.setdefault(key, "absolute, on the storage")
    of_run = {"output_dir": str(run.output), "ray_run_name": run.name, "run_name": run.name}
    for key, value in (of_run | {"ray_storage_path": str(run.storage)}).items():
        if args.get(key) != value:
            args[key], why[key] = value, "the run's own"
    if not args.get("deepspeed"):
        return None
    deepspeed = _deepspeed_file(str(args["deepspeed"]), path)
    args["deepspeed"] = str(run.config_dir / deepspeed.name)
    why["deepspeed"] = f"a copy of {deepspeed.name} that the workers can read"
    return deepspeed


def _set_defaults(args: Recipe, why: dict[str, str], overrides: dict[str, Any]) -> None:
    """Writes out defaults, and adapts settings to the run and to this CPU."""
    args.setdefault("ray_num_workers", 1)
    args.setdefault("report_to", "none")
    args.setdefault("cutoff_len", args.block_size)
    if args.get("eval_dataset") and not args.get("eval_on_each_dataset"):
        args["eval_on_each_dataset"], why["eval_on_each_dataset"] = True, "a loss per set"
    if args.get("logging_steps", 500) > max(args.max_steps, 0) > 0:
        args["logging_steps"], why["logging_steps"] = 1, "it was more than the steps"
    if args.get("stage") == "pt" and args.pop("packing", None):
        why["packing"] = "stage pt always packs; with the key, 0.9.3 cuts blocks a token short"
    if args.use_cpu and args.get("bf16") and "bf16" not in overrides and not cpu_has_bf16():
        args["bf16"], why["bf16"] = False, "this CPU has no bf16 instructions: fp32 is faster"


def write(run: Run, resolved: Resolved) -> Path:
    """Writes the resolved recipe and its DeepSpeed file into the run.

    Returns:
        The YAML file, which is also valid for ``llamafactory-cli train``.

    Raises:
        RunExistsError: The run has been trained with other settings.
    """
    import yaml

    args = resolved.args
    if run.state != "new" and run.train_yaml.is_file():
        before = load(run)
        if before == args:
            return run.train_yaml
        refuse_other_training(run, before, args)
    run.config_dir.mkdir(parents=True, exist_ok=True)
    if resolved.deepspeed:
        shutil.copyfile(resolved.deepspeed, run.config_dir / resolved.deepspeed.name)
    text = yaml.safe_dump(dict(args), sort_keys=False, allow_unicode=True)
    head = f"# {resolved.recipe.name}, resolved for the run '{run.name}'\n"
    run.train_yaml.write_text(head + text, "utf-8")
    return run.train_yaml


def refuse_other_training(run: Run, before: Recipe, args: Recipe) -> None:
    """Refuses to continue a run with other steps, data or global batch.

    Raises:
        RunExistsError: With the settings that differ.
    """
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
        expected="the same training (workers and saving may differ), or a new run",
        do="choose another RUN_NAME, or move that folder away; nothing was changed",
    )


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware. Emulation is about eight times slower."""
    import platform

    import torch

    if platform.machine().lower() in ("x86_64", "amd64"):
        return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _deepspeed_file(name: str, path: Path) -> Path:
    """The DeepSpeed file of a recipe: the path, or the project's file of the same name."""
    for file in (Path(name).expanduser(), PROJECT / name, DEEPSPEED_CONFIGS / Path(name).name):
        if file.is_file():
            try:
                json.loads(file.read_text("utf-8"))
            except ValueError as error:
                what = f"the DeepSpeed file is not JSON: {error}"
                raise ConfigError(what, where=file, do="correct the file") from None
            return file
    shipped = ", ".join(p.name for p in sorted(DEEPSPEED_CONFIGS.glob("*.json")))
    raise ConfigError(
        f"the DeepSpeed file '{name}' does not exist",
        where=f"{path}{line_of(path, 'deepspeed')}",
        expected=f"a path, or one of {shipped}",
        do="correct `deepspeed`",
    )


def take_secrets(args: Recipe) -> list[str]:
    """Takes tokens out of ``ray_init_kwargs.runtime_env.env_vars``, where guides put them.

    Otherwise they are written to ``training_args.bin`` of every checkpoint, to Ray's
    ``params.json`` and to MLflow. A real token goes into this process's environment, unless it has
    one; from there the workers get it through memory. Placeholders are removed.

    Returns:
        The names of the removed variables.
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


def secrets(args: Recipe, path: Path) -> Iterator[ConfigError]:
    """Tokens, which would be written to checkpoints and to the records of Ray and MLflow."""
    for key, value in strings(args):
        named = key.lower().endswith(("_token", "password", "secret", "api_key"))
        placeholder = _PLACEHOLDER.search(value)
        where = f"{path}{line_of(path, key.split('.')[0])}"
        if (named and value.strip() and not placeholder) or SECRET.search(value):
            yield ConfigError(
                f"the recipe holds a secret, {key}",
                where=where,
                expected="secrets in the environment only",
                do="take it out of the file and `export HF_TOKEN=…` (or its variable) before "
                "starting; the workers get it from there",
            )
        elif placeholder:
            what, do = f"{key}: a placeholder was left in, {placeholder[0]}", "fill it in"
            yield ConfigError(what, where=where, expected="a value", do=f"{do}, or take it out")
