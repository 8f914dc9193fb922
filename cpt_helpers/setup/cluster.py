"""The Ray cluster: connect to it or start one here, list its nodes, place the workers."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import display
from ..errors import UnreadyError
from ..run import PROJECT
from .machine import kept_memory

if TYPE_CHECKING:
    from pandas import DataFrame

# Settings of a Ray (2.48.0) that is started here. Tokenizers warn of each fork unless told; the
# workers read blocks that are tokenised already. Ray starts a process per core and ends those that
# are idle for a second, just before a training asks for them. Its agent inspects every process each
# five seconds for a dashboard that is off, which takes 5 % of a core.
_LOCAL_RAY = {
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
}


@contextmanager
def ray_cluster() -> Iterator[Any]:
    """The Ray cluster that ``RAY_ADDRESS`` names; without it, one on this machine.

    In an Anyscale workspace or job it is that workspace's cluster. A cluster that is started here
    ends with the ``with`` block. One that exists already keeps running. An existing connection of
    the process is used as it is. Remote workers receive this package.

    Raises:
        UnreadyError: ``RAY_ADDRESS`` names a cluster that does not answer.
    """
    import ray

    if ray.is_initialized():
        yield ray
        return
    address = _address()
    _require_answer(address)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    variables: dict[str, str] = {}
    if address == "local":
        options |= {"include_dashboard": False, "num_cpus": os.cpu_count()}
        # With a runtime environment, Ray would not use the processes that it has started already.
        variables = _LOCAL_RAY | kept_memory()
    else:
        options["runtime_env"] = {"py_modules": [str(PROJECT / "cpt_helpers")]}
    try:
        with _default_variables(variables):
            ray.init(address, **options)
    except (ConnectionError, RuntimeError) as error:
        raise _no_answer(address, str(error).splitlines()[0]) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def list_nodes(ray: Any) -> DataFrame:
    """The cluster's nodes and what each offers to workers."""
    units = {"CPU": 1, "GPU": 1, "memory": 2**30}
    rows = [
        [node["NodeManagerAddress"]]
        + [f"{node['Resources'].get(name, 0) / unit:.0f}" for name, unit in units.items()]
        for node in _live_nodes(ray)
    ]
    return display.table(rows, columns=["node", "CPUs", "GPUs", "memory for workers (GiB)"])


def require_workers(
    ray: Any, workers: int, each: dict[str, float], *, strategy: str = "PACK", wait: bool = True
) -> None:
    """Raises where the workers of a training cannot be placed, instead of waiting for ever.

    A busy cluster, or one that starts nodes on demand (:func:`grows`), is asked to place them. The
    wait lasts up to ``CPT_PLACEMENT_TIMEOUT`` seconds (default 900).

    Args:
        ray: The cluster.
        workers: The number of workers.
        each: The resources of each, by Ray's names.
        strategy: ``placement_strategy``; the strict ones want one node, or one node per worker.
        wait: Whether to wait at all.

    Raises:
        UnreadyError: With the resources that were asked for and those of the cluster.
    """
    total, free = ray.cluster_resources(), ray.available_resources()
    fitting = fitting_workers(ray, each, strategy)
    busy = fitting >= workers and any(free.get(k, 0) < n * workers for k, n in each.items())
    if fitting >= workers and not busy:
        return
    seconds = placement_timeout(900.0 if grows() or busy else 0.0)
    timeout = seconds if wait and (busy or _address() != "local") else 0.0
    if timeout and _can_be_placed(ray, workers, each, strategy, timeout):
        return
    has, nodes = _resources_in_words({name: total.get(name, 0) for name in each}), _live_nodes(ray)
    has += f" on {len(nodes)} node{'s' * (len(nodes) > 1)}"
    if strategy.startswith("STRICT"):
        has += f", placement_strategy {strategy}"
    reason = f"room for {fitting}"
    fix = f"OVERRIDES = {{'ray_num_workers': {max(fitting, 1)}}}, a smaller "
    fix += "resources_per_worker, or a larger cluster"
    if busy:
        has += f"; free: {_resources_in_words({name: free.get(name, 0) for name in each})}"
        reason, fix = "other jobs use the cluster", "wait for them, or stop them (`ray list jobs`)"
    raise UnreadyError(
        f"{workers} workers with {_resources_in_words(each)} each cannot be placed"
        + f", after {timeout:.0f} s" * bool(timeout)
        + f": {reason}",
        where=f"the Ray cluster has {has}",
        expected=f"room for ray_num_workers: {workers}",
        do=fix,
    )


def fitting_workers(ray: Any, each: dict[str, float], strategy: str = "PACK") -> int:
    """The number of workers that fit on the live nodes, busy or not."""
    nodes = [node["Resources"] for node in _live_nodes(ray)]
    per_node = [min(int(n.get(k, 0) / need) for k, need in each.items() if need) for n in nodes]
    if strategy == "STRICT_PACK":
        return max(per_node, default=0)
    if strategy == "STRICT_SPREAD":
        return sum(count > 0 for count in per_node)
    return sum(per_node)


def placement_timeout(default: float = 900.0) -> float:
    """Seconds to wait for the placement of workers (``CPT_PLACEMENT_TIMEOUT``)."""
    return float(os.environ.get("CPT_PLACEMENT_TIMEOUT", default))


def grows() -> bool:
    """Whether the cluster starts nodes on demand (Anyscale, Kubernetes, ``ray up``)."""
    marks = ("ANYSCALE_", "KUBERNETES_SERVICE_HOST")
    return _address() != "local" and (
        any(name.startswith(marks) for name in os.environ)
        or Path("~/ray_bootstrap_config.yaml").expanduser().is_file()
    )


def _address() -> str:
    """Ray's address: the environment's, the surrounding Anyscale cluster's, or this machine's."""
    on_anyscale = any(name.startswith("ANYSCALE_") for name in os.environ)
    return os.environ.get("RAY_ADDRESS") or ("auto" if on_anyscale else "local")


def _require_answer(address: str) -> None:
    """Raises at once where nothing listens; Ray itself retries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # "local" or "auto"
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise _no_answer(address, str(error)) from None


def _no_answer(address: str, reason: str) -> UnreadyError:
    return UnreadyError(
        f"the Ray cluster does not answer: {reason}",
        where=f"RAY_ADDRESS={address}",
        expected="the address of a running Ray cluster",
        do="start it, correct RAY_ADDRESS, or unset it to train on this machine",
    )


@contextmanager
def _default_variables(defaults: dict[str, str]) -> Iterator[None]:
    """Environment variables for processes started in the block, where the user has set none."""
    added = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _can_be_placed(
    ray: Any, workers: int, each: dict[str, float], strategy: str, timeout: float
) -> bool:
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group([dict(each)] * workers, strategy=strategy)
    try:
        ray.get(group.ready(), timeout=timeout)
    except ray.exceptions.GetTimeoutError:
        return False
    finally:
        remove_placement_group(group)
    return True


def _live_nodes(ray: Any) -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _resources_in_words(resources: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
