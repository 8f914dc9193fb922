"""MLflow's store: an embedded one on the storage, or the server that the environment names."""

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

OF_MLFLOW = ("MLFLOW_", "DATABRICKS_")


def reports(args: Recipe) -> bool:
    """Whether the recipe reports to MLflow."""
    return "mlflow" in str(args.get("report_to"))


def store_of(run: Run, args: Recipe) -> tuple[str, str, dict[str, str]]:
    """Where a run is recorded.

    Returns:
        The tracking URI, the experiment, and MLflow's variables of the recipe and this process.
        The URI can hold a password: only :func:`redact` makes it fit to be shown or recorded.

    Raises:
        TrackingError: ``MLFLOW_TRACKING_URI`` is no valid URI.
    """
    every = args.variables | os.environ
    variables = {name: value for name, value in every.items() if name.startswith(OF_MLFLOW)}
    uri = variables.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.mlflow_db}"
    if not _is_uri(uri):  # its password could not be told from the rest, and would be shown
        raise TrackingError(
            "MLFLOW_TRACKING_URI is not a valid URI",
            where="the environment (the value is not shown, it can hold a password)",
            expected="scheme://user:password@host:port with a percent-encoded user and password: "
            "@ is %40, / is %2F, # is %23",
            do="encode them with urllib.parse.quote(password, safe=''), or export "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead",
        )
    return uri, variables.get("MLFLOW_EXPERIMENT_NAME") or "cpt", variables


def _is_uri(uri: str) -> bool:
    try:
        parts = urlsplit(uri)
        valid_port = parts.port is None or parts.port > 0
    except ValueError:
        return False
    return valid_port and (not parts.netloc or uri.count("@") == parts.netloc.count("@") <= 1)


def ask(run: Run, args: Recipe, timeout: float) -> str:
    """Asks the tracking server whether it answers and accepts this user; writes nothing.

    Raises:
        TrackingError: It does not answer, or refuses.
    """
    if not reports(args):
        return "nothing is reported (report_to: none)"
    uri, experiment, variables = store_of(run, args)
    if uri.startswith("databricks"):
        return _ask_databricks(uri, experiment, variables)
    if not uri.startswith("http"):
        return f"MLflow's store {redact(uri)}"
    import requests

    token = variables.get("MLFLOW_TRACKING_TOKEN")
    user = variables.get("MLFLOW_TRACKING_USERNAME")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    login = (user, variables.get("MLFLOW_TRACKING_PASSWORD", "")) if user else None
    try:
        answer = requests.get(
            f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/get-by-name",
            params={"experiment_name": experiment},
            headers=headers,
            auth=login,
            timeout=timeout,
        )
    except requests.RequestException as error:
        raise no_answer(uri, error) from None
    if answer.status_code in (401, 403):
        given = token or login or "@" in uri
        raise TrackingError(
            f"MLflow's server refused this user ({answer.status_code} {answer.reason})",
            where=uri,
            expected="a token or a user with permission to write to the experiment "
            f"'{experiment}': " + ("one is set" if given else "none is set"),
            do="export MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and _PASSWORD; or train "
            "without tracking: OVERRIDES = {'report_to': 'none'}",
        )
    known = answer.status_code == 200 and "experiment" in answer.text
    absent = answer.status_code == 404 and "RESOURCE_DOES_NOT_EXIST" in answer.text
    if not known and not absent:
        raise no_answer(uri, OSError(f"{answer.status_code} {answer.reason}, not MLflow's API"))
    return f"MLflow at {redact(uri)}, experiment '{experiment}'" + " (new)" * absent


def _ask_databricks(uri: str, experiment: str, variables: dict[str, str]) -> str:
    """Checks the settings that Databricks needs; its server is asked when the run is opened."""
    profile = Path("~/.databrickscfg").expanduser().is_file()
    lacking = [n for n in ("DATABRICKS_HOST", "DATABRICKS_TOKEN") if not variables.get(n)]
    if lacking and not profile:
        raise TrackingError(
            f"{' and '.join(lacking)} {'are' if len(lacking) > 1 else 'is'} not set, and MLflow "
            "reports to Databricks",
            where=f"MLFLOW_TRACKING_URI={uri}",
            expected="DATABRICKS_HOST=https://…, DATABRICKS_TOKEN=…, or ~/.databrickscfg",
            do="export them before you start; the driver reads them there and writes them nowhere",
        )
    if not experiment.startswith("/"):
        raise TrackingError(
            f"'{experiment}' is not the name of an experiment in Databricks",
            where="MLFLOW_EXPERIMENT_NAME",
            expected="a path in the workspace, such as /Users/you@example.com/cpt",
            do="export MLFLOW_EXPERIMENT_NAME=/Users/…/cpt",
        )
    return f"MLflow on Databricks, experiment '{experiment}'"


def no_answer(uri: str, error: Exception) -> TrackingError:
    """The error to raise where MLflow failed: the first line of its own message."""
    return TrackingError(
        f"MLflow's tracking store does not answer: {(str(error).splitlines() or [''])[0][:200]}",
        where=uri,
        expected="a running server, and permission to write to it",
        do="correct MLFLOW_TRACKING_URI, unset it for the embedded store, or train without "
        "tracking: OVERRIDES = {'report_to': 'none'}",
    )


def client_of(uri: str) -> Any:
    """MLflow's client for a store; the URI of the process is set to it too.

    MLflow 3.4.0 looks for a run's artifacts by the process's URI, not by the client's. When it
    opens a database it makes ``./mlruns`` and prints the migrations, in each process again.
    """
    import mlflow
    from mlflow.tracking._tracking_service import utils

    # When a run ends, MLflow prints its URL, with the user and the password of the URI.
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    given = os.environ.pop("MLFLOW_TRACKING_URI", None)
    mlflow.set_tracking_uri(uri)
    # MLflow sets the variable too, and the next run of this process would take it for the user's.
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    if given is not None:
        os.environ["MLFLOW_TRACKING_URI"] = given
    if is_server(uri):
        return mlflow.MlflowClient(uri)
    own, path = uri.startswith("sqlite:///"), Path(uri.removeprefix("sqlite:///"))
    # A folder that exists anyway, in place of ./mlruns; our experiment names its own.
    utils.DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH = str(path.parent if own else tempfile.gettempdir())
    with hushed():
        client = mlflow.MlflowClient(uri)
        client.search_registered_models(max_results=1)  # the registry opens it by itself
    return client


def is_server(uri: str) -> bool:
    """Whether a tracking URI names a server, not a database or a folder."""
    return uri.startswith(("http", "databricks"))
