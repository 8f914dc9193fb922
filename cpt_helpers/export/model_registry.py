"""Records an export: the model card, the MLflow run, and a version in MLflow's model registry."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .. import recipes
from ..errors import TrackingError
from ..recipes import Recipe
from ..run import PROJECT, Run
from ..setup import tracking_store
from ..setup.models import weights_sha256
from ..train import tracking
from . import model_card


@dataclass(frozen=True)
class Publication:
    """The model card, and the model's name and version in MLflow's registry, if it is there."""

    card: Path
    model: str
    version: int | None

    def __repr__(self) -> str:
        version = f"{self.model}, version {self.version}" if self.version else "not registered"
        return f"model card: {self.card}\nMLflow's model registry: {version}"


def publish(run: Run, exported: dict[str, Any]) -> Publication:
    """Writes the model card, and records the export in MLflow's run and model registry.

    Args:
        run: The run that was exported.
        exported: From :meth:`huggingface.Export.as_dict`.

    Raises:
        TrackingError: MLflow does not answer, or does not know the run.
    """
    recipe = recipes.load(run)
    card = model_card.write(run, Path(exported["path"]), exported)
    tracking.add_export(run, recipe, exported)
    return Publication(card, run.name, register(run, recipe, exported))


def register(run: Run, args: Recipe, exported: dict[str, Any], name: str = "") -> int | None:
    """Registers the exported model as a version in MLflow's registry, with its lineage.

    The version refers to the folder and to the sha256 of its weights. The weights are not copied
    to the tracking server, since model servers load them from the storage.

    Args:
        run: The run that was exported.
        args: Its resolved recipe.
        exported: As for :func:`publish`; ``path`` and ``perplexity`` are used.
        name: The model's name in the registry; default the run's name.

    Returns:
        The version. The same weights in the same folder keep their version. ``None`` where the
        recipe does not report to MLflow.
    """
    if not tracking_store.reports(args):
        return None
    from mlflow.exceptions import MlflowException

    uri, name = tracking_store.store_of(run, args)[0], name or run.name
    client, mlflow_run = tracking.known_run(run, uri)
    tags = _lineage(run, args, exported)
    try:
        with suppress(MlflowException):  # it exists
            client.create_registered_model(name)
        for known in client.search_model_versions(f"name = '{name}'"):
            if all(known.tags.get(key) == tags[key] for key in ("cpt.path", "cpt.weights")):
                return int(known.version)
        # A server accepts no path as a source. The run's artifact export.json holds the path.
        source = f"runs:/{mlflow_run.info.run_id}/export.json"
        made = client.create_model_version(name, source, mlflow_run.info.run_id, tags=tags)
    except Exception as error:
        raise tracking_store.no_answer(uri, error) from None
    return int(made.version)


def registered(uri: str, name: str, version: int | None = None) -> tuple[Path, dict[str, str]]:
    """Finds a model in MLflow's registry and verifies its weights.

    Args:
        uri: The tracking server, or the embedded store, ``sqlite:///<storage>/mlflow/mlflow.db``.
        name: The model's name in the registry.
        version: The version; default the newest.

    Returns:
        The folder with the registered weights, and the tags of the version (its lineage).

    Raises:
        TrackingError: MLflow does not answer, knows no such model, or the weights in the folder
            have changed.
    """
    try:
        found = tracking_store.client_of(uri).search_model_versions(f"name = '{name}'")
    except Exception as error:
        raise tracking_store.no_answer(uri, error) from None
    versions = {int(one.version): one for one in found if "cpt.path" in one.tags}
    chosen = versions.get(max(versions, default=0) if version is None else version)
    if chosen is None:
        raise TrackingError(
            f"MLflow's registry has no model '{name}'" + f", version {version}" * bool(version),
            where=uri,
            expected=f"a registered model; the known versions are {sorted(versions)}",
            do="run notebook 06_export again",
        )
    folder = Path(chosen.tags["cpt.path"])
    if weights_sha256(folder) != chosen.tags["cpt.weights"]:
        raise TrackingError(
            f"the folder of '{name}' version {chosen.version} no longer holds the registered "
            "weights",
            where=folder,
            expected=f"weights with the sha256 {chosen.tags['cpt.weights'][:12]}…",
            do="export the run again and register it, or use another version",
        )
    return folder, dict(chosen.tags)


def _lineage(run: Run, args: Recipe, exported: dict[str, Any]) -> dict[str, str]:
    """The model's sources and perplexities as tags, whose values are short strings."""
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
            tags[f"data.{name}.sha256"] = json.loads(corpus.read_text("utf-8"))["sha256"]
    for role, value in exported.get("perplexity", {}).items():
        tags[f"perplexity.{role}"] = value
    return {f"cpt.{key}": str(value)[:5000] for key, value in tags.items()}


def _code_version() -> str:
    """The commit of this package, with a mark for uncommitted changes; else its release."""
    git = ["git", "-C", str(PROJECT)]
    with suppress(OSError, subprocess.CalledProcessError):
        if (PROJECT / ".git").exists():
            ask_git = partial(subprocess.run, capture_output=True, text=True, check=True)
            commit = ask_git([*git, "rev-parse", "HEAD"]).stdout.strip()
            return commit + " with changes" * bool(ask_git([*git, "status", "--short"]).stdout)
    with suppress(importlib.metadata.PackageNotFoundError):
        return f"cpt-helpers {importlib.metadata.version('cpt-helpers')}"
    return "unknown"
