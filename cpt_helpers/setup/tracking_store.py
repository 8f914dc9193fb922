"""MLflow's store: a database on the storage, or the server that the environment names."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import TrackingError
from ..recipes import Recipe
from ..redact import redact
from ..redirect import hushed
from ..run import Run

MLFLOW_PREFIXES = ("MLFLOW_", "DATABRICKS_")
_UNTRACKED = "train without tracking: OVERRIDES = {'report_to': 'none'}"


def reports(args: Recipe) -> bool:
    """Whether the recipe reports to MLflow."""
    return "mlflow" in str(args.get("report_to"))


def store_of(run: Run, args: Recipe) -> tuple[str, str, dict[str, str]]:
    """The store that records a run.

    Returns:
        The tracking URI, the experiment, and MLflow's variables of the recipe and this process.
        The URI can hold a password: show or record it only after :func:`redact`.

    Raises:
        TrackingError: ``MLFLOW_TRACKING_URI`` is not a valid URI.
    """
    every = args.variables | os.environ
    variables = {name: value for name, value in every.items() if name.startswith(MLFLOW_PREFIXES)}
    uri = variables.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.mlflow_db}"
    if not _is_uri(uri):  # redact() would not find its password
        raise TrackingError(
            "MLFLOW_TRACKING_URI is not a valid URI",
            where="the environment (the value is not shown, it can hold a password)",
            expected="scheme://user:password@host:port with a percent-encoded user and password: "
            "@ is %40, / is %2F, # is %23",
            do="encode them with urllib.parse.quote(password, safe=''), or export "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead",
        )
    return uri, variables.get("MLFLOW_EXPERIMENT_NAME") or "cpt", variables


def ask(run: Run, args: Recipe, timeout: float) -> str:
    """Asks the tracking server whether it answers and accepts this user; writes nothing.

    Raises:
        TrackingError: It does not answer, or refuses the user.
    """
    if not reports(args):
        return "no tracking (report_to: none)"
    uri, experiment, variables = store_of(run, args)
    if uri.startswith("databricks"):
        return _check_databricks(uri, experiment, variables)
    if not uri.startswith("http"):
        return f"MLflow's store {redact(uri)}"
    import requests

    token = variables.get("MLFLOW_TRACKING_TOKEN")
    user = variables.get("MLFLOW_TRACKING_USERNAME")
    login = (user, variables.get("MLFLOW_TRACKING_PASSWORD", "")) if user else None
    try:
        answer = requests.get(
            f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/get-by-name",
            params={"experiment_name": experiment},
            headers={"Authorization": f"Bearer {token}"} if token else {},
            auth=login,
            timeout=timeout,
        )
    except requests.RequestException as error:
        raise no_answer(uri, error) from None
    if answer.status_code in (401, 403):
        given = "one is set" if token or login or "@" in uri else "none is set"
        raise TrackingError(
            f"MLflow's server refused this user ({answer.status_code} {answer.reason})",
            where=uri,
            expected="a token or a user with permission to write to the experiment "
            f"'{experiment}': {given}",
            do="export MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and _PASSWORD; or "
            + _UNTRACKED,
        )
    known = answer.status_code == 200 and "experiment" in answer.text
    new = answer.status_code == 404 and "RESOURCE_DOES_NOT_EXIST" in answer.text
    if not known and not new:
        raise no_answer(uri, OSError(f"{answer.status_code} {answer.reason}, not MLflow's API"))
    return f"MLflow at {redact(uri)}, experiment '{experiment}'" + " (new)" * new


def no_answer(uri: str, error: Exception) -> TrackingError:
    """The error to raise where MLflow failed, with the first line of MLflow's message."""
    return TrackingError(
        f"MLflow's tracking store does not answer: {(str(error).splitlines() or [''])[0][:200]}",
        where=uri,
        expected="a running server, and permission to write to it",
        do="correct MLFLOW_TRACKING_URI, unset it for the embedded store, or " + _UNTRACKED,
    )


def client_of(uri: str) -> Any:
    """MLflow's client for a store; sets the tracking URI of the process too.

    MLflow 3.4.0 searches a run's artifacts by the process's URI, not by the client's.
    """
    import mlflow
    from mlflow.tracking._tracking_service import utils

    # When a run ends, MLflow prints its URL, with the user and the password of the URI.
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    given = os.environ.pop("MLFLOW_TRACKING_URI", None)
    mlflow.set_tracking_uri(uri)
    # MLflow sets the variable too. The next run of this process would read it as the user's.
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    if given is not None:
        os.environ["MLFLOW_TRACKING_URI"] = given
    if is_server(uri):
        return mlflow.MlflowClient(uri)
    # MLflow makes this folder, by default ./mlruns, when it opens a database. It would stay empty:
    # the experiment names its own folder.
    is_sqlite, path = uri.startswith("sqlite:///"), Path(uri.removeprefix("sqlite:///"))
    folder = str(path.parent) if is_sqlite else tempfile.gettempdir()
    utils.DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH = folder
    with hushed():  # it prints its migrations
        client = mlflow.MlflowClient(uri)
        client.search_registered_models(max_results=1)  # opens the registry, which prints too
    return client


def is_server(uri: str) -> bool:
    """Whether a tracking URI names a server, not a database or a folder."""
    return uri.startswith(("http", "databricks"))


def _is_uri(uri: str) -> bool:
    try:
        parts = urlsplit(uri)
        valid_port = parts.port is None or parts.port > 0
    except ValueError:
        return False
    return valid_port and (not parts.netloc or uri.count("@") == parts.netloc.count("@") <= 1)


def _check_databricks(uri: str, experiment: str, variables: dict[str, str]) -> str:
    """Checks the settings that Databricks needs; the server is asked when the run is opened."""
    profile = Path("~/.databrickscfg").expanduser().is_file()
    missing = [n for n in ("DATABRICKS_HOST", "DATABRICKS_TOKEN") if not variables.get(n)]
    if missing and not profile:
        raise TrackingError(
            f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not set, and MLflow "
            "reports to Databricks",
            where=f"MLFLOW_TRACKING_URI={uri}",
            expected="DATABRICKS_HOST=https://…, DATABRICKS_TOKEN=…, or ~/.databrickscfg",
            do="export them before you start; only the driver reads them, and no file holds them",
        )
    if not experiment.startswith("/"):
        raise TrackingError(
            f"'{experiment}' is not the name of an experiment in Databricks",
            where="MLFLOW_EXPERIMENT_NAME",
            expected="a path in the workspace, such as /Users/you@example.com/cpt",
            do="export MLFLOW_EXPERIMENT_NAME=/Users/…/cpt",
        )
    return f"MLflow on Databricks, experiment '{experiment}'"
