"""Recipes: LLaMA-Factory's YAML files, read, and what their keys say.

Every step reads a recipe; :mod:`config` resolves and validates it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .run import PROJECT, Run

DEFAULT_RECIPE = "cpt_cpu.yaml"
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
HELD_OUT = "_heldout"  # the suffix of a corpus's held-out half in the registry


class Recipe(dict[str, Any]):
    """LLaMA-Factory's keys of a recipe, and its defaults where a key is not set.

    A mapping like the YAML file it is read from and written to. What several steps need has a name.
    """

    def __or__(self, other: Any) -> Recipe:
        return Recipe(super().__or__(other))

    @property
    def micro_batch(self) -> int:
        """Blocks that a worker takes at once."""
        return self.get("per_device_train_batch_size", 8)

    @property
    def accumulation(self) -> int:
        """Micro-batches of one optimizer step."""
        return self.get("gradient_accumulation_steps", 1)

    @property
    def workers(self) -> int:
        return self.get("ray_num_workers", 1)

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.get("cutoff_len", 2048)

    @property
    def global_batch(self) -> int:
        """Blocks of one optimizer step, over all workers."""
        return self.micro_batch * self.accumulation * self.workers

    @property
    def max_steps(self) -> int:
        """Optimizer steps; -1 where epochs decide."""
        return self.get("max_steps", -1)

    @property
    def save_steps(self) -> int:
        return self.get("save_steps", 500)

    @property
    def method(self) -> str:
        """``"full"``, ``"freeze"`` or ``"lora"``."""
        return self.get("finetuning_type", "lora")

    @property
    def use_cpu(self) -> bool:
        return bool(self.get("use_cpu"))

    @property
    def precision(self) -> str:
        """The precision of the matrix products."""
        return "bfloat16" if self.get("bf16") else "float16" if self.get("fp16") else "float32"

    @property
    def resources(self) -> dict[str, float]:
        """What each worker asks Ray for."""
        return self.get("resources_per_worker") or {"GPU": 1}

    @property
    def placement_strategy(self) -> str:
        return self.get("placement_strategy", "PACK")

    @property
    def ddp_timeout(self) -> int:
        """Seconds that a collective may take."""
        return self.get("ddp_timeout", 1800)

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables of the workers (``ray_init_kwargs.runtime_env.env_vars``)."""
        environment = (self.get("ray_init_kwargs") or {}).get("runtime_env") or {}
        return {name: str(value) for name, value in (environment.get("env_vars") or {}).items()}

    @property
    def held_out(self) -> dict[str, str]:
        """The roles of the held-out sets: ``{"domain": …, "general": …}`` by registry name.

        The domain is the held-out half of the first corpus trained on; general text is the first
        other set.
        """
        names = names_of(self.get("eval_dataset"))
        own = [name + HELD_OUT for name in names_of(self.get("dataset"))[:1]]
        roles = {"domain": next((n for n in names if n in own), None)}
        roles["general"] = next((n for n in names if n not in own), None)
        return {role: name for role, name in roles.items() if name}

    def with_workers(self, workers: int | None) -> Recipe:
        """The recipe for another number of workers and the same global batch.

        Raises:
            ConfigError: The global batch cannot be divided so.
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
                do="choose one of these; another global batch would be another training",
            )
        return self | {
            "ray_num_workers": workers,
            "per_device_train_batch_size": fitting[0],
            "gradient_accumulation_steps": batch // (fitting[0] * workers),
        }


def read_recipe(train_config: str) -> tuple[Path, Recipe]:
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
            f"the recipe is not YAML: {problem}", where=f"{path}{line}", do="correct that line"
        ) from None
    if not isinstance(recipe, dict):
        raise ConfigError("the recipe has no keys", where=path, expected="`key: value` lines")
    return path.resolve(), Recipe(recipe)


def model_of(train_config: str, overrides: dict[str, Any], storage: Path) -> str:
    """The model a recipe names: an absolute folder, or a name on the Hugging Face hub."""
    path, recipe = read_recipe(train_config)
    merged = recipe | overrides
    if "model_name_or_path" not in merged:
        raise ConfigError("the recipe names no model", where=path, expected="model_name_or_path")
    return str(on_storage(merged["model_name_or_path"], storage, path_like=True))


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


def load(run: Run) -> Recipe:
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
    return Recipe(yaml.safe_load(run.train_yaml.read_text("utf-8")))


def on_storage(value: Any, storage: Path, *, path_like: bool) -> Any:
    """A recipe's ``cluster_storage/…`` as a path of this storage; local model folders absolute."""
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
    """Every key LLaMA-Factory's training takes, with its argparse action."""
    from llamafactory.hparams import parser as hparams
    from transformers import HfArgumentParser

    parser = HfArgumentParser(hparams._TRAIN_ARGS)
    return {action.dest: action for action in parser._actions if action.dest != "help"}


def numbers_as_such(args: dict[str, Any]) -> list[str]:
    """Makes numbers of what YAML reads as text, such as ``1e-4``, and whole numbers of ``4.0``.

    Returns:
        The keys that were text.
    """
    known, changed = known_keys(), []
    for key, value in args.items():
        kind = known[key].type if key in known else None
        if isinstance(value, str) and kind in (int, float):
            args[key] = kind(value)
            changed.append(key)
        elif isinstance(value, float) and kind is int:
            args[key] = int(value)
    return changed


def where_of(path: Path, key: str, overrides: dict[str, Any]) -> str:
    """Where a key was set: ``OVERRIDES``, or the recipe and the line."""
    return f"OVERRIDES: {key}" if key in overrides else f"{path}{line_of(path, key)}"


def line_of(path: Path, key: str) -> str:
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if line.startswith(f"{key}:"):
            return f":{number}"
    return ""


def names_of(value: Any) -> list[str]:
    names = value if isinstance(value, list) else str(value or "").split(",")
    return [name.strip() for name in names if name.strip()]
