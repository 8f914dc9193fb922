"""Errors of a recipe, found before anything starts: each with its place and the fix.

The ranges of numbers are in :mod:`ranges`, warnings in :mod:`findings`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from ..data.corpora import read_registry
from ..data.mixing import evaluates
from ..errors import ConfigError, nearest
from ..recipes import HELD_OUT, Recipe, known_keys, line_of, names_of, where_of
from ..redirect import hushed

_MAPPINGS = (
    "lr_scheduler_kwargs",
    "resources_per_worker",
    "ray_init_kwargs",
    "ray_init_kwargs.runtime_env",
    "ray_init_kwargs.runtime_env.env_vars",
)
_PRECISIONS = ("bf16", "fp16")
_TRUE = ("yes", "true", "t", "y", "1")
_FALSE = ("no", "false", "f", "n", "0")
# Keys that LLaMA-Factory accepts and that cannot work here: the problem, what works, the fix.
_UNUSABLE: dict[str, tuple[str, str, str]] = {
    "save_only_model": (
        "save_only_model leaves nothing to resume from",
        "checkpoints with the optimizer's state",
        "leave it out; save_total_limit bounds the disk, and step 6 exports the model",
    ),
    "save_on_each_node": (
        "save_on_each_node: one worker of each node would write the same files on shared storage",
        "one writer",
        "leave it out: all nodes share the storage",
    ),
    "load_best_model_at_end": (
        "load_best_model_at_end looks for checkpoints in output_dir, and they are on the storage",
        "",
        "leave it out: the best checkpoint is kept, and step 6 exports it",
    ),
    "auto_find_batch_size": (
        "auto_find_batch_size halves the micro-batch when memory runs out, and with it the global "
        "batch",
        "the global batch of the recipe",
        "leave it out; `plan` computes a micro-batch that fits",
    ),
    "ray_storage_filesystem": (
        "ray_storage_filesystem is ignored: a run is written to the storage folder",
        "a folder that every node can read",
        "leave it out, and give the folder with STORAGE",
    ),
}
# The variables of a recipe reach a worker after its process started and before torch is imported.
# The table names the reader of earlier variables, by the start of their names.
_READ_EARLIER = {
    "LD_": "the dynamic loader, when the process starts",
    "PYTHON": "Python, when the process starts",
    "MALLOC_": "the C library, when the process starts",
    "GLIBC_": "the C library, when the process starts",
    "RAY_": "Ray, when its processes start",
    "OPENBLAS_": "OpenBLAS, when Ray imports NumPy",
    "CUDA_VISIBLE_DEVICES": "Ray, which sets it to the worker's own GPUs",
}
# Keys of ``ray_init_kwargs`` that only change what Ray prints or displays: they can be ignored.
_DISPLAY = frozenset(
    {"log_to_driver", "logging_level", "logging_format", "logging_config", "configure_logging",
     "include_dashboard", "dashboard_host", "dashboard_port", "ignore_reinit_error"}
)  # fmt: skip


def refuse(problems: Iterable[ConfigError]) -> None:
    """Raises the problems of a recipe, several in one error.

    Raises:
        ConfigError: There is a problem.
    """
    problems = list(problems)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        numbered = "\n".join(f"{n}. {problem}" for n, problem in enumerate(problems, 1))
        raise ConfigError(f"the recipe has {len(problems)} errors\n{numbered}")


def keys(args: Recipe, path: Path, overrides: dict[str, Any]) -> Iterator[ConfigError]:
    """Unknown keys, values of the wrong type, and values that are not a choice of their key."""
    known = known_keys()
    for key, value in args.items():
        where = where_of(path, key, overrides)
        if key not in known:
            expected = f"a LLaMA-Factory argument ({nearest(key, known)})"
            do = "correct the name or leave it out"
            yield ConfigError(f"unknown key '{key}'", where=where, expected=expected, do=do)
            continue
        choices = known[key].choices
        if choices and value not in choices and str(value) not in choices:
            what, expected = "a choice", ", ".join(map(str, choices))
        else:
            expected = _other_type(known[key], value) or ""
            what = "a number" if "number" in expected else expected
        if expected:
            yield ConfigError(
                f"{key}: {value!r} is not {what}",
                where=where,
                expected=expected,
                do="correct the value",
            )
    for dotted in _MAPPINGS:
        value = args
        for name in dotted.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None and not isinstance(value, dict):
            yield ConfigError(
                f"{dotted}: {value!r} is not a mapping",
                where=where_of(path, dotted.split(".")[0], overrides),
                expected="names with values",
                do="write it as YAML: indented `name: value` lines",
            )


def _other_type(action: Any, value: Any) -> str | None:
    """The type that a key expects if its value has another type."""
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
        return None if str(value).lower() in _TRUE + _FALSE else "true or false"
    return None


def datasets(args: Recipe, path: Path) -> Iterator[ConfigError]:
    """Datasets that are not registered, or whose files are missing."""
    folder = Path(str(args.get("dataset_dir", "data")))
    file = folder / "dataset_info.json"
    registry = read_registry(file) if file.exists() else {}
    for key in ("dataset", "eval_dataset"):
        for name in names_of(args.get(key)):
            data = folder / registry.get(name, {}).get("file_name", "")
            if name not in registry:
                yield ConfigError(
                    f"unknown dataset '{name}'",
                    where=f"{key} in {path}{line_of(path, key)}",
                    expected=f"a name in {file} ({nearest(name, registry)})",
                    do="run notebook 02_data with this corpus, or correct the name",
                )
            elif not data.exists():
                yield ConfigError(
                    f"the dataset '{name}' is registered, but its file is missing",
                    where=data,
                    do=f"run notebook 02_data with CORPUS={name.removesuffix(HELD_OUT)}",
                )


def contradictions(args: Recipe, path: Path, deepspeed: Path | None) -> Iterator[ConfigError]:
    """Settings that exclude each other. If there are none, errors of LLaMA-Factory's parser."""
    problems = [
        ConfigError(what, where=f"{path}{line_of(path, key)}", expected=expected, do=do)
        for key, what, expected, do in _exclusive(args)
    ]
    problems += _in_deepspeed_file(args, deepspeed) if deepspeed else ()
    problems += _in_blocks(args, path)
    yield from problems
    if not problems and (message := _parser_error(args)):
        yield ConfigError(
            f"LLaMA-Factory refuses the recipe: {message}", where=path, do="correct the recipe"
        )


def _exclusive(args: Recipe) -> Iterator[tuple[str, str, str, str]]:
    """Contradictions between keys: a key, the problem, what is expected, the fix."""
    stage, template = args.get("stage", "sft"), args.get("template")
    gpus = args.resources.get("GPU")
    if stage != "pt":
        do = "stage: pt; other stages need other data than plain text"
        yield "stage", f"stage: {stage} is not continued pre-training", "pt", do
    if args.get("bf16") and args.get("fp16"):
        yield "fp16", "bf16 and fp16 exclude each other", "", "leave one of them out"
    if args.use_cpu and gpus:
        do = "resources_per_worker: {CPU: 1}, or leave use_cpu out"
        yield "use_cpu", "use_cpu is set, and each worker asks for a GPU", "", do
    if not args.use_cpu and not gpus:
        do = "use_cpu: true for a training on CPUs, or resources_per_worker: {GPU: 1}"
        yield "resources_per_worker", "the workers ask for no GPU, and use_cpu is not set", "", do
    if not args.get("do_train"):
        yield "do_train", "do_train is not set: nothing would be trained", "", "do_train: true"
    strategy = str(args.get("eval_strategy", "no"))
    if strategy != "no" and not (args.get("eval_dataset") or args.get("val_size")):
        do = "eval_dataset: <corpus>_heldout, or eval_strategy: no"
        yield "eval_strategy", f"eval_strategy: {strategy} without a held-out set", "", do
    if template not in (known := _templates()):
        expected = f"a template of LLaMA-Factory ({nearest(str(template), known)})"
        do = "template: empty, which keeps the tokenizer's own end-of-sequence token"
        yield "template", f"template: {template!r} is not known", expected, do


@cache
def _templates() -> frozenset[str]:
    with hushed():
        from llamafactory.data.template import TEMPLATES
    return frozenset(TEMPLATES)


def _in_deepspeed_file(args: Recipe, path: Path) -> Iterator[ConfigError]:
    """Values of the DeepSpeed file that differ from the recipe; ``"auto"`` takes the recipe's."""
    settings = json.loads(path.read_text("utf-8"))
    values = {
        "train_micro_batch_size_per_gpu": args.micro_batch,
        "gradient_accumulation_steps": args.accumulation,
        "train_batch_size": args.global_batch,
        "gradient_clipping": args.get("max_grad_norm", 1.0),
    }
    flat = settings | {f"{k}.enabled": (settings.get(k) or {}).get("enabled") for k in _PRECISIONS}
    values |= {f"{name}.enabled": bool(args.get(name)) for name in _PRECISIONS}
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
    for key, value in values.items():
        given = flat.get(key, "auto")
        if given not in ("auto", None) and given != value:
            yield ConfigError(
                f"the DeepSpeed file has {key}: {given}, and the recipe has {value}",
                where=path,
                expected='"auto": the recipe decides',
                do=f'write "auto" for {key}',
            )


def _in_blocks(args: Recipe, path: Path) -> Iterator[ConfigError]:
    """Settings that differ from those of step 2's blocks; LLaMA-Factory would ignore them."""
    record = Path(str(args.get("tokenized_path") or ""), "mix.json")
    if not record.is_file():
        return
    mix = json.loads(record.read_text("utf-8"))
    size = mix.get("block_size", args.block_size)
    if size != args.block_size:
        yield ConfigError(
            f"cutoff_len is {args.block_size}, and the blocks have {size} tokens",
            where=f"{path}{line_of(path, 'cutoff_len')}\n{record}",
            expected="blocks of cutoff_len tokens",
            do="run notebook 02_data with the same OVERRIDES",
        )
    missing = [n for n in names_of(args.get("eval_dataset")) if n not in mix["heldout_blocks"]]
    if missing and evaluates(args):
        yield ConfigError(
            f"eval_dataset: {', '.join(missing)} would not be evaluated",
            where=f"{path}{line_of(path, 'eval_dataset')}\n{record}",
            expected=f"held-out sets that have blocks: {', '.join(mix['heldout_blocks'])}",
            do="name these, or prepare the other ones with notebook 02_data",
        )


def _parser_error(args: Recipe) -> str | None:
    """The error of LLaMA-Factory's parser, as far as it can run without GPUs and ranks."""
    from llamafactory.hparams import get_ray_args, get_train_args
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    parsed = {k: v for k, v in args.items() if k not in ("deepspeed", "bf16", "fp16")}
    parsed |= {"use_cpu": True, "report_to": "none", "overwrite_output_dir": True}
    try:
        with hushed():
            get_train_args(parsed)
            get_ray_args(args)
    except Exception as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[-1]
    finally:
        logging.set_verbosity(verbosity)  # the parser raises it
    return None


def unusable(args: Recipe, path: Path, overrides: dict[str, Any]) -> Iterator[ConfigError]:
    """Settings that LLaMA-Factory accepts and that cannot work here, or would be ignored."""

    def error(key: str, what: str, expected: str, do: str) -> ConfigError:
        return ConfigError(what, where=where_of(path, key, overrides), expected=expected, do=do)

    for key, texts in _UNUSABLE.items():
        if args.get(key) and str(args[key]).lower() not in _FALSE:
            yield error(key, *texts)
    tracker = args.get("report_to", "none")
    if str(tracker) not in ("mlflow", "none", "['mlflow']", "['none']"):
        do = "choose one of these; other trackers can read metrics.jsonl in the run's folder"
        yield error("report_to", f"report_to: {tracker!r}", "mlflow or none", do)
    if args.resources.get("GPU", 0) not in (0, 1):
        yield error(
            "resources_per_worker",
            f"resources_per_worker: each worker asks for {args.resources['GPU']!r} GPUs",
            "GPU: 1. A worker trains on one GPU: of two the second is idle, and NCCL refuses two "
            "workers on one",
            "resources_per_worker: {GPU: 1}, and ray_num_workers: the number of GPUs",
        )
    if ignored := [name for name in ignored_by_ray(args) if name not in _DISPLAY]:
        yield error(
            "ray_init_kwargs",
            f"ray_init_kwargs: {', '.join(ignored)} would be ignored",
            "runtime_env.env_vars, the only key that is used",
            "take it out. RAY_ADDRESS names a cluster; packages belong in the nodes' image",
        )
    for name in args.variables:
        reader = next((who for start, who in _READ_EARLIER.items() if name.startswith(start)), "")
        if reader:
            yield error(
                "ray_init_kwargs",
                f"ray_init_kwargs: the variable {name} would have no effect",
                f"a variable that is read during the training; this one is read by {reader}, "
                "before a recipe's variables arrive",
                "take it out, and set it where Ray starts: in the nodes' image, in the variables "
                "of the workspace or job, or in this shell",
            )


def ignored_by_ray(args: Recipe) -> list[str]:
    """The keys of ``ray_init_kwargs`` that have no effect."""
    given = args.get("ray_init_kwargs") or {}
    nested = (f"runtime_env.{n}" for n in given.get("runtime_env") or {} if n != "env_vars")
    return [*(str(name) for name in given if name != "runtime_env"), *nested]
