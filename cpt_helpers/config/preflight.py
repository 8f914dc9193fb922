"""Looks before anything is launched: can this recipe run here, on every node that will run it?

What the driver sees says little: a Ray task on each node looks at the storage, the data and the
packages from there. Each finding says what to do.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..data.corpora import read_registry
from ..errors import AssetError, CptError, DataError, StorageError, UnreadyError
from ..recipes import Recipe, names_of
from ..run import Run
from ..setup import cluster, machine, models, tracking_store
from . import advice, forecast, node_checks, planning, refused
from .findings import Finding
from .findings import raise_if_wrong as raise_if_wrong
from .findings import table as table
from .findings import warned as warned

_SECONDS = 8.0  # for an answer from a node, a hub or a server
PACKAGES = (*machine.CORE_PACKAGES, "accelerate", "datasets", "numpy")


def before_launch(run: Run, args: Recipe) -> None:
    """Prints the warnings about a run's recipe; refuses a process that cannot train it.

    A training that has no recipe of its own, such as the demonstration of step 5, has no warnings.

    Raises:
        UnreadyError: The environment selects another Ray Train.
    """
    if run.train_yaml.is_file():
        for finding in warned(advice.warnings(args, run.train_yaml)):
            print(finding)
    refused.require_first_ray_train(os.environ)


def look(run: Run, args: Recipe, ray: Any, *, wait: bool = False) -> list[Finding]:
    """All there is to see of a resolved recipe from here and from every node.

    Args:
        run: Whose storage is used.
        args: The resolved recipe.
        ray: The cluster (``cluster.ray_cluster()``).
        wait: Whether to wait for nodes that the cluster may start on demand.
    """
    return [
        *_seen("Ray Train", lambda: refused.require_first_ray_train(os.environ)),
        *_seen("model", lambda: model(args)),
        *_seen("disk", lambda: room(run, args)),
        *_seen("tracking", lambda: server(run, args)),
        *_seen("placement", lambda: placement(ray, args, wait=wait)),
        *_seen("memory", lambda: enough_memory(ray, args)),
        *nodes(run, args, ray),
    ]


def _seen(subject: str, look: Callable[[], str]) -> Iterator[Finding]:
    try:
        yield Finding(subject, look())
    except CptError as error:
        yield Finding(subject, error.what, error)


def model(args: Recipe) -> str:
    """The model, in a folder or on the hub; a gated one with the token there is.

    Raises:
        AssetError: It is not there, not complete, or not for this token.
    """
    name = str(args["model_name_or_path"])
    folder = Path(name)
    if folder.is_absolute():
        return _model_folder(folder)
    return models.ask_hub(name)


def _model_folder(folder: Path) -> str:
    if not (folder / "config.json").is_file():
        raise AssetError(
            "the model is not there" if not folder.exists() else "the folder holds no model",
            where=folder,
            expected="a Hugging Face folder: config.json, safetensors, a tokenizer",
            do="run notebook 01_setup with this recipe, or correct model_name_or_path",
        )
    if not any(folder.glob("*.safetensors")):
        raise AssetError(
            "the model's folder holds no safetensors",
            where=folder,
            expected="*.safetensors: pickled weights can run code when they are loaded",
            do="save it again with save_pretrained(safe_serialization=True)",
        )
    return f"{folder}"


def server(run: Run, args: Recipe) -> str:
    """The tracking server, asked without writing anything to it.

    Raises:
        TrackingError: It does not answer, or not to this user.
    """
    return tracking_store.ask(run, args, _SECONDS)


def placement(ray: Any, args: Recipe, *, wait: bool = False) -> str:
    """Whether the cluster has room for the workers, and the labels that they ask for.

    Raises:
        UnreadyError: It has not; with the labels that its nodes have.
    """
    workers, each, strategy = _asked(args)
    asked = f"{workers} workers with {', '.join(f'{n:g} {kind}' for kind, n in each.items())} each"
    try:
        cluster.require_workers(ray, workers, each, strategy=strategy, wait=wait)
    except UnreadyError:
        if not wait and cluster.grows():
            return f"{asked}: not now, and this cluster starts nodes when they are asked for"
        if unknown := _labels_nobody_has(ray, each):
            raise unknown from None
        raise
    return asked


def _asked(args: Recipe) -> tuple[int, dict[str, float], str]:
    """Workers, what each asks for, and how they are placed."""
    each = {kind: float(n) for kind, n in args.resources.items()}
    return args.workers, each, args.placement_strategy


def fits(ray: Any, args: Recipe) -> bool:
    """Whether the nodes that are alive have room for the workers, whatever runs on them now."""
    workers, each, strategy = _asked(args)
    return cluster.fitting_workers(ray, each, strategy) >= workers


def _labels_nobody_has(ray: Any, each: dict[str, float]) -> UnreadyError | None:
    """The error for a resource that no node offers, such as a misspelt ``accelerator_type``."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    offered = {name for resources in nodes for name in resources}
    own = ("CPU", "GPU", "memory", "object_store_memory")
    wanted = [name for name in each if name not in own and name not in offered]
    if not wanted:
        return None
    labels = sorted(n for n in offered if n not in own and not n.startswith("node:"))
    gpus = sum(resources.get("GPU", 0) for resources in nodes)
    return UnreadyError(
        f"the workers cannot be placed: no node offers {', '.join(wanted)}",
        where=f"resources_per_worker; the Ray cluster has {gpus:g} GPU on {len(nodes)} "
        f"node{'s' * (len(nodes) > 1)}",
        expected=f"labels that nodes have: {', '.join(labels) or 'they have none'}",
        do="correct the label, or take it out: GPU: 1 alone takes any GPU. Ray itself gives only "
        "the model's name, such as accelerator_type:A100, whatever its memory",
    )


def placed(ray: Any, args: Recipe) -> Recipe:
    """Waits for room for the workers; gives an offloaded optimizer its cores.

    Returns:
        The recipe to launch.

    Raises:
        UnreadyError: There is no room.
    """
    placement(ray, args, wait=True)  # nodes that start on demand are there after it
    wider = node_checks.with_cores(ray, args)
    if wider is not args:
        placement(ray, wider, wait=True)
    return wider


def enough_memory(ray: Any, args: Recipe) -> str:
    """Each worker's peak, as planned, against the GPUs or the memory that the cluster has.

    Raises:
        UnreadyError: It is more.
        AssetError: The model's configuration cannot be had.
    """
    shape = forecast.shape_of(args)
    each = forecast.memory.of_worker(args, shape).peak
    workers, said = args.workers, f"{machine.format_bytes(each)} a worker"
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if args.use_cpu:
        have = sum(r.get("memory", 0) + r.get("object_store_memory", 0) for r in resources)
        if workers * each > have:
            raise UnreadyError(
                f"{workers} workers need {said} at the peak, by the plan",
                where=f"the Ray cluster has {machine.format_bytes(have)} on {len(resources)} nodes",
                expected="memory for all of them",
                do="smaller blocks or fewer at once (per_device_train_batch_size, cutoff_len), "
                "gradient checkpointing, a higher ZeRO stage, or more nodes",
            )
        return f"{said} of {machine.format_bytes(have)} in the cluster"
    kinds = {forecast.gpu_of(Recipe(resources_per_worker=r)) for r in resources if r.get("GPU")}
    for kind in filter(None, kinds):
        tried = forecast.fits(args, shape, kind)
        # Ray labels an A100 of 80 GB as it labels one of 40 GB.
        either = kind == "A100-40G" and any("accelerator_type:A100" in r for r in resources)
        if not tried[0].fits and either and forecast.fits(args, shape, "A100-80G")[0].fits:
            return f"{said}, by the plan; fits on an A100 of 80 GB, not on one of 40 GB"
        if not tried[0].fits:
            changes = " + ".join(fit.change for fit in tried[1:])
            raise UnreadyError(
                f"the recipe does not fit on an {kind}: {said} at the peak, by the plan",
                where=f"{kind}, {machine.format_bytes(tried[0].capacity)}",
                expected="a GPU with room for it, or a smaller recipe",
                do=f"OVERRIDES with {changes}" if tried[-1].fits else "more workers, larger GPUs",
            )
    return f"{said}, by the plan" + (f"; fits on {', '.join(filter(None, kinds))}" if kinds else "")


def nodes(run: Run, args: Recipe, ray: Any) -> list[Finding]:
    """What a task on each node sees: the storage, the files a worker opens, the packages."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    mark = run.storage / f".preflight-{uuid.uuid4().hex[:12]}"
    mark.write_text("the driver was here\n", "utf-8")
    paths = _files(args)
    task = ray.remote(num_cpus=0, max_retries=0)(_look)
    asked = {}
    for node in ray.nodes():
        if node["Alive"] and (node["Resources"].get("CPU") or node["Resources"].get("GPU")):
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            name = f"node {node['NodeManagerAddress']}, {node['NodeID'][:6]}"
            asked[name] = task.options(scheduling_strategy=there).remote(
                str(mark), paths, PACKAGES, node["NodeID"]
            )
    seen: dict[str, dict[str, Any]] = {}
    findings = []
    try:
        until = time.monotonic() + 4 * _SECONDS  # a fresh node unpacks what it is sent first
        for name, answer in asked.items():
            try:
                seen[name] = ray.get(answer, timeout=max(until - time.monotonic(), 0.1))
            except Exception as error:
                findings.append(Finding(name, "cannot be used", _unusable(name, error)))
        here = {"packages": versions(PACKAGES), "python": platform.python_version()}
        for name, there in seen.items():
            wrong = [*_storage_of(name, mark, there), *_files_of(name, there, paths)]
            wrong += _packages_of(name, here, there)
            wrong += _ray_train_of(name, there)
            findings += [Finding(name, error.what, error) for error in wrong]
            if not wrong:
                said = f"sees the storage and {len(paths)} paths, and has the same packages"
                findings.append(Finding(name, said))
    finally:
        for left in mark.parent.glob(mark.name + "*"):
            left.unlink(missing_ok=True)
    return findings + [Finding(*found) for found in node_checks.look(ray, args)]


def _look(mark: str, paths: list[str], packages: tuple[str, ...], node: str) -> dict[str, Any]:
    """On a node: what is there of the storage, the files and the packages."""
    own = Path(f"{mark}-{node}")
    try:
        written, reason = bool(own.write_text(node, "utf-8")), ""
    except OSError as error:
        written, reason = False, error.strerror or str(error)
    return {
        "host": socket.gethostname(),
        "storage": Path(mark).is_file(),
        "written": written,
        "reason": reason,
        "files": {path: _why_unreadable(Path(path)) for path in paths},
        "packages": versions(packages),
        "python": platform.python_version(),
        "variables": {name: value for name, value in os.environ.items() if "RAY_TRAIN" in name},
    }


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Installed releases by name; ``"none"`` where there is none."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def _files(args: Recipe) -> list[str]:
    """What each worker opens."""
    folder = Path(str(args.get("dataset_dir", "data")))
    file = folder / "dataset_info.json"
    registry = read_registry(file) if file.exists() else {}
    paths = [str(args[key]) for key in ("model_name_or_path", "tokenized_path") if args.get(key)]
    for name in (*names_of(args.get("dataset")), *names_of(args.get("eval_dataset"))):
        file = registry.get(name, {}).get("file_name")
        if file:
            paths.append(str(folder / file))
    return [path for path in dict.fromkeys(paths) if Path(path).is_absolute()]


def _why_unreadable(path: Path) -> str:
    """Why a file or folder cannot be read; empty where it can."""
    try:
        if path.is_dir():
            next(path.iterdir(), None)
        else:
            with path.open("rb") as file:
                file.read(1)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _unusable(name: str, error: Exception) -> UnreadyError:
    said = str(error).strip().splitlines() or [type(error).__name__]
    late = type(error).__name__ == "GetTimeoutError"
    return UnreadyError(
        f"{name} gave no answer in {4 * _SECONDS:.0f} s"
        if late
        else f"{name} cannot run a task of this project: {said[-1][:200]}",
        where=name,
        expected="a node that runs Ray tasks and can import cpt_helpers",
        do="look at the node (`ray status`, its logs), or take it out of the cluster",
    )


def _storage_of(name: str, mark: Path, there: dict[str, Any]) -> Iterator[CptError]:
    own = next((p for p in mark.parent.glob(mark.name + "-*") if _written_by(p, name)), None)
    if there["storage"] and there["written"] and own:
        return
    if there["storage"] and not there["written"]:
        what = f"{name} sees the storage and cannot write to it: {there['reason']}"
    else:
        what = f"{name} has another folder at the place of the storage"
    yield StorageError(
        what,
        where=f"{mark.parent} on {there['host']}",
        expected="one folder that all nodes share, such as /mnt/cluster_storage or an NFS mount",
        do="mount the shared storage there on every node, or give another with STORAGE",
    )


def _written_by(path: Path, name: str) -> bool:
    return path.name.split("-")[-1].startswith(name.rsplit(" ", 1)[-1])


def _files_of(name: str, there: dict[str, Any], paths: list[str]) -> Iterator[CptError]:
    lacking = {path: why for path, why in there["files"].items() if why}
    for path, why in lacking.items():
        here = not _why_unreadable(Path(path))
        yield DataError(
            f"{name} cannot read what the workers need: {why}",
            where=f"{path} on {there['host']}" + (" (the driver can)" if here else ""),
            expected="the model, the data and what was tokenised on storage that every node sees",
            do="put them on the shared storage" if here else "run notebooks 01 and 02 for it",
        )


def _packages_of(name: str, here: dict[str, Any], there: dict[str, Any]) -> Iterator[CptError]:
    own = {"python": here["python"], **here["packages"]}
    other = {"python": there["python"], **there["packages"]}
    differ = [f"{key} {other[key]} (here {own[key]})" for key in own if own[key] != other[key]]
    if differ:
        yield UnreadyError(
            f"{name} has other releases than the driver: {', '.join(differ)}",
            where=f"{name}, host {there['host']}",
            expected="the same packages everywhere",
            do="one image for all nodes, or requirements.txt installed on each",
        )


def _ray_train_of(name: str, there: dict[str, Any]) -> Iterator[CptError]:
    try:
        refused.require_first_ray_train(there["variables"], f"{name}, host {there['host']}")
    except UnreadyError as error:
        yield error


def room(run: Run, args: Recipe) -> str:
    """The disk, against what the run will write; what is there already is counted.

    Raises:
        StorageError: There is too little room.
    """
    need = _disk(run, args)
    have = run.checkpoint_bytes() / 2**30
    said = f"; {have:.3g} GiB of it are there" if have else ""
    machine.require_room(run.storage, max(need.total - have, 0.0), need.in_words() + said)
    return f"room for {need.in_words()}"


def _disk(run: Run, args: Recipe) -> planning.Disk:
    """The plan's figures; where the run was not planned, from its model."""
    plan = run.results().get("plan", {})
    if "disk" in plan:
        return planning.Disk(**plan["disk"])
    size = forecast.shape_of(args).size
    steps = args.max_steps
    if steps < 1:  # epochs, of a corpus whose blocks were not counted: what is there at once
        steps = ((args.get("save_total_limit") or 0) + 2) * max(args.save_steps, 1)
    return planning.disk(args, size, steps)
