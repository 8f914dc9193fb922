"""What is wrong with a recipe, found before anything starts; each with where, and what to do."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from ..data.corpora import read_registry
from ..data.mixing import evaluates
from ..errors import ConfigError, nearest
from ..recipes import HELD_OUT, Recipe, known_keys, line_of, names_of, where_of
from ..redact import SECRET, strings
from ..redirect import hushed

_MAPPINGS = (
    "lr_scheduler_kwargs",
    "resources_per_worker",
    "ray_init_kwargs",
    "ray_init_kwargs.runtime_env",
    "ray_init_kwargs.runtime_env.env_vars",
)
_PRECISIONS = ("bf16", "fp16")
_SECRET_NAMES = ("TOKEN", "SECRET", "PASSWORD", "API_KEY")
_PLACEHOLDER = re.compile(r"<[^<>]*(your|YOUR|my)[^<>]*>|<[A-Z][A-Z_ -]+>")


def refuse(problems: Iterable[ConfigError]) -> None:
    """Raises what is wrong; several things at once in one error, so that all are mended at once.

    Raises:
        ConfigError: There was something.
    """
    problems = list(problems)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        told = "\n".join(f"{n}. {problem}" for n, problem in enumerate(problems, 1))
        raise ConfigError(f"{len(problems)} things are wrong with the recipe\n{told}")


def keys(args: Recipe, path: Path, overrides: dict[str, Any]) -> Iterator[ConfigError]:
    """Keys LLaMA-Factory does not know, and values of another type or none of a key's choices."""
    known = known_keys()
    for key, value in args.items():
        where = where_of(path, key, overrides)
        if key not in known:
            yield ConfigError(
                f"unknown key '{key}'",
                where=where,
                expected=f"a LLaMA-Factory argument ({nearest(key, known)})",
                do="correct the name or leave it out",
            )
            continue
        action = known[key]
        if action.choices and value not in action.choices and str(value) not in action.choices:
            yield ConfigError(
                f"{key}: {value!r} is not a choice",
                where=where,
                expected=", ".join(map(str, action.choices)),
                do="choose one of these",
            )
        elif expected := _other_type(action, value):
            yield ConfigError(
                f"{key}: {value!r} is not {'a number' if 'number' in expected else expected}",
                where=where,
                expected=expected,
                do="correct the value",
            )
    for dotted, value in _not_mappings(args):
        yield ConfigError(
            f"{dotted}: {value!r} is not a mapping",
            where=where_of(path, dotted.split(".")[0], overrides),
            expected="names with values",
            do="write it as YAML: `name: value` lines, indented",
        )


def _not_mappings(args: Recipe) -> Iterator[tuple[str, Any]]:
    """Settings that hold something else than names with values, by dotted key."""
    for dotted in _MAPPINGS:
        value: Any = args
        for name in dotted.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None and not isinstance(value, dict):
            yield dotted, value


def _other_type(action: Any, value: Any) -> str | None:
    """What a value should have been, where it is something else."""
    if action.type is int:
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        digits = isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d+\s*", value)
        return None if (whole and not isinstance(value, bool)) or digits else "a whole number"
    if action.type is float:
        try:
            float(value if not isinstance(value, bool) else "no")
        except (TypeError, ValueError):
            return "a number"
    if getattr(action.type, "__name__", "") == "string_to_bool":
        truths = ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0")
        return None if str(value).lower() in truths else "true or false"
    return None


def datasets(args: Recipe, path: Path) -> Iterator[ConfigError]:
    """Datasets that are not registered, or whose files are gone."""
    folder = Path(str(args.get("dataset_dir", "data")))
    file = folder / "dataset_info.json"
    registry = read_registry(file) if file.exists() else {}
    for key in ("dataset", "eval_dataset"):
        for name in names_of(args.get(key)):
            if name not in registry:
                yield ConfigError(
                    f"unknown dataset '{name}'",
                    where=f"{key} in {path}{line_of(path, key)}",
                    expected=f"a name in {folder}/dataset_info.json ({nearest(name, registry)})",
                    do="run notebook 02_data with this corpus, or correct the name",
                )
                continue
            file_name = registry[name].get("file_name")
            if file_name and not (folder / file_name).exists():
                yield ConfigError(
                    f"the dataset '{name}' is registered, but its file is not there",
                    where=folder / file_name,
                    do=f"run notebook 02_data with CORPUS={name.removesuffix(HELD_OUT)}",
                )


def contradictions(args: Recipe, path: Path, deepspeed: Path | None) -> Iterator[ConfigError]:
    """Settings that exclude each other: those known here, then what LLaMA-Factory's parser says."""

    def wrong(what: str, key: str, do: str, expected: str = "") -> ConfigError:
        return ConfigError(what, where=f"{path}{line_of(path, key)}", expected=expected, do=do)

    found = []
    if args.get("stage", "sft") != "pt":
        found.append(wrong(
            f"stage: {args.get('stage', 'sft')} is not continued pre-training",
            "stage", "stage: pt; other stages need other data than plain text", "pt",
        ))  # fmt: skip
    if args.get("bf16") and args.get("fp16"):
        found.append(wrong("bf16 and fp16 exclude each other", "fp16", "leave one of them out"))
    resources = args.get("resources_per_worker") or {"GPU": 1}
    if args.get("use_cpu") and resources.get("GPU"):
        found.append(wrong(
            "use_cpu is set, and each worker asks for a GPU", "use_cpu",
            "resources_per_worker: {CPU: 1}, or leave use_cpu out",
        ))  # fmt: skip
    if not args.get("use_cpu") and not resources.get("GPU"):
        found.append(wrong(
            "the workers ask for no GPU, and use_cpu is not set", "resources_per_worker",
            "use_cpu: true for a training on CPUs, or resources_per_worker: {GPU: 1}",
        ))  # fmt: skip
    if not args.get("do_train"):
        found.append(wrong("do_train is not set: nothing would be trained", "do_train",
                           "do_train: true"))  # fmt: skip
    if str(args.get("eval_strategy", "no")) != "no" and not (
        args.get("eval_dataset") or args.get("val_size")
    ):
        found.append(wrong(
            f"eval_strategy: {args['eval_strategy']}, and there is nothing to measure on",
            "eval_strategy", "eval_dataset: <corpus>_heldout, or eval_strategy: no",
        ))  # fmt: skip
    found += _in_deepspeed_file(args, deepspeed) if deepspeed else ()
    found += _in_blocks(args, path)
    if args.get("template") not in (known := _templates()):
        found.append(wrong(
            f"template: {args.get('template')!r} is not known", "template",
            "template: empty, which keeps the tokenizer's own end-of-sequence token",
            f"a template of LLaMA-Factory ({nearest(str(args.get('template')), known)})",
        ))  # fmt: skip
    yield from found
    if not found and (said := _parser_says(args)):
        yield ConfigError(
            f"LLaMA-Factory refuses the recipe: {said}", where=path, do="correct that"
        )


@cache
def _templates() -> frozenset[str]:
    with hushed():
        from llamafactory.data.template import TEMPLATES
    return frozenset(TEMPLATES)


def _in_deepspeed_file(args: Recipe, path: Path) -> Iterator[ConfigError]:
    """Sizes that DeepSpeed's file sets otherwise than the recipe; ``"auto"`` takes the recipe's."""
    settings = json.loads(path.read_text("utf-8"))
    micro = args.get("per_device_train_batch_size", 8)
    accumulation = args.get("gradient_accumulation_steps", 1)
    own = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro * accumulation * args.get("ray_num_workers", 1),
        "gradient_clipping": args.get("max_grad_norm", 1.0),
    }
    flat = settings | {f"{k}.enabled": (settings.get(k) or {}).get("enabled") for k in _PRECISIONS}
    own |= {f"{name}.enabled": bool(args.get(name)) for name in _PRECISIONS}
    zero = settings.get("zero_optimization") or {}
    if zero.get("stage3_use_all_reduce_for_fetch_params"):
        yield ConfigError(
            "stage3_use_all_reduce_for_fetch_params gathers wrong weights in DeepSpeed 0.16.9 "
            "where a parameter is padded",
            where=path,
            expected="gathering by all-gather, DeepSpeed's default "
            "(https://github.com/deepspeedai/DeepSpeed/pull/8158)",
            do="take the key out",
        )
    for key, value in own.items():
        given = flat.get(key, "auto")
        if given not in ("auto", None) and given != value:
            yield ConfigError(
                f"DeepSpeed's file says {key}: {given}, the recipe comes to {value}",
                where=path,
                expected='"auto": the recipe decides',
                do='write "auto" there',
            )


def _in_blocks(args: Recipe, path: Path) -> Iterator[ConfigError]:
    """Settings that the blocks of step 2 were not made with; LLaMA-Factory would ignore them."""
    record = Path(str(args.get("tokenized_path") or ""), "mix.json")
    if not record.is_file():
        return
    mix = json.loads(record.read_text("utf-8"))
    if mix.get("block_size", args["cutoff_len"]) != args["cutoff_len"]:
        yield ConfigError(
            f"cutoff_len is {args['cutoff_len']}, and the blocks have {mix['block_size']} tokens",
            where=f"{path}{line_of(path, 'cutoff_len')}\n{record}",
            expected="blocks of cutoff_len tokens",
            do="run notebook 02_data with the same OVERRIDES",
        )
    lacking = [n for n in names_of(args.get("eval_dataset")) if n not in mix["heldout_blocks"]]
    if lacking and evaluates(args):
        yield ConfigError(
            f"eval_dataset: {', '.join(lacking)} would not be measured",
            where=f"{path}{line_of(path, 'eval_dataset')}\n{record}",
            expected=f"held-out sets that have blocks: {', '.join(mix['heldout_blocks'])}",
            do="name these, or prepare the other ones with notebook 02_data",
        )


def _parser_says(args: Recipe) -> str | None:
    """LLaMA-Factory's own parser on a recipe, as far as it can be asked without GPUs and ranks."""
    from llamafactory.hparams import get_ray_args, get_train_args
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    asked = {k: v for k, v in args.items() if k not in ("deepspeed", "bf16", "fp16")}
    asked |= {"use_cpu": True, "report_to": "none", "overwrite_output_dir": True}
    try:
        with hushed():
            get_train_args(asked)
            get_ray_args(args)
    except Exception as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[-1]
    finally:
        logging.set_verbosity(verbosity)  # the parser turns it up
    return None


def take_secrets(args: Recipe) -> list[str]:
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


def secrets(args: Recipe, path: Path) -> Iterator[ConfigError]:
    """A token in a recipe would be in every checkpoint, in Ray's and in MLflow's records."""
    for key, value in strings(args):
        named = key.lower().endswith(("_token", "password", "secret", "api_key"))
        placeholder = _PLACEHOLDER.search(value)
        if (named and value.strip() and not placeholder) or SECRET.search(value):
            yield ConfigError(
                f"the recipe holds a secret, {key}",
                where=f"{path}{line_of(path, key.split('.')[0])}",
                expected="secrets in the environment only",
                do="take it out of the file and `export HF_TOKEN=…` (or the variable it is for) "
                "before starting; it is handed to the workers from there",
            )
        elif placeholder:
            yield ConfigError(
                f"{key}: a placeholder was left in, {placeholder[0]}",
                where=f"{path}{line_of(path, key.split('.')[0])}",
                expected="a value",
                do="fill it in, or take the line out",
            )
