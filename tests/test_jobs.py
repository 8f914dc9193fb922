"""The files of job-configs/: each read by what will read it, as far as one machine goes.

The Ray job is submitted to a cluster and trains. The Anyscale job goes through Anyscale's own
configuration class, the Kubernetes manifest through an extract of KubeRay's schema, the image's
packages through a resolver that finds the image's torch there already.

The extract is made again, when the manifest comes to use more of the schema, by
``python tests/test_jobs.py ray.io_rayjobs.yaml RELEASE COMMIT``.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen

import psutil
import pytest
import yaml

from cpt_helpers import redact
from cpt_helpers.__main__ import parser
from cpt_helpers.run import PROJECT

JOBS = PROJECT / "job-configs"
SCHEMA = Path(__file__).with_name("kuberay_rayjob_schema.json")
BIN = Path(sys.executable).parent
ANYSCALE = "anyscale==0.26.112"  # wants other releases than the lock's: it lives apart
IMAGE = "anyscale/ray-llm:2.48.0-py311-cu128"
FILES = sorted(path for path in JOBS.iterdir() if path.is_file())


def uv(*arguments: str | Path) -> subprocess.CompletedProcess:
    """uv, with the folder of wheels that pip knows by itself; a failure is shown whole."""
    links = os.environ.get("PIP_FIND_LINKS")
    found = ["--find-links", links] if links and arguments[0] == "pip" else []
    command = [shutil.which("uv") or BIN / "uv", *arguments, *found]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done


# What every file says


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_says_what_it_is_and_what_to_fill_in(path: Path) -> None:
    text = path.read_text("utf-8")
    assert text.startswith("# ") and "To fill in" in text
    assert not re.search(r"<your|<[a-z_-]+>", text), "a placeholder"
    assert not redact.has_token(text)
    assert all(len(line) <= 100 for line in text.splitlines())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_files_it_names_exist(path: Path) -> None:
    named = re.findall(
        r"(?:job|train|deepspeed|dataset)-configs/[\w.-]*\w", path.read_text("utf-8")
    )
    assert [name for name in named if not (PROJECT / name).exists()] == []


def entrypoints() -> dict[str, list[str]]:
    """Each file's command of this project, as its reader will start it."""
    anyscale = yaml.safe_load((JOBS / "anyscale_job.yaml").read_text())["entrypoint"]
    kuberay = manifest()["spec"]["entrypoint"]
    ray = ray_command()
    return {
        "anyscale_job.yaml": shlex.split(anyscale),
        "kuberay_rayjob.yaml": shlex.split(kuberay),
        "ray_job.yaml": ray[ray.index("--") + 1 :],
    }


@pytest.mark.parametrize("name", ["anyscale_job.yaml", "kuberay_rayjob.yaml", "ray_job.yaml"])
def test_its_command_is_one_of_ours(name: str) -> None:
    python, m, module, *arguments = entrypoints()[name]
    assert (python, m, module) == ("python", "-m", "cpt_helpers")
    given = parser().parse_args(arguments)
    assert given.command == "run" and given.run == "gemma3_4b_full_cpt"
    assert yaml.safe_load(given.parameters) == {"KILL": False}, "a job demonstrates nothing"
    recipe = yaml.safe_load((PROJECT / given.config).read_text("utf-8"))
    overrides = yaml.safe_load(given.overrides or "{}")
    assert set(overrides) <= set(recipe), "an override of what the recipe does not say"
    each = (recipe | overrides)["resources_per_worker"]
    assert each["GPU"] == 1
    assert any(kind.startswith("anyscale/") for kind in each) == (name == "anyscale_job.yaml")


def test_the_same_is_left_out_of_every_upload() -> None:
    anyscale = yaml.safe_load((JOBS / "anyscale_job.yaml").read_text())["excludes"]
    assert anyscale == yaml.safe_load((JOBS / "ray_job.yaml").read_text())["excludes"]


# Anyscale


@pytest.fixture(scope="module")
def anyscale(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with Anyscale's client, in an environment of its own."""
    home = tmp_path_factory.mktemp("anyscale") / "v"
    uv("venv", "-q", "--python", sys.executable, home)
    python = home / "bin" / "python"
    uv("pip", "install", "-q", "--python", python, ANYSCALE)
    return python


def test_anyscale_reads_its_job(anyscale: Path, tmp_path: Path) -> None:
    """Offline and without an account; each change for the worse is refused, so that it can fail."""
    job = yaml.safe_load((JOBS / "anyscale_job.yaml").read_text())
    worse = {
        "max_retry": job | {"max_retry": 1},
        "min_node": copy.deepcopy(job),
        "timeout_s": job | {"timeout_s": "four hours"},
        "env_vars": job | {"env_vars": {"PYTHONUNBUFFERED": 1}},
    }
    worse["min_node"]["compute_config"]["worker_nodes"][0]["min_node"] = 1
    for name, changed in worse.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(changed))
    code = f"""
import json
from pathlib import Path
from anyscale.commands.job_commands import submit
from anyscale.job.models import JobConfig
from anyscale.utils.runtime_env import parse_requirements_file
said = {{}}
for path in Path({str(tmp_path)!r}).glob("*.yaml"):
    try:
        JobConfig.from_yaml(str(path))
    except (TypeError, ValueError) as error:
        said[path.stem] = str(error)
job = JobConfig.from_yaml("job-configs/anyscale_job.yaml")
options = [option for parameter in submit.params for option in parameter.opts]
print(json.dumps([job.to_dict(), said, options, parse_requirements_file(job.requirements)]))
"""
    done = subprocess.run(
        [anyscale, "-W", "ignore", "-c", code], cwd=PROJECT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    read, said, options, requirements = json.loads(done.stdout.splitlines()[-1])
    assert set(said) == set(worse) and all(name in said[name] for name in said), said
    assert read["image_uri"] == IMAGE and "containerfile" not in read, "JobConfig allows one"
    assert read["compute_config"]["worker_nodes"][0]["instance_type"] == "g6e.12xlarge"
    assert requirements == lock_without_torch()
    assert {"--config-file", "--env"} <= set(options)


def test_no_secret_is_in_the_jobs_environment() -> None:
    for name in ("anyscale_job.yaml", "ray_job.yaml"):
        variables = yaml.safe_load((JOBS / name).read_text())["env_vars"]
        assert not redact.has_token(variables)
        assert not [key for key in variables if re.search("TOKEN|SECRET|PASSWORD|KEY", key)]


# Ray


def test_ray_knows_what_the_runtime_environment_says() -> None:
    """Ray itself only warns of a key it does not know."""
    from ray.runtime_env import RuntimeEnv

    text = (JOBS / "ray_job.yaml").read_text("utf-8")
    said = yaml.safe_load(text)
    assert set(said) <= RuntimeEnv.known_fields and "pip" not in said
    offered = yaml.safe_load(re.search("^# (pip: .*)$", text, re.MULTILINE)[1])
    packages = RuntimeEnv(pip=str(PROJECT / offered["pip"]))["pip"]["packages"]
    assert [line for line in packages if not line.startswith("#")] == lock_without_torch()


class Cluster(NamedTuple):
    """A Ray cluster: its dashboard's address, and the folder it works in."""

    url: str
    home: Path

    def ask(self, path: str) -> Any:
        with urlopen(f"{self.url}{path}", timeout=30) as answer:
            return json.load(answer)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One of `ray start`, apart from others of the machine; at the end only its own are killed."""
    home = Path(tempfile.mkdtemp(prefix="ray-"))  # short: a socket's path has 107 characters
    port, board, agent, client = free_ports(4)
    command = [
        BIN / "ray", "start", "--head", "--block", "--num-cpus", 3, "--temp-dir", home,
        "--node-ip-address", "127.0.0.1", "--port", port, "--ray-client-server-port", client,
        "--dashboard-host", "127.0.0.1", "--dashboard-port", board,
        "--dashboard-agent-listen-port", agent, "--object-store-memory", 200 * 2**20,
        "--disable-usage-stats",
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment["PATH"] = f"{BIN}:{environment['PATH']}"  # a job's `python` is the first on it
    log = tmp_path_factory.mktemp("ray") / "head.log"
    with log.open("w") as out:
        head = subprocess.Popen(list(map(str, command)), env=environment, stdout=out, stderr=out)
    made = Cluster(f"http://127.0.0.1:{board}", home)
    try:
        deadline = time.monotonic() + 180  # two cores, and other work beside it
        while True:
            try:
                made.ask("/api/version")
                urlopen(f"http://127.0.0.1:{agent}/api/local_raylet_healthz", timeout=30).close()
                break  # the dashboard answers, and the agent that starts jobs
            except OSError:
                assert head.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
        yield made
    finally:
        for process in processes_of(home):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        head.wait()
        shutil.rmtree(home, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def processes_of(home: Path) -> set[psutil.Process]:
    """Ray's own name the folder they work in; workers, which rename themselves, are children."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(str(home) in part for part in process.cmdline()):
                found |= {process, *process.children(recursive=True)}
    return found


def ray_command() -> list[str]:
    """The one command that job-configs/ray_job.yaml gives."""
    lines = (JOBS / "ray_job.yaml").read_text("utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if "ray job submit" in line)
    said = []
    for line in lines[start:]:
        said.append(line.lstrip("# ").removesuffix("\\"))
        if not line.endswith("\\"):
            break
    return shlex.split(" ".join(said))


def submit(cluster: Cluster, name: str, *entrypoint: str) -> subprocess.CompletedProcess:
    """The file's own command with another address, and another thing to do."""
    command = ray_command()
    command[0] = str(BIN / "ray")
    command[command.index("--address") + 1] = cluster.url
    options = command[: command.index("--")]
    return subprocess.run(
        [*options, "--submission-id", name, "--", *entrypoint],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=400,
    )


def logs(cluster: Cluster, name: str) -> str:
    command = [BIN / "ray", "job", "logs", "--address", cluster.url, name]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def training(run: str, storage: Path, model: Path, corpus: Path, **more: Any) -> list[str]:
    """A training of three steps, as an entrypoint."""
    keys = {
        "model_name_or_path": str(model),
        "cutoff_len": 64,
        "max_steps": 3,
        "save_steps": 3,
        "eval_strategy": "no",
        "eval_on_start": False,
        "report_to": "none",
        "bf16": False,
    }
    train = ["python", "-m", "cpt_helpers", "train", "--run", run, "--storage", str(storage)]
    train += ["--config", "train-configs/cpt_cpu.yaml", "--corpus", str(corpus)]
    return [*train, "--overrides", json.dumps(keys | more)]


@pytest.mark.training
def test_a_job_with_a_mistake_fails_with_a_readable_error(
    cluster: Cluster, storage: Path, tiny_gemma3: Path, corpus: Path
) -> None:
    done = submit(cluster, "fails", *training("fails", storage, tiny_gemma3, corpus, max_stepz=3))
    assert done.returncode == 1
    assert cluster.ask("/api/jobs/fails")["status"] == "FAILED"
    said = logs(cluster, "fails")
    assert "ConfigError" in said and "max_stepz" in said and "max_steps" in said, said
    assert "Traceback" not in said


@pytest.mark.training
def test_a_job_trains_on_the_cluster_it_was_given(
    cluster: Cluster, storage: Path, tiny_gemma3: Path, corpus: Path
) -> None:
    done = submit(cluster, "trains", *training("as-a-job", storage, tiny_gemma3, corpus))
    assert done.returncode == 0, done.stdout
    assert cluster.ask("/api/jobs/trains")["status"] == "SUCCEEDED"
    run = storage / "as-a-job"
    assert "trained: 3 steps, 1,536 tokens, loss" in (said := logs(cluster, "trains")), said
    assert (run / "output" / "model.safetensors").is_file()

    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (start,) = [event for event in events if event["event"] == "start"]
    nodes = cluster.ask("/nodes?view=summary")["data"]["summary"]
    here = {node["raylet"]["nodeId"] for node in nodes}
    assert {rank["node"] for rank in start["ranks"]} == here, "it trained on a cluster of its own"

    (sent,) = (cluster.home / "session_latest/runtime_resources/working_dir_files").glob("*/")
    assert (sent / "cpt_helpers").is_dir() and (sent / "notebooks").is_dir()
    left_out = {".git", ".venv", "cluster_storage", "mlruns", ".pytest_cache", ".ruff_cache"}
    assert not left_out & {path.name for path in sent.iterdir()}


# Kubernetes


def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((JOBS / "kuberay_rayjob.yaml").read_text("utf-8")))


def manifest() -> dict[str, Any]:
    (job,) = [document for document in documents() if document["kind"] == "RayJob"]
    return job


def complaints(job: dict[str, Any]) -> list[str]:
    """What KubeRay's schema has against a manifest."""
    import jsonschema

    schema = json.loads(SCHEMA.read_text("utf-8"))["schema"]
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(job)]


def test_kuberay_reads_its_manifest() -> None:
    job = manifest()
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert complaints(job) == []
    spec = job["spec"]
    assert spec["submissionMode"] in {"K8sJobMode", "HTTPMode"}
    assert spec["shutdownAfterJobFinishes"], "GPUs would be paid for after the job"
    assert spec["rayClusterSpec"]["rayVersion"] == IMAGE.split(":")[1].split("-")[0]


HEAD = ("spec", "rayClusterSpec", "headGroupSpec")
WORKERS = ("spec", "rayClusterSpec", "workerGroupSpecs", 0)
POD = (*WORKERS, "template", "spec")


@pytest.mark.parametrize(
    ("at", "key", "value", "complaint"),
    [
        (("spec",), "shutdownAfterJobFinish", True, "shutdownAfterJobFinish"),
        (("spec",), "backoffLimit", "two", "'two' is not of type 'integer'"),
        (("spec",), "shutdownAfterJobFinishes", "yes", "'yes' is not of type 'boolean'"),
        (HEAD, "rayStartParam", {}, "rayStartParam"),
        (HEAD, "rayStartParams", {"num-cpus": 0}, "0 is not of type 'string'"),
        (WORKERS, "replica", 1, "replica"),
        (WORKERS, "replicas", "1", "'1' is not of type 'integer'"),
        (WORKERS, "groupName", None, "None is not of type 'string'"),
        (POD, "volume", [], "volume"),
        ((*POD, "containers", 0), "volumeMount", [], "volumeMount"),
        ((*POD, "containers", 0, "resources", "limits"), "nvidia.com/gpu", [4], "[4] is not"),
        ((*POD, "containers", 0, "env", 0, "valueFrom"), "secretRef", {}, "secretRef"),
        ((*POD, "volumes", 0), "persistentVolumeClaim", {}, "'claimName' is a required property"),
    ],
)
def test_a_mistake_in_the_manifest_is_found(
    at: tuple[str | int, ...], key: str, value: Any, complaint: str
) -> None:
    job = manifest()
    inner: Any = job
    for part in at:
        inner = inner[part]
    inner[key] = value
    (said,) = complaints(job)
    assert complaint in said


def test_secrets_are_references_and_the_storage_is_everywhere() -> None:
    cluster = manifest()["spec"]["rayClusterSpec"]
    pods = [
        group["template"]["spec"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    ]
    (claim,) = [document for document in documents() if document["kind"] == "PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods:
        (container,) = pod["containers"]
        for variable in container["env"]:
            assert not redact.has_token(variable.get("value", ""))
            if re.search("TOKEN|SECRET|PASSWORD|KEY", variable["name"]):
                assert set(variable) == {"name", "valueFrom"}
                assert set(variable["valueFrom"]) == {"secretKeyRef"}
        assert "HF_TOKEN" in {variable["name"] for variable in container["env"]}
        claims = {
            v["name"]: v.get("persistentVolumeClaim", {}).get("claimName") for v in pod["volumes"]
        }
        mounts = {mount["mountPath"]: claims[mount["name"]] for mount in container["volumeMounts"]}
        assert mounts == {"/mnt/cluster_storage": claim["metadata"]["name"], "/dev/shm": None}
    gpus = [pod["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") for pod in pods]
    recipe = yaml.safe_load((PROJECT / "train-configs/cpt_deepspeed.yaml").read_text("utf-8"))
    assert gpus == [None, recipe["ray_num_workers"]]


# The image


def instructions() -> list[tuple[str, str]]:
    """The Containerfile's instructions: their word, and what follows."""
    lines = (JOBS / "Containerfile").read_text("utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#")).replace("\\\n", "")
    return [
        (word, rest) for word, rest in (s.split(None, 1) for s in text.splitlines() if s.strip())
    ]


def lock_without_torch() -> list[str]:
    lines = (JOBS / "requirements.txt").read_text("utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


def test_the_images_lock_is_ours_without_torch() -> None:
    (made_by,) = re.findall(
        r"^#   (grep .*)$", (JOBS / "requirements.txt").read_text(), re.MULTILINE
    )
    done = subprocess.run(made_by, shell=True, cwd=PROJECT, capture_output=True, text=True)
    assert done.stdout.splitlines() == lock_without_torch(), f"the lock has changed: {made_by}"
    whole = (PROJECT / "constraints.txt").read_text("utf-8").splitlines()
    gone = {line.split("==")[0] for line in whole[1:]} - {
        s.split("==")[0] for s in done.stdout.split()
    }
    assert gone == {"torch"}


def test_the_containerfile_takes_what_it_needs() -> None:
    steps = instructions()
    assert steps[0] == ("FROM", IMAGE)
    copied = [source for word, rest in steps if word == "COPY" for source in rest.split()[1:-1]]
    assert [source for source in copied if not (PROJECT / source).exists()] == []
    needed = {"cpt_helpers", "notebooks", "train-configs", "dataset-configs", "deepspeed-configs"}
    assert needed | {"requirements.txt", "pyproject.toml"} <= set(copied)
    runs = [rest for word, rest in steps if word == "RUN"]
    assert "pip install --no-cache-dir -r job-configs/requirements.txt" in runs
    assert "pip install --no-cache-dir --no-deps --no-build-isolation -e ." in runs
    tag = re.search(r"docker build .* -t (\S+) \.", (JOBS / "Containerfile").read_text())[1]
    cluster = manifest()["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert group["template"]["spec"]["containers"][0]["image"] == tag


@pytest.mark.parametrize(
    ("after", "cuda", "passes"),
    [("2.7.0+cu128", "12.8", True), ("2.13.0", "12.8", False), ("2.7.0+cu128", None, False)],
)
def test_the_last_step_notices_another_torch(
    after: str, cuda: str | None, passes: bool, tmp_path: Path
) -> None:
    """Its shell line is run here, with a stand-in for torch."""
    runs = [rest for word, rest in instructions() if word == "RUN"]
    (before,) = [line for line in runs if line.endswith("> torch.before")]
    fake = tmp_path / "torch" / "__init__.py"
    fake.parent.mkdir()
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(tmp_path)}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    for version, built_for, line in (("2.7.0+cu128", "12.8", before), (after, cuda, runs[-1])):
        fake.write_text(f"__version__ = {version!r}\nclass version:\n    cuda = {built_for!r}\n")
        done = subprocess.run(
            ["sh", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
    assert (done.returncode == 0) == passes, done.stderr


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has the image's builds of torch, as far as an installer can see."""
    home = tmp_path_factory.mktemp("image") / "v"
    uv("venv", "-q", "--python", sys.executable, home)
    (packages,) = home.glob("lib/python*/site-packages")
    for name, version in {
        "torch": "2.7.0+cu128",
        "torchvision": "0.22.0+cu128",
        "torchaudio": "2.7.0+cu128",
        "triton": "3.3.0",
    }.items():
        folder = packages / f"{name}-{version}.dist-info"
        folder.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (folder / "METADATA").write_text(metadata)
        (folder / "RECORD").write_text("")
        (folder / "INSTALLER").write_text("pip\n")
    return home / "bin" / "python"


def plan(python: Path, *arguments: str | Path) -> set[str]:
    """What an installation would put in or take out: lines ``+ name==version`` and ``- …``."""
    said = uv("pip", "install", "--dry-run", "--python", python, *arguments).stderr
    return set(re.findall(r"^ ([+-] \S+)", said, re.MULTILINE))


def test_installing_on_the_image_leaves_its_torch(image: Path) -> None:
    ours = plan(image, "-r", JOBS / "requirements.txt")
    assert {"+ llamafactory==0.9.3", "+ deepspeed==0.16.9", "+ transformers==4.52.4"} <= ours
    assert not [line for line in ours if re.match(r"[+-] (torch|triton|nvidia)", line)]
    whole = plan(image, "-r", PROJECT / "requirements.txt", "-c", PROJECT / "constraints.txt")
    assert "- torch==2.7.0+cu128" in whole, (
        "with torch in the lock it is replaced: the test can fail"
    )


@pytest.mark.parametrize("torch", ["2.7.0", "2.7.1"])
def test_what_is_required_resolves_beside_the_images_torch(torch: str, tmp_path: Path) -> None:
    """From the packages' metadata; nothing is downloaded."""
    (tmp_path / "torch.txt").write_text(f"torch=={torch}\n")
    resolved = uv(
        "pip", "compile", "-q", "--no-annotate", "--no-header", "--python-version", "3.11.11",
        PROJECT / "requirements.txt", tmp_path / "torch.txt", "-c", JOBS / "requirements.txt",
    ).stdout.split()  # fmt: skip
    pins = {line.split("==")[0]: line.split("==")[1] for line in resolved if "==" in line}
    assert pins["torch"] == torch
    assert (pins["ray"], pins["llamafactory"]) == ("2.48.0", "0.9.3")


# The extract of KubeRay's schema


def cut(schema: dict[str, Any], used: Any) -> dict[str, Any]:
    """A schema down to what is used; of what lies beside it, the name and the type."""
    kept = {k: schema[k] for k in ("type", "enum", "required", "minimum", "pattern") if k in schema}
    if schema.get("x-kubernetes-int-or-string"):
        kept["type"] = ["integer", "string"]
    if used is None:
        kept.pop("required", None)
    elif "properties" in schema:
        kept["properties"] = {
            name: cut(inner, used.get(name)) for name, inner in schema["properties"].items()
        }
        kept["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    elif isinstance(schema.get("additionalProperties"), dict):
        kept["additionalProperties"] = cut(schema["additionalProperties"], merged(used.values()))
    elif "items" in schema:
        kept["items"] = cut(schema["items"], merged(used))
    return kept


def merged(values: Iterable[Any]) -> Any:
    """What the elements of a list use between them."""
    values = list(values)
    if values and isinstance(values[0], dict):
        names = {name for value in values for name in value}
        return {name: merged(value[name] for value in values if name in value) for name in names}
    if values and isinstance(values[0], list):
        return [merged(inner for value in values for inner in value)]
    return True


if __name__ == "__main__":
    crd, release, commit = sys.argv[1:]
    versions = yaml.safe_load(Path(crd).read_text("utf-8"))["spec"]["versions"]
    (v1,) = [version for version in versions if version["name"] == "v1"]
    extract = {
        "source": "ray-project/kuberay: ray-operator/config/crd/bases/ray.io_rayjobs.yaml",
        "release": release,
        "commit": commit,
        "made_by": "tests/test_jobs.py: names, types and what is required, of what we use",
        "schema": cut(v1["schema"]["openAPIV3Schema"], manifest()),
    }
    SCHEMA.write_text(json.dumps(extract, indent=1, sort_keys=True) + "\n", "utf-8")
