"""MLflow's model registry: an exported model as a version, with where it comes from."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from . import tracking
from .errors import TrackingError
from .models import weights_sha256
from .run import PROJECT, Run
from .variables import worker_environment


def register(
    run: Run, args: dict[str, Any], exported: dict[str, Any], name: str = ""
) -> int | None:
    """Makes the exported model a version in MLflow's registry, with where it comes from.

    By reference: the version names the folder and the sha256 of its weights. A copy would take
    gigabytes through the tracking server for each version, and servers load from the storage.

    Args:
        run: Whose.
        args: Its resolved recipe.
        exported: As for :func:`tracking.add_export`; ``path`` and ``perplexity`` are looked at.
        name: The model's name in the registry; default the run's.

    Returns:
        The version; that of the same weights in the same folder is not made twice. ``None`` where
        the recipe reports to nothing of MLflow's.

    Raises:
        TrackingError: MLflow does not answer, or does not know the run.
    """
    if "mlflow" not in str(args.get("report_to")):
        return None
    from mlflow.exceptions import MlflowException

    uri, name = worker_environment(run, args)["MLFLOW_TRACKING_URI"], name or run.name
    client, found = tracking.known_run(run, uri)
    tags = _lineage(run, args, exported)
    try:
        with suppress(MlflowException):  # it is there already
            client.create_registered_model(name)
        for known in client.search_model_versions(f"name = '{name}'"):
            if all(known.tags.get(key) == tags[key] for key in ("cpt.path", "cpt.weights")):
                return int(known.version)
        # A server takes no path as a source; the run's artifacts hold export.json, which has it.
        source = f"runs:/{found.info.run_id}/export.json"
        made = client.create_model_version(name, source, found.info.run_id, tags=tags)
    except Exception as error:
        raise tracking.no_answer(uri, error) from None
    return int(made.version)


def registered(uri: str, name: str, version: int | None = None) -> tuple[Path, dict[str, str]]:
    """A model of MLflow's registry: the folder it lies in, and where it comes from.

    Args:
        uri: The tracking server, or the embedded store, ``sqlite:///<storage>/mlflow/mlflow.db``.
        name: The model's name in the registry.
        version: Which; default the newest.

    Returns:
        The folder, whose weights are the registered ones, and the version's tags.

    Raises:
        TrackingError: MLflow does not answer, knows no such model, or the folder does not hold
            these weights any more.
    """
    try:
        found = tracking.client_of(uri).search_model_versions(f"name = '{name}'")
    except Exception as error:
        raise tracking.no_answer(uri, error) from None
    versions = {int(one.version): one for one in found if "cpt.path" in one.tags}
    chosen = versions.get(max(versions, default=0) if version is None else version)
    if chosen is None:
        raise TrackingError(
            f"MLflow's registry has no model '{name}'"
            + (f", version {version}" if version else ""),
            where=uri.split("@")[-1],
            expected=f"one of the versions {sorted(versions)}"
            if versions
            else "a registered model",
            do="run notebook 06_export, or model_registry.register, again",
        )
    folder = Path(chosen.tags["cpt.path"])
    if weights_sha256(folder) != chosen.tags["cpt.weights"]:
        raise TrackingError(
            f"'{name}' version {chosen.version} is not what was registered any more",
            where=folder,
            expected=f"a folder whose weights have the sha256 {chosen.tags['cpt.weights'][:12]}…",
            do="export the run again and register that, or take another version",
        )
    return folder, dict(chosen.tags)


def _lineage(run: Run, args: dict[str, Any], exported: dict[str, Any]) -> dict[str, str]:
    """Where a model comes from and what it came to, as tags: MLflow's values are short strings."""
    step = run.step_json("03_config")
    recipe = json.loads(step.read_text("utf-8"))["parameters"] if step.is_file() else {}
    tags = {
        "path": exported["path"],
        "weights": weights_sha256(Path(exported["path"])),
        "run": run.name,
        "recipe": recipe.get("TRAIN_CONFIG", run.train_yaml),
        "base_model": args["model_name_or_path"],
        "code": _code_version(),
        "data": args["dataset"],
    }
    for name in str(args["dataset"]).split(","):
        corpus = run.storage / "corpora" / name / "corpus.json"
        if corpus.is_file():
            kept = json.loads(corpus.read_text("utf-8"))["sha256"]
            tags[f"data.{name}.sha256"] = kept
    for role, value in exported.get("perplexity", {}).items():
        tags[f"perplexity.{role}"] = value
    return {f"cpt.{key}": str(value)[:5000] for key, value in tags.items()}


def _code_version() -> str:
    """The commit this package is at, marked where files differ from it, else its release."""
    git = ["git", "-C", str(PROJECT)]
    with suppress(OSError, subprocess.CalledProcessError):
        if (PROJECT / ".git").exists():
            ask_git = partial(subprocess.run, capture_output=True, text=True, check=True)
            commit = ask_git([*git, "rev-parse", "HEAD"]).stdout.strip()
            return commit + " with changes" * bool(ask_git([*git, "status", "--short"]).stdout)
    with suppress(importlib.metadata.PackageNotFoundError):
        return f"cpt-helpers {importlib.metadata.version('cpt-helpers')}"
    return "unknown"
