"""Checks on each node: shared storage, readable files, packages, CUDA toolkit and host memory.

A Ray task on each node looks around and reports; the driver compares the report with its own view.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import importlib.util
import math
import os
import platform
import re
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.corpora import read_registry
from ..errors import AssetError, CptError, DataError, StorageError, UnreadyError
from ..recipes import Recipe, names_of
from ..run import Run
from ..setup import machine
from . import memory, planning
from .findings import Finding, Findings

SECONDS = 32.0  # for a node's answer; a new node first unpacks the files it is sent
OPERATOR = "ops/adam/cpu_adam_op*.so"  # in DeepSpeed's package, if it was compiled beforehand
PACKAGES = (*machine.CORE_PACKAGES, "accelerate", "datasets", "numpy")


def nodes(run: Run, args: Recipe, ray: Any) -> Findings:
    """The findings of every node of the cluster (``cluster.ray_cluster()``)."""
    mark = run.storage / f".preflight-{uuid.uuid4().hex[:12]}"
    mark.write_text("written by the driver\n", "utf-8")
    paths, findings = _files(args), Findings()
    try:
        for name, node, report in _ask(ray, _report, ("CPU", "GPU"), str(mark), paths, PACKAGES):
            errors = [report] if isinstance(report, CptError) else list(
                _node_errors(name, node["NodeID"], mark, report)
            )  # fmt: skip
            findings += [Finding(name, error.what, error) for error in errors]
            if not errors:
                same = f"sees the storage and {len(paths)} paths, and has the same packages"
                findings.append(Finding(name, same))
    finally:
        for file in mark.parent.glob(mark.name + "*"):
            file.unlink(missing_ok=True)
    return Findings([*findings, *(Finding(*finding) for finding in look(ray, args))])


def _ask(
    ray: Any, function: Callable[..., Any], kinds: tuple[str, ...], *arguments: Any
) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Runs a function on each node with one of the resources; yields name, node and answer.

    The answer is an error if the node gives none in time.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task, asked = ray.remote(num_cpus=0, max_retries=0)(function), []
    for node in ray.nodes():
        if node["Alive"] and any(node["Resources"].get(kind) for kind in kinds):
            on_node = task.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            )
            name = f"node {node['NodeManagerAddress']}, {node['NodeID'][:6]}"
            asked.append((name, node, on_node.remote(*arguments)))
    until = time.monotonic() + SECONDS
    for name, node, answer in asked:
        try:
            yield name, node, ray.get(answer, timeout=max(until - time.monotonic(), 0.1))
        except Exception as error:
            late = type(error).__name__ == "GetTimeoutError"
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]
            yield (
                name,
                node,
                UnreadyError(
                    f"{name} gave no answer in {SECONDS:.0f} s"
                    if late
                    else f"{name} cannot run a task of this project: {reason}",
                    where=name,
                    expected="a node that runs Ray tasks and can import cpt_helpers",
                    do="look at the node (`ray status`, its logs), or take it out of the cluster",
                ),
            )


def _report(mark: str, paths: list[str], packages: tuple[str, ...]) -> dict[str, Any]:
    """On a node: the state of the storage, the files and the packages."""
    import ray

    reason = ""
    try:
        Path(f"{mark}-{ray.get_runtime_context().get_node_id()}").write_text("", "utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
    return {
        "host": socket.gethostname(),
        "storage": Path(mark).is_file(),
        "write_error": reason,
        "files": {path: _read_error(Path(path)) for path in paths},
        "packages": versions(packages),
        "variables": {name: value for name, value in os.environ.items() if "RAY_TRAIN" in name},
    }


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Installed releases by name, and Python's; ``"none"`` for a package that is not installed."""
    releases = {"python": platform.python_version()} | dict.fromkeys(packages, "none")
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            releases[name] = importlib.metadata.version(name)
    return releases


def _files(args: Recipe) -> list[str]:
    """The absolute paths that each worker reads."""
    folder = Path(str(args.get("dataset_dir", "data")))
    file = folder / "dataset_info.json"
    registry = read_registry(file) if file.exists() else {}
    paths = [str(args[key]) for key in ("model_name_or_path", "tokenized_path") if args.get(key)]
    for name in (*names_of(args.get("dataset")), *names_of(args.get("eval_dataset"))):
        if data := registry.get(name, {}).get("file_name"):
            paths.append(str(folder / data))
    return [path for path in dict.fromkeys(paths) if Path(path).is_absolute()]


def _read_error(path: Path) -> str:
    """The error of reading a file or folder; empty if it can be read."""
    try:
        if path.is_dir():
            next(path.iterdir(), None)
        else:
            with path.open("rb") as file:
                file.read(1)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _node_errors(name: str, node: str, mark: Path, report: dict[str, Any]) -> Iterator[CptError]:
    """The errors of one node's report."""
    host = report["host"]
    written = Path(f"{mark}-{node}").is_file()
    if not (report["storage"] and written):
        reason = f" sees the storage and cannot write to it: {report['write_error']}"
        other = " has another folder at the storage's path"
        yield StorageError(
            name + (reason if report["storage"] and report["write_error"] else other),
            where=f"{mark.parent} on {host}",
            expected="one folder for all nodes, such as /mnt/cluster_storage or an NFS mount",
            do="mount the shared storage there on every node, or give another with STORAGE",
        )
    for path, reason in report["files"].items():
        if reason:
            readable = not _read_error(Path(path))
            yield DataError(
                f"{name} cannot read a file that the workers need: {reason}",
                where=f"{path} on {host}" + (" (the driver can)" if readable else ""),
                expected="the model, the corpus and the blocks on storage that every node shares",
                do="put them on the shared storage"
                if readable
                else "run notebooks 01 and 02 for it",
            )
    here, there = versions(PACKAGES), report["packages"]
    differ = [f"{key} {there[key]} (here {here[key]})" for key in here if here[key] != there[key]]
    if differ:
        yield UnreadyError(
            f"{name} has other releases than the driver: {', '.join(differ)}",
            where=f"{name}, host {host}",
            expected="the same packages everywhere",
            do="one image for all nodes, or requirements.txt installed on each",
        )
    try:
        require_first_ray_train(report["variables"], f"{name}, host {host}")
    except UnreadyError as error:
        yield error


def require_first_ray_train(variables: Mapping[str, str], where: str = "this process") -> str:
    """Refuses Ray Train's second implementation, whose restarts and reports differ.

    Raises:
        UnreadyError: ``RAY_TRAIN_V2_ENABLED`` in a process's variables selects it.
    """
    value = variables.get("RAY_TRAIN_V2_ENABLED", "")
    if value == "1" or value.lower() == "true":  # as Ray reads it
        raise UnreadyError(
            f"RAY_TRAIN_V2_ENABLED={value} selects Ray Train's second implementation",
            where=where,
            expected="the first one: restarts and checkpoints are made for it",
            do="unset RAY_TRAIN_V2_ENABLED, also in the variables of the workspace, job or image, "
            "and start Python or the notebook's kernel again",
        )
    return "the first implementation"


@dataclass(frozen=True)
class Toolkit:
    """The tools of a node that compile DeepSpeed's operators."""

    home: str  # the CUDA toolkit's folder; empty without one
    nvcc: str  # the release of its ``nvcc``, such as ``"12.8"``; empty if that does not run
    torch: str  # the CUDA release of torch; empty for a torch without CUDA
    compiler: str  # the version of the C++ compiler; empty if none runs
    ninja: bool  # whether ninja is on the path
    built: bool  # whether DeepSpeed's CPU Adam was compiled beforehand
    memory: int  # bytes of the node's memory, or of its container's limit


def look(ray: Any, args: Recipe) -> Iterator[tuple[str, str, CptError | None]]:
    """Checks toolkit and memory of each GPU node, for a recipe that trains there with DeepSpeed.

    Yields:
        The node's name, the result, and the error.
    """
    if args.use_cpu or not args.get("deepspeed"):
        return
    zero, host = memory.settings_of(args), 0
    answers = list(_ask(ray, probe, ("GPU",)))
    if answers and (zero.offload_optimizer or zero.offload_parameters):
        with contextlib.suppress(AssetError):  # a missing model is a finding of its own
            host = memory.of_worker(args, planning.shape_of(args)).host
    for name, node, toolkit in answers:
        workers = args.workers
        if "SPREAD" in args.placement_strategy:
            workers = math.ceil(workers / len(answers))
        workers = min(workers, int(node["Resources"]["GPU"]))
        offload = zero.offload_optimizer
        errors: list[CptError] = [toolkit] if isinstance(toolkit, CptError) else []
        if not errors:
            errors += faults(name, toolkit, offload=offload, workers=workers, host=host)
        for error in errors:
            yield name, error.what, error
        if not errors:
            offloading = " and the tools and memory for offloading" * offload
            yield name, f"has the CUDA toolkit {toolkit.nvcc}{offloading}", None


def faults(
    name: str, toolkit: Toolkit, *, offload: bool, workers: int = 1, host: int = 0
) -> Iterator[UnreadyError]:
    """Reasons why a GPU node cannot train with DeepSpeed 0.16.9.

    ``offload`` tells whether the optimizer runs on the host, where each worker has ``host`` bytes.
    """
    nvcc = f"{toolkit.home}/bin/nvcc"
    if not toolkit.nvcc:
        yield UnreadyError(
            f"{name} has no CUDA toolkit: `import deepspeed` fails there",
            where=nvcc if toolkit.home else "CUDA_HOME, PATH, /usr/local/cuda",
            expected=f"nvcc of CUDA {toolkit.torch}".rstrip(),
            do="an image with the CUDA toolkit (…-devel), and CUDA_HOME set to its folder",
        )
    missing = [*["C++ compiler (c++, or CXX)"] * (not toolkit.compiler)]
    missing += ["ninja on the PATH"] * (not toolkit.ninja)
    compiles = offload and not toolkit.built  # at the first start
    if compiles and missing:
        yield UnreadyError(
            f"{name} cannot compile DeepSpeed's CPU Adam: it has no {' and no '.join(missing)}",
            where="the PATH of Ray's processes on that node",
            expected="g++ and ninja, which compile the optimizer at the start of offloading",
            do="install them in the nodes' image, or set offload_optimizer to none",
        )
    releases = toolkit.nvcc, toolkit.torch
    if compiles and all(releases) and not _compatible(*releases):
        yield UnreadyError(
            f"{name} has CUDA {toolkit.nvcc} and a torch built for CUDA {toolkit.torch}: "
            "DeepSpeed does not compile its CPU Adam with them",
            where=nvcc,
            expected=f"a CUDA toolkit of release {toolkit.torch}",
            do="an image with that toolkit, a torch built for this one, "
            "or DS_SKIP_CUDA_CHECK=1 on the nodes at your own risk",
        )
    need = workers * (host + memory.LIBRARIES)
    if host and need > toolkit.memory:
        yield UnreadyError(
            f"{name} has too little memory for offloading: {machine.format_bytes(need)} needed, "
            f"{machine.format_bytes(toolkit.memory)} there",
            where=f"{workers} worker{'s' * (workers > 1)} of the node, by the plan",
            expected="memory for weights, gradients and optimizer states of all its workers",
            do="a node with more memory, more nodes, or finetuning_type: freeze or lora "
            "without offloading",
        )


def _compatible(nvcc: str, torch: str) -> bool:
    """DeepSpeed's rule (``assert_no_cuda_mismatch``), with the releases of its own table."""
    if nvcc == torch or os.environ.get("DS_SKIP_CUDA_CHECK") == "1":
        return True
    source = _package("deepspeed") / "ops" / "op_builder" / "builder.py"
    table = re.search(r"cuda_minor_mismatch_ok = (\{.*?\n\})", source.read_text("utf-8"), re.DOTALL)
    alike = ast.literal_eval(table[1]) if table else {}
    return {nvcc, torch} <= set(alike.get(int(nvcc.split(".")[0]), ()))


def _package(name: str) -> Path:
    """A package's folder, without an import: DeepSpeed's fails without a toolkit."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else Path(name)


def probe(variables: Mapping[str, str] | None = None) -> Toolkit:
    """The tools of the node it runs on; ``variables`` is by default the process's environment."""
    from ray._common.utils import get_system_memory

    variables = os.environ if variables is None else variables
    path = variables.get("PATH", "")
    # As torch finds the toolkit (torch.utils.cpp_extension, which takes seconds to import).
    home = variables.get("CUDA_HOME") or variables.get("CUDA_PATH")
    if not home and (nvcc := shutil.which("nvcc", path=path)):
        home = str(Path(nvcc).parent.parent)
    home = home or ("/usr/local/cuda" if Path("/usr/local/cuda").exists() else "")
    compiler = shutil.which(variables.get("CXX", "c++"), path=path)
    version = (_package("torch") / "version.py").read_text("utf-8")
    return Toolkit(
        home=home,
        nvcc=_first(r"release (\d+\.\d+)", _output(f"{home}/bin/nvcc", "-V") if home else ""),
        torch=_first(r"(?m)^cuda\b.*= '(\d+\.\d+)", version),
        compiler=_output(compiler, "-dumpfullversion", "-dumpversion") if compiler else "",
        ninja=bool(shutil.which("ninja", path=path)),
        built=any(_package("deepspeed").glob(OPERATOR)),
        memory=get_system_memory(),
    )


def _first(pattern: str, text: str) -> str:
    return next(iter(re.findall(pattern, text)), "")


def _output(*command: str) -> str:
    """A command's output; empty if the command fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
