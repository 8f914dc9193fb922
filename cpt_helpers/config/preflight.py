"""Checks before a launch: can this recipe run on this cluster, on every node?"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import AssetError, CptError, UnreadyError
from ..recipes import Recipe
from ..run import Run
from ..setup import cluster, machine, models, tracking_store
from . import findings, flops, hardware, memory, planning
from .findings import Finding, Findings
from .findings import raise_if_wrong as raise_if_wrong
from .node_checks import nodes as nodes
from .node_checks import require_first_ray_train
from .resolution import Resolved

_SECONDS = 8.0  # for an answer of the tracking server


def check(run: Run, resolved: Resolved) -> Findings:
    """Checks a resolved recipe here and on every node of the cluster; prints its warnings.

    Returns:
        All findings, as a table.

    Raises:
        CptError: The run cannot train; with every error.
    """
    found = findings.warned(resolved.warnings)
    for warning in found:
        print(warning)
    with cluster.ray_cluster() as ray:
        found = Findings([*found, *look(run, resolved.args, ray)])
    raise_if_wrong(found)
    return found


def before_launch(run: Run, args: Recipe) -> None:
    """Prints the warnings about a run's recipe, and refuses a process that cannot train it.

    A training without a recipe file, such as the demonstration of step 5, has no warnings.

    Raises:
        UnreadyError: The environment selects another Ray Train.
    """
    if run.train_yaml.is_file():
        for finding in findings.warned(findings.warnings(args, run.train_yaml)):
            print(finding)
    require_first_ray_train(os.environ)


def look(run: Run, args: Recipe, ray: Any, *, wait: bool = False) -> Findings:
    """All findings about a resolved recipe, from here and from every node.

    Args:
        run: The run.
        args: The resolved recipe.
        ray: The cluster (``cluster.ray_cluster()``).
        wait: Whether to wait for nodes that the cluster may start on demand.
    """
    return Findings([
        *_checked("Ray Train", lambda: require_first_ray_train(os.environ)),
        *_checked("model", lambda: model(args)),
        *_checked("disk", lambda: room(run, args)),
        *_checked("tracking", lambda: server(run, args)),
        *_checked("placement", lambda: placement(ray, args, wait=wait)),
        *_checked("memory", lambda: enough_memory(ray, args)),
        *nodes(run, args, ray),
    ])  # fmt: skip


def _checked(subject: str, check: Callable[[], str]) -> Iterator[Finding]:
    try:
        yield Finding(subject, check())
    except CptError as error:
        yield Finding(subject, error.what, error)


def model(args: Recipe) -> str:
    """The model, in a folder or on the hub; a gated model is asked for with the user's token.

    Raises:
        AssetError: The model is missing, not complete, or not allowed for this token.
    """
    folder = Path(str(args["model_name_or_path"]))
    if not folder.is_absolute():
        return models.ask_hub(str(folder))
    if not (folder / "config.json").is_file():
        raise AssetError(
            "the model is missing" if not folder.exists() else "the folder holds no model",
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
    return str(folder)


def server(run: Run, args: Recipe) -> str:
    """The tracking server's answer; nothing is written to it.

    Raises:
        TrackingError: It does not answer, or refuses this user.
    """
    return tracking_store.ask(run, args, _SECONDS)


def placement(ray: Any, args: Recipe, *, wait: bool = False) -> str:
    """The resources that the workers ask for, if the cluster has them.

    Raises:
        UnreadyError: The cluster lacks them; with the labels of its nodes.
    """
    each = _resources(args)
    asked = f"{args.workers} workers with {', '.join(f'{n:g} {k}' for k, n in each.items())} each"
    try:
        cluster.require_workers(
            ray, args.workers, each, strategy=args.placement_strategy, wait=wait
        )
    except UnreadyError:
        if not wait and cluster.grows():
            return f"{asked}: not available now; this cluster starts nodes on demand"
        if unknown := _unknown_labels(ray, each):
            raise unknown from None
        raise
    return asked


def _resources(args: Recipe) -> dict[str, float]:
    return {kind: float(number) for kind, number in args.resources.items()}


def fits(ray: Any, args: Recipe) -> bool:
    """Whether the nodes that are alive have room for the workers, busy or not."""
    room = cluster.fitting_workers(ray, _resources(args), args.placement_strategy)
    return room >= args.workers


def _unknown_labels(ray: Any, each: dict[str, float]) -> UnreadyError | None:
    """The error for a resource that no node offers, such as a misspelt ``accelerator_type``."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    plain = {"CPU", "GPU", "memory", "object_store_memory"}
    offered = {name for resources in nodes for name in resources} - plain
    wanted = [name for name in each if name not in plain | offered]
    if not wanted:
        return None
    labels = sorted(name for name in offered if not name.startswith("node:"))
    gpus = sum(resources.get("GPU", 0) for resources in nodes)
    return UnreadyError(
        f"the workers cannot be placed: no node offers {', '.join(wanted)}",
        where=f"resources_per_worker; the Ray cluster has {gpus:g} GPU on {len(nodes)} "
        f"node{'s' * (len(nodes) > 1)}",
        expected=f"labels that nodes have: {', '.join(labels) or 'they have none'}",
        do="correct the label, or take it out: GPU: 1 alone takes any GPU. Ray's own labels are "
        "the model's name only, such as accelerator_type:A100, whatever its memory",
    )


def placed(ray: Any, args: Recipe) -> Recipe:
    """Waits for room for the workers, and asks for cores if the optimizer runs on the host.

    Returns:
        The recipe to launch.

    Raises:
        UnreadyError: There is no room.
    """
    placement(ray, args, wait=True)  # starts nodes on demand
    wider = with_cores(ray, args)
    if wider is not args:
        placement(ray, wider, wait=True)
    return wider


def with_cores(ray: Any, args: Recipe) -> Recipe:
    """A recipe whose workers have cores for an optimizer that runs on the host.

    Ray (2.48.0) sets ``OMP_NUM_THREADS`` to the CPUs that a worker asks for, and to 1 if it asks
    for none, as LLaMA-Factory's GPU recipes do. DeepSpeed's CPU Adam would then run on one core. So
    each worker asks for its GPU's share of the node's cores.

    Returns:
        ``args`` itself if nothing is offloaded, or if the recipe names CPUs.
    """
    asked = dict(args.resources)
    if args.use_cpu or "CPU" in asked or not memory.settings_of(args).offload_optimizer:
        return args
    shares = [
        int(node["Resources"].get("CPU", 0) // node["Resources"]["GPU"])
        for node in ray.nodes()
        if node["Alive"] and all(node["Resources"].get(k, 0) >= n for k, n in asked.items())
    ]
    share = min(shares, default=0)
    return args | {"resources_per_worker": {"CPU": share} | asked} if share else args


def enough_memory(ray: Any, args: Recipe) -> str:
    """Each worker's planned peak, if the GPUs or the memory of the cluster suffice.

    Raises:
        UnreadyError: They do not suffice.
        AssetError: The model's configuration is not available.
    """
    shape = planning.shape_of(args)
    peak = memory.of_worker(args, shape).peak
    need = f"{machine.format_bytes(peak)} per worker"
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if args.use_cpu:
        have = sum(r.get("memory", 0) + r.get("object_store_memory", 0) for r in resources)
        if args.workers * peak > have:
            raise UnreadyError(
                f"{args.workers} workers need {need} at the peak, by the plan",
                where=f"the Ray cluster has {machine.format_bytes(have)} on {len(resources)} nodes",
                expected="memory for all of them",
                do="smaller blocks or micro-batches (cutoff_len, per_device_train_batch_size), "
                "gradient checkpointing, a higher ZeRO stage, or more nodes",
            )
        return f"{need} of {machine.format_bytes(have)} in the cluster"
    named = {hardware.gpu_of(Recipe(resources_per_worker=r)) for r in resources if r.get("GPU")}
    gpus = sorted(filter(None, named))
    for gpu in gpus:
        tried = hardware.fits(args, shape, gpu)
        # Ray labels an A100 of 80 GB as it labels one of 40 GB.
        either = gpu == "A100-40G" and any("accelerator_type:A100" in r for r in resources)
        if not tried[0].fits and either and hardware.fits(args, shape, "A100-80G")[0].fits:
            return f"{need}, by the plan; fits on an A100 of 80 GB, not on one of 40 GB"
        if not tried[0].fits:
            changes = " + ".join(fit.change for fit in tried[1:])
            raise UnreadyError(
                f"the recipe does not fit on an {gpu}: {need} at the peak, by the plan",
                where=f"{gpu}, {flops.GPUS[gpu][1]:.1f} GiB",
                expected="a GPU with room for it, or a smaller recipe",
                do=f"OVERRIDES with {changes}" if tried[-1].fits else "more workers, larger GPUs",
            )
    return f"{need}, by the plan" + (f"; fits on {', '.join(gpus)}" if gpus else "")


def room(run: Run, args: Recipe) -> str:
    """The disk space that the run will need; existing checkpoints count.

    Raises:
        StorageError: The storage has too little room.
    """
    plan = run.results().get("plan", {})
    if "disk" in plan:
        need = planning.Disk(**plan["disk"])
    else:  # the run was not planned; with epochs and blocks not counted, as many as kept at once
        kept = ((args.get("save_total_limit") or 0) + 2) * max(args.save_steps, 1)
        steps = args.max_steps if args.max_steps >= 1 else kept
        need = planning.disk(args, planning.shape_of(args).size, steps)
    have = run.checkpoint_bytes() / 2**30
    text = need.in_words() + (f"; {have:.3g} GiB of it exist" if have else "")
    machine.require_room(run.storage, max(need.total - have, 0.0), text)
    return f"room for {need.in_words()}"
