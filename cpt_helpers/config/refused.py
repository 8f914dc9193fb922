"""Settings that LLaMA-Factory accepts and that cannot serve here, or would be ignored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError, UnreadyError
from ..recipes import Recipe, where_of

# Values that LLaMA-Factory takes and that cannot serve here: what is wrong with them, what serves.
_UNUSABLE: dict[str, tuple[str, str, str]] = {
    "save_only_model": (
        "save_only_model leaves nothing to resume from",
        "checkpoints with the optimizer's state",
        "leave it out; save_total_limit bounds the disk, and step 6 exports the model",
    ),
    "save_on_each_node": (
        "save_on_each_node: one worker of each node would write the same files on shared storage",
        "one writer",
        "leave it out: all nodes see the storage",
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
        "a folder that every node sees",
        "leave it out, and give the folder with STORAGE",
    ),
}


# Variables of a recipe reach a worker before torch is imported and the process group is made, but
# after its process started. The table says by the start of a name who has read it before.
_READ_EARLIER = {
    "LD_": "the dynamic loader, when the process starts",
    "PYTHON": "Python, when the process starts",
    "MALLOC_": "the C library, when the process starts",
    "GLIBC_": "the C library, when the process starts",
    "RAY_": "Ray, when its processes start",
    "OPENBLAS_": "OpenBLAS, when Ray imports NumPy",
    "CUDA_VISIBLE_DEVICES": "Ray, which sets it to the worker's own GPUs",
}
# Of ``ray_init_kwargs``: what only changes what Ray prints or shows. Ignoring it harms nothing.
_DISPLAY = frozenset(
    {"log_to_driver", "logging_level", "logging_format", "logging_config", "configure_logging",
     "include_dashboard", "dashboard_host", "dashboard_port", "ignore_reinit_error"}
)  # fmt: skip


def problems(args: Recipe, path: Path, overrides: dict[str, Any]) -> Iterator[ConfigError]:
    """Every such setting of a recipe.

    Args:
        args: The recipe's keys with their values.
        path: Its file.
        overrides: Those keys that do not come from the file.
    """
    for key, (what, expected, do) in _UNUSABLE.items():
        if args.get(key) and str(args[key]).lower() not in ("false", "no", "f", "n", "0"):
            where = where_of(path, key, overrides)
            yield ConfigError(what, where=where, expected=expected, do=do)
    if str(args.get("report_to", "none")) not in ("mlflow", "none", "['mlflow']", "['none']"):
        yield ConfigError(
            f"report_to: {args['report_to']!r}",
            where=where_of(path, "report_to", overrides),
            expected="mlflow or none",
            do="choose one of these; metrics.jsonl in the run's folder serves other trackers",
        )
    yield from _resources(args, where_of(path, "resources_per_worker", overrides))
    yield from _ray_init(args, where_of(path, "ray_init_kwargs", overrides))


def _resources(args: Recipe, where: str) -> Iterator[ConfigError]:
    asked = args.get("resources_per_worker")
    if asked and asked.get("GPU", 0) not in (0, 1):
        yield ConfigError(
            f"resources_per_worker: each worker asks for {asked['GPU']!r} GPUs",
            where=where,
            expected="GPU: 1. A worker trains on one GPU: of two the second is idle, and NCCL "
            "refuses two workers on one",
            do="resources_per_worker: {GPU: 1}, and ray_num_workers: the number of GPUs",
        )


def _ray_init(args: Recipe, where: str) -> Iterator[ConfigError]:
    ignored = [name for name in ignored_by_ray(args) if name not in _DISPLAY]
    if ignored:
        yield ConfigError(
            f"ray_init_kwargs: {', '.join(ignored)} would be ignored",
            where=where,
            expected="runtime_env.env_vars, the only key that is used",
            do="take it out. RAY_ADDRESS names a cluster; packages belong in the nodes' image",
        )
    for name in args.variables:
        readers = [who for start, who in _READ_EARLIER.items() if name.startswith(start)]
        if readers:
            yield ConfigError(
                f"ray_init_kwargs: the variable {name} would have no effect",
                where=where,
                expected=f"a variable that is read during the training; this one is read by "
                f"{readers[0]}, before a recipe's variables arrive",
                do="take it out, and set it where Ray is started: in the nodes' image, in the "
                "workspace's or job's variables, or in this shell",
            )


def ignored_by_ray(args: Recipe) -> list[str]:
    """The keys of ``ray_init_kwargs`` that nothing reads; the cluster is joined without them."""
    given = args.get("ray_init_kwargs") or {}
    environment = given.get("runtime_env") or {}
    own = [str(name) for name in given if name != "runtime_env"]
    return own + [f"runtime_env.{name}" for name in environment if name != "env_vars"]


def require_first_ray_train(environment: Mapping[str, str], where: str = "this process") -> str:
    """Refuses Ray Train's second implementation, which has another restart and reporting.

    Args:
        environment: The variables of a process.
        where: That process, in words.

    Raises:
        UnreadyError: ``RAY_TRAIN_V2_ENABLED`` turns it on.
    """
    value = environment.get("RAY_TRAIN_V2_ENABLED", "")
    if value == "1" or value.lower() == "true":  # as Ray reads it
        raise UnreadyError(
            f"RAY_TRAIN_V2_ENABLED={value} selects Ray Train's second implementation",
            where=where,
            expected="the first one: restarts and checkpoints are made for it",
            do="unset RAY_TRAIN_V2_ENABLED, also in the variables of the workspace, job or image, "
            "and start Python or the notebook's kernel again",
        )
    return "the first implementation"
