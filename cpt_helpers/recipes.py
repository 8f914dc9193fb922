"""Recipes: LLaMA-Factory's YAML files, and the values of their keys.

Every step reads a recipe. The sub-package ``config`` resolves and validates it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from .errors import ConfigError
from .run import PROJECT, Run

DEFAULT_RECIPE = "cpt_cpu.yaml"
RECIPES = PROJECT / "train-configs"
DEEPSPEED_CONFIGS = PROJECT / "deepspeed-configs"
_STORAGE_PREFIXES = ("/mnt/cluster_storage", "cluster_storage")
# Keys that may differ when a run is resumed: where and how it runs, not what it learns. The batch
# sizes may differ if the global batch stays the same.
MAY_CHANGE = frozenset(
    {
        "ray_num_workers", "per_device_train_batch_size", "gradient_accumulation_steps",
        "resources_per_worker", "placement_strategy", "ray_init_kwargs", "ddp_timeout",
        "save_steps", "save_total_limit", "eval_steps", "per_device_eval_batch_size",
        "report_to", "plot_loss", "preprocessing_num_workers", "dataloader_num_workers",
        "overwrite_cache", "disable_gradient_checkpointing", "include_num_input_tokens_seen",
    }
)  # fmt: skip
HELD_OUT = "_heldout"  # the suffix of a corpus's held-out part in the registry
T = TypeVar("T")


class _Key(Generic[T]):
    """A key of a recipe, and LLaMA-Factory's default where it is not set."""

    def __init__(self, name: str, default: T) -> None:
        self.name, self.default = name, default

    def __get__(self, recipe: Recipe, owner: type[Recipe]) -> T:
        return recipe.get(self.name, self.default)


class Recipe(dict[str, Any]):
    """The keys of a recipe as in its YAML file, with names for those that several steps need."""

    micro_batch = _Key("per_device_train_batch_size", 8)  # blocks that a worker computes at once
    accumulation = _Key("gradient_accumulation_steps", 1)  # micro-batches per optimizer step
    workers = _Key("ray_num_workers", 1)
    block_size = _Key("cutoff_len", 2048)  # tokens per block
    max_steps = _Key("max_steps", -1)  # optimizer steps; -1 if the number of epochs decides
    save_steps = _Key("save_steps", 500)
    method = _Key("finetuning_type", "lora")  # "full", "freeze" or "lora"
    placement_strategy = _Key("placement_strategy", "PACK")
    ddp_timeout = _Key("ddp_timeout", 1800)  # seconds until a collective operation fails

    def __or__(self, other: Any) -> Recipe:  # type: ignore[override]  # keeps the class
        return Recipe(super().__or__(other))

    @property
    def global_batch(self) -> int:
        """Blocks per optimizer step, over all workers."""
        return self.micro_batch * self.accumulation * self.workers

    @property
    def use_cpu(self) -> bool:
        return bool(self.get("use_cpu"))

    @property
    def precision(self) -> str:
        """The data type of the matrix products."""
        return "bfloat16" if self.get("bf16") else "float16" if self.get("fp16") else "float32"

    @property
    def resources(self) -> dict[str, float]:
        """Ray resources of each worker."""
        return self.get("resources_per_worker") or {"GPU": 1}

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables of the workers (``ray_init_kwargs.runtime_env.env_vars``)."""
        environment = (self.get("ray_init_kwargs") or {}).get("runtime_env") or {}
        return {name: str(value) for name, value in (environment.get("env_vars") or {}).items()}

    @property
    def held_out(self) -> dict[str, str]:
        """The held-out datasets by role: ``{"domain": …, "general": …}``.

        The domain is the held-out part of the first training corpus. The general text is the first
        other dataset.
        """
        names = names_of(self.get("eval_dataset"))
        domain = [name + HELD_OUT for name in names_of(self.get("dataset"))[:1]]
        roles = {"domain": [name for name in names if name in domain]}
        roles["general"] = [name for name in names if name not in domain]
        return {role: datasets[0] for role, datasets in roles.items() if datasets}

    def with_workers(self, workers: int | None) -> Recipe:
        """Returns the recipe for another number of workers, with the same global batch.

        Raises:
            ConfigError: The global batch cannot be divided by this number.
        """
        if not workers or workers == self.workers:
            return self
        batch = self.global_batch
        fitting = [m for m in range(self.micro_batch, 0, -1) if batch % (m * workers) == 0]
        if workers < 0 or not fitting:
            divisors = [n for n in range(1, batch + 1) if batch % n == 0]
            raise ConfigError(
                f"{workers} workers cannot share a step of {batch} blocks",
                where="ray_num_workers",
                expected=f"a divisor of the global batch: {', '.join(map(str, divisors[:12]))}",
                do="choose one of these, so that the global batch stays the same",
            )
        return self | {
            "ray_num_workers": workers,
            "per_device_train_batch_size": fitting[0],
            "gradient_accumulation_steps": batch // (fitting[0] * workers),
        }


def read_recipe(train_config: str) -> tuple[Path, Recipe]:
    """Reads a recipe, given its file name in ``train-configs/`` or its path.

    Raises:
        ConfigError: The file does not exist, or it is not a YAML mapping.
    """
    import yaml

    given = Path(train_config).expanduser()
    candidates = (given, PROJECT / given, RECIPES / given.name)
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        shipped = [recipe.name for recipe in sorted(RECIPES.glob("*.yaml"))]
        raise ConfigError(
            f"the recipe '{train_config}' does not exist",
            where=given.absolute(),
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
            f"the recipe is not YAML: {problem}", where=f"{path}{line}", do="correct that line"
        ) from None
    if not isinstance(recipe, dict):
        raise ConfigError("the recipe has no keys", where=path, expected="`key: value` lines")
    return path.resolve(), Recipe(recipe)


def model_of(train_config: str, overrides: dict[str, Any], storage: Path) -> str:
    """Returns the model of a recipe: an absolute folder, or a name on the Hugging Face hub."""
    path, recipe = read_recipe(train_config)
    merged = recipe | overrides
    if "model_name_or_path" not in merged:
        raise ConfigError("the recipe names no model", where=path, expected="model_name_or_path")
    return str(on_storage(merged["model_name_or_path"], storage, path_like=True))


def corpus_of(train_config: str, overrides: dict[str, Any]) -> str:
    """Returns the corpus of a recipe, its ``dataset``."""
    path, recipe = read_recipe(train_config)
    names = names_of((recipe | overrides).get("dataset"))
    if not names:
        raise ConfigError("the recipe names no dataset", where=path, expected="`dataset: <name>`")
    if len(names) > 1:
        raise ConfigError(
            f"the recipe names {len(names)} datasets: {', '.join(names)}",
            where=f"{path}{line_of(path, 'dataset')}",
            expected="one corpus, or several with weights",
            do="set CORPUS: " + "{" + ", ".join(f"{n!r}: 1" for n in names) + "}",
        )
    return names[0]


def load(run: Run) -> Recipe:
    """Reads the resolved recipe of a run.

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
    return Recipe(yaml.safe_load(run.train_yaml.read_text("utf-8")))


def on_storage(value: Any, storage: Path, *, path_like: bool) -> Any:
    """Replaces ``cluster_storage/…`` by a path of this storage; makes local folders absolute."""
    if not isinstance(value, str):
        return value
    for prefix in _STORAGE_PREFIXES:
        if value == prefix or value.startswith(prefix + "/"):
            return str(storage / value[len(prefix) :].lstrip("/"))
    if path_like and Path(value).expanduser().is_dir():
        return str(Path(value).expanduser().absolute())
    return value


@cache
def known_keys() -> dict[str, Any]:
    """Returns every key of LLaMA-Factory's training, with its argparse action."""
    from llamafactory.hparams import parser as hparams
    from transformers import HfArgumentParser

    parser = HfArgumentParser(hparams._TRAIN_ARGS)
    return {action.dest: action for action in parser._actions if action.dest != "help"}


def numbers_as_such(args: dict[str, Any]) -> list[str]:
    """Converts text that YAML did not read as a number, such as ``1e-4``, and ``4.0`` to ``4``.

    Returns:
        The keys whose value was text.
    """
    known, changed = known_keys(), []
    for key, value in args.items():
        number = known[key].type if key in known else None
        if isinstance(value, str) and number in (int, float):
            args[key] = number(value)
            changed.append(key)
        elif isinstance(value, float) and number is int:
            args[key] = int(value)
    return changed


def where_of(path: Path, key: str, overrides: dict[str, Any]) -> str:
    """Returns the place that sets a key: ``OVERRIDES``, or file and line of the recipe."""
    return f"OVERRIDES: {key}" if key in overrides else f"{path}{line_of(path, key)}"


def line_of(path: Path, key: str) -> str:
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if line.startswith(f"{key}:"):
            return f":{number}"
    return ""


def names_of(value: Any) -> list[str]:
    names = value if isinstance(value, list) else str(value or "").split(",")
    return [name.strip() for name in names if name.strip()]
