"""GPU nodes: toolkit, compiler, memory and cores, seen on stand-ins for them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import python
from nodes import Node, cluster

from cpt_helpers import recipes
from cpt_helpers.config import node_checks, preflight
from cpt_helpers.config.node_checks import Toolkit

OFFLOAD = str(recipes.DEEPSPEED_CONFIGS / "ds_z3_offload_config.json")
Z3 = str(recipes.DEEPSPEED_CONFIGS / "ds_z3_config.json")
GIB = 2**30
WHOLE = Toolkit("/usr/local/cuda", "12.8", "12.8", "13.3.0", True, False, 200 * GIB)


def program(path: Path, said: str, code: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{said}'\nexit {code}\n")
    path.chmod(0o755)
    return path


def toolkit_at(folder: Path, release: str) -> Path:
    program(folder / "bin" / "nvcc", f"Cuda compilation tools, release {release}, V{release}.61")
    return folder


def test_a_node_with_all_of_it(tmp_path: Path) -> None:
    home = toolkit_at(tmp_path / "cuda", "12.8")
    program(tmp_path / "bin" / "c++", "13.3.0")
    program(tmp_path / "bin" / "ninja", "1.13")
    seen = node_checks.probe({"CUDA_HOME": str(home), "PATH": str(tmp_path / "bin")})
    assert (seen.home, seen.nvcc, seen.compiler) == (str(home), "12.8", "13.3.0")
    assert seen.ninja and not seen.built and seen.memory > GIB
    assert not list(node_checks.faults("node", seen, offload=True, host=1))


def test_where_the_toolkit_is_looked_for(tmp_path: Path) -> None:
    """As torch does: the variable, then the path; a variable without a toolkit helps nobody."""
    home = toolkit_at(tmp_path / "cuda", "12.4")
    on_path = node_checks.probe({"PATH": str(home / "bin")})
    assert (on_path.home, on_path.nvcc) == (str(home), "12.4")
    wrong = node_checks.probe({"PATH": str(home / "bin"), "CUDA_HOME": str(tmp_path / "gone")})
    assert (wrong.home, wrong.nvcc) == (str(tmp_path / "gone"), "")


def test_a_compiler_that_does_not_run(tmp_path: Path) -> None:
    program(tmp_path / "c++", "", code=1)
    seen = node_checks.probe({"PATH": str(tmp_path)})
    assert seen.compiler == "" and not seen.ninja
    named = program(tmp_path / "g++-13", "13.1.0")
    assert node_checks.probe({"PATH": str(tmp_path), "CXX": str(named)}).compiler == "13.1.0"


@pytest.mark.parametrize(
    ("changed", "offload", "said"),
    [
        ({}, True, []),
        ({"nvcc": "12.4"}, True, []),  # DeepSpeed takes minor releases of CUDA 12 together
        ({"nvcc": ""}, False, ["no CUDA toolkit: `import deepspeed` fails"]),
        ({"nvcc": "", "home": ""}, True, ["no CUDA toolkit"]),
        ({"nvcc": "11.8"}, True, ["has CUDA 11.8 and a torch built for CUDA 12.8"]),
        ({"nvcc": "13.0"}, True, ["has CUDA 13.0 and a torch built for CUDA 12.8"]),
        ({"nvcc": "13.0"}, False, []),  # without offloading nothing is compiled
        ({"compiler": ""}, True, ["no C++ compiler"]),
        ({"compiler": "", "ninja": False}, True, ["no C++ compiler (c++, or CXX) and no ninja"]),
        ({"compiler": "", "ninja": False}, False, []),
        ({"compiler": "", "nvcc": "11.8", "built": True}, True, []),
        ({"memory": 64 * GIB}, True, ["110.3 GiB needed, 64.0 GiB there"]),
    ],
)
def test_what_keeps_a_node_from_training(changed: dict, offload: bool, said: list[str]) -> None:
    toolkit = replace(WHOLE, **changed)
    host = int(109.6 * GIB) if offload else 0
    found = list(node_checks.faults("node 7", toolkit, offload=offload, host=host))
    assert len(found) == len(said)
    for error, part in zip(found, said, strict=True):
        assert part in str(error)
        assert "\n  where:" in str(error) and "\n  expected:" in str(error)


def test_deepspeed_needs_a_toolkit_to_be_imported() -> None:
    """Why every GPU node is looked at: with a GPU and no toolkit its import fails."""
    code = """
import torch
torch.cuda.is_available, torch.cuda.device_count = (lambda: True), (lambda: 1)
import deepspeed
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env={"DS_ACCELERATOR": "cuda", "PATH": "/nowhere"},
    )
    assert "MissingCUDAException: CUDA_HOME does not exist" in done.stderr


@pytest.mark.parametrize(
    ("deepspeed", "asked", "cpus", "share"),
    [
        (OFFLOAD, {"GPU": 1}, 26, {"CPU": 13, "GPU": 1}),
        (OFFLOAD, None, 27, {"CPU": 13, "GPU": 1}),
        (OFFLOAD, {"GPU": 1, "CPU": 4}, 26, {"CPU": 4, "GPU": 1}),
        (OFFLOAD, {"GPU": 1, "accelerator_type:L4": 0.001}, 26, None),  # no node has one
        (OFFLOAD, {"GPU": 1}, 1, None),
        (Z3, {"GPU": 1}, 26, None),
        (None, {"GPU": 1}, 26, None),
    ],
)
def test_cores_for_an_optimizer_on_the_host(
    deepspeed: str | None, asked: dict | None, cpus: int, share: dict | None
) -> None:
    node = {"Alive": True, "Resources": {"CPU": cpus, "GPU": 2, "accelerator_type:H100": 1}}
    head = {"Alive": True, "Resources": {"CPU": 4}}
    ray = SimpleNamespace(nodes=lambda: [head, node, node | {"Alive": False}])
    args = recipes.Recipe(deepspeed=deepspeed, resources_per_worker=asked)
    given = preflight.with_cores(ray, args)
    assert given["resources_per_worker"] == (share or asked)
    assert (given is args) == (share is None or asked == share)
    assert preflight.with_cores(ray, args | {"use_cpu": True})["resources_per_worker"] == asked


def test_gpu_nodes_of_a_cluster(tmp_path: Path) -> None:
    """Two nodes that say they have GPUs: one with a toolkit, one without; and Ray's threads."""
    home = toolkit_at(tmp_path / "cuda", "12.8")
    program(tmp_path / "bin" / "c++", "13.3.0")
    bare = {"CUDA_HOME": str(tmp_path / "none"), "CXX": "/bin/false"}
    good = {"CUDA_HOME": str(home), "CXX": str(tmp_path / "bin" / "c++")}
    two = ["--num-gpus", "2"]
    code = f"""
import json, os
from cpt_helpers import recipes
from cpt_helpers.config import node_checks, preflight
from cpt_helpers.setup.cluster import ray_cluster
args = recipes.read_recipe("cpt_1xH100.yaml")[1] | {{"deepspeed": {OFFLOAD!r}}}
args["resources_per_worker"] = {{"GPU": 1}}
with ray_cluster() as ray:
    wider = preflight.placed(ray, args)
    each = wider["resources_per_worker"]
    class Threads:
        def number(self):
            return os.environ["OMP_NUM_THREADS"]
    threads = []
    for cpus in (0, each["CPU"]):
        actor = ray.remote(num_cpus=cpus, num_gpus=1)(Threads).remote()
        threads.append(ray.get(actor.number.remote(), timeout=60))
    found = [[name, said, str(error or "")] for name, said, error in node_checks.look(ray, args)]
    z3 = list(node_checks.look(ray, args | {{"deepspeed": {Z3!r}}}))
print(json.dumps([each, threads, found, [str(error or "") for *_, error in z3]]))
"""
    nodes = Node(4, variables=good, options=two), Node(6, variables=bare, options=two)
    with cluster(1, *nodes) as address:
        each, threads, found, z3 = python(code, RAY_ADDRESS=address)
    assert each == {"CPU": 2, "GPU": 1}
    assert threads == ["1", "2"], "Ray sets OMP_NUM_THREADS to the CPUs that are asked for"
    said = {name: "" for name, *_ in found}
    for name, _, error in found:
        said[name] += error
    second, third = (
        next(text for name, text in said.items() if name.startswith(f"node 127.0.0.{number},"))
        for number in (2, 3)
    )
    assert len(said) == 2, "the head has no GPU"
    assert "110.3 GiB needed" in second and "CUDA toolkit" not in second
    assert "no CUDA toolkit" in third and "no C++ compiler" in third
    assert sorted(map(bool, z3)) == [False, True], "without offloading the toolkit alone counts"
