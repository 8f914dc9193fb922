"""GPU nodes: the CUDA toolkit that DeepSpeed asks for, and what offloading takes of the host."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import AssetError, CptError, UnreadyError
from ..recipes import Recipe
from ..setup import machine
from . import forecast, memory

SECONDS = 32.0  # for a node's answer; a fresh one unpacks what it is sent first
OPERATOR = "ops/adam/cpu_adam_op*.so"  # in DeepSpeed's package, where it was built beforehand


@dataclass(frozen=True)
class Toolkit:
    """What a node has to compile DeepSpeed's operators with.

    Attributes:
        home: The CUDA toolkit's folder; empty where there is none.
        nvcc: Its release, such as ``"12.8"``; empty where its ``nvcc`` does not run.
        torch: The CUDA release torch was built for; empty for a torch without CUDA.
        compiler: The C++ compiler's version; empty where none runs.
        ninja: Whether its command is on the path.
        built: Whether DeepSpeed's CPU Adam was compiled beforehand.
        memory: The node's, in bytes; its container's, where that has a limit.
    """

    home: str
    nvcc: str
    torch: str
    compiler: str
    ninja: bool
    built: bool
    memory: int


def with_cores(ray: Any, args: Recipe) -> Recipe:
    """A recipe whose workers have cores for an optimizer that runs on the host.

    Ray (2.48.0) sets ``OMP_NUM_THREADS`` to the CPUs a worker asks for, and to 1 where it asks for
    none, as LLaMA-Factory's GPU recipes do. DeepSpeed's CPU Adam would step on one core. So each
    worker asks for its GPU's share of the node.

    Returns:
        ``args`` itself where nothing is offloaded, or where the recipe names CPUs.
    """
    asked = dict(args.resources)
    if args.use_cpu or "CPU" in asked or not memory.settings_of(args, 1).offload_optimizer:
        return args
    shares = [
        int(node["Resources"].get("CPU", 0) // node["Resources"]["GPU"])
        for node in ray.nodes()
        if node["Alive"] and all(node["Resources"].get(k, 0) >= n for k, n in asked.items())
    ]
    share = min(shares, default=0)
    return args | {"resources_per_worker": {"CPU": share} | asked} if share else args


def look(ray: Any, args: Recipe) -> Iterator[tuple[str, str, CptError | None]]:
    """Each GPU node's toolkit and memory, for a recipe that trains there with DeepSpeed.

    Yields:
        The node's name, what was found, and what is wrong with it.
    """
    if args.use_cpu or not args.get("deepspeed"):
        return
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(probe)
    asked = {}
    for node in ray.nodes():
        if node["Alive"] and node["Resources"].get("GPU"):
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            name = f"node {node['NodeManagerAddress']}, {node['NodeID'][:6]}"
            asked[name] = (node, task.options(scheduling_strategy=there).remote())
    zero = memory.settings_of(args, 1)
    offload, host = zero.offload_optimizer, 0
    if asked and (offload or zero.offload_parameters):
        with contextlib.suppress(AssetError):  # a model that is not there is a finding of its own
            host = memory.of_worker(args, forecast.shape_of(args)).host
    until = time.monotonic() + SECONDS
    for name, (node, answer) in asked.items():
        try:
            toolkit = ray.get(answer, timeout=max(until - time.monotonic(), 0.1))
        except Exception as error:
            yield name, "cannot be used", _no_answer(name, error)
            continue
        here = _workers_there(args, node["Resources"]["GPU"], len(asked))
        wrong = list(faults(name, toolkit, offload=offload, workers=here, host=host))
        for error in wrong:
            yield name, error.what, error
        if not wrong:
            said = f"has the CUDA toolkit {toolkit.nvcc}"
            yield name, said + " and what offloading takes" * offload, None


def _no_answer(name: str, error: Exception) -> UnreadyError:
    said = str(error).strip().splitlines() or [type(error).__name__]
    return UnreadyError(
        f"{name} did not say what it has: {said[-1][:200]}",
        where=name,
        expected=f"an answer in {SECONDS:.0f} s",
        do="look at the node (`ray status`, its logs), or take it out of the cluster",
    )


def _workers_there(args: Recipe, gpus: float, nodes: int) -> int:
    """The most workers that come to one node."""
    workers = args.workers
    if "SPREAD" in args.placement_strategy:
        workers = math.ceil(workers / nodes)
    return min(workers, int(gpus))


def faults(
    name: str, toolkit: Toolkit, *, offload: bool, workers: int = 1, host: int = 0
) -> Iterator[UnreadyError]:
    """What keeps a GPU node from training with DeepSpeed 0.16.9.

    Args:
        name: The node's, for messages.
        toolkit: What was found there.
        offload: Whether the optimizer runs on the host.
        workers: How many train there.
        host: What each keeps in the host's memory, in bytes.
    """
    if not toolkit.nvcc:
        yield UnreadyError(
            f"{name} has no CUDA toolkit: `import deepspeed` fails there",
            where=f"{toolkit.home}/bin/nvcc"
            if toolkit.home
            else "CUDA_HOME, PATH, /usr/local/cuda",
            expected=f"nvcc of CUDA {toolkit.torch}".rstrip(),
            do="an image with the CUDA toolkit (…-devel), and CUDA_HOME set to its folder",
        )
    if offload and not toolkit.built:
        yield from _cannot_compile(name, toolkit)
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


def _cannot_compile(name: str, toolkit: Toolkit) -> Iterator[UnreadyError]:
    """Why DeepSpeed's CPU Adam, which it compiles at the first start, would not compile."""
    lacking = [*["C++ compiler (c++, or CXX)"] * (not toolkit.compiler)]
    lacking += ["ninja on the PATH"] * (not toolkit.ninja)
    if lacking:
        yield UnreadyError(
            f"{name} cannot compile DeepSpeed's CPU Adam: it has no {' and no '.join(lacking)}",
            where="the PATH of Ray's processes on that node",
            expected="g++ and ninja, with which offloading builds the optimizer at its start",
            do="install them in the nodes' image, or set offload_optimizer to none",
        )
    if toolkit.nvcc and toolkit.torch and not _go_together(toolkit.nvcc, toolkit.torch):
        yield UnreadyError(
            f"{name} has CUDA {toolkit.nvcc} and a torch built for CUDA {toolkit.torch}: "
            "DeepSpeed does not compile its CPU Adam with them",
            where=f"{toolkit.home}/bin/nvcc",
            expected=f"a CUDA toolkit of release {toolkit.torch}",
            do="an image with that toolkit, a torch built for this one, "
            "or DS_SKIP_CUDA_CHECK=1 on the nodes at your own risk",
        )


def _go_together(nvcc: str, torch: str) -> bool:
    """DeepSpeed's own rule (``assert_no_cuda_mismatch``), by its own table of releases."""
    if nvcc == torch or os.environ.get("DS_SKIP_CUDA_CHECK") == "1":
        return True
    source = _package("deepspeed") / "ops" / "op_builder" / "builder.py"
    table = re.search(r"cuda_minor_mismatch_ok = (\{.*?\n\})", source.read_text("utf-8"), re.DOTALL)
    alike = ast.literal_eval(table[1]) if table else {}
    return {nvcc, torch} <= set(alike.get(int(nvcc.split(".")[0]), ()))


def _package(name: str) -> Path:
    """A package's folder, without importing it: DeepSpeed cannot be without a toolkit."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else Path(name)


def probe(variables: Mapping[str, str] | None = None) -> Toolkit:
    """Looks at the node it runs on.

    Args:
        variables: Its environment; by default the process's.
    """
    from ray._common.utils import get_system_memory

    variables = os.environ if variables is None else variables
    path = variables.get("PATH", "")
    home = _cuda_home(variables, path)
    release = re.search(r"release (\d+\.\d+)", _said([f"{home}/bin/nvcc", "-V"])) if home else None
    compiler = shutil.which(variables.get("CXX", "c++"), path=path)
    version = _said([compiler, "-dumpfullversion", "-dumpversion"]) if compiler else ""
    built_for = re.search(
        r"^cuda\b.*= '(\d+\.\d+)", (_package("torch") / "version.py").read_text("utf-8"), re.M
    )
    return Toolkit(
        home=home,
        nvcc=release[1] if release else "",
        torch=built_for[1] if built_for else "",
        compiler=version.strip(),
        ninja=bool(shutil.which("ninja", path=path)),
        built=any(_package("deepspeed").glob(OPERATOR)),
        memory=get_system_memory(),
    )


def _cuda_home(variables: Mapping[str, str], path: str) -> str:
    """Where torch looks for the toolkit (``torch.utils.cpp_extension``, seconds to import)."""
    named = variables.get("CUDA_HOME") or variables.get("CUDA_PATH")
    if named:
        return named
    if nvcc := shutil.which("nvcc", path=path):
        return str(Path(nvcc).parent.parent)
    return "/usr/local/cuda" if Path("/usr/local/cuda").exists() else ""


def _said(command: list[str]) -> str:
    """A command's output; empty where it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout
