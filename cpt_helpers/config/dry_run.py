"""The commands ``plan`` and ``--dry-run``: a run's files, plan and findings, without running it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import recipes
from ..data import sources
from ..errors import ConfigError, CptError, DataError
from ..notebook import as_overrides
from ..recipes import HELD_OUT, Recipe
from ..run import Run
from ..setup import assets, cluster
from . import flops, hardware, memory, planning, preflight, resolution
from .findings import Finding, Findings, warned


def dry_run(arguments: Any) -> int:
    """``--dry-run``: prints the resolved files, the plan and every finding; writes nothing.

    Returns:
        0 without errors, else 1; warnings do not count.
    """
    import yaml

    given = as_overrides(getattr(arguments, "parameters", ""))
    run, resolved, findings = examine(
        arguments,
        arguments.config,
        arguments.overrides or given.get("OVERRIDES", {}),
        arguments.corpus or given.get("CORPUS"),
    )
    text = yaml.safe_dump(dict(resolved.args), sort_keys=False)
    print(f"# {run.train_yaml}, as it would be\n{text}")
    if resolved.deepspeed:
        print(f"# {run.config_dir / resolved.deepspeed.name}\n{resolved.deepspeed.read_text()}")
    args = resolved.readable
    try:
        print(plan_text(args, _blocks(run)))
    except CptError as error:
        findings.append(Finding("plan", error.what, error))
    try:
        with cluster.ray_cluster() as ray:
            findings += _without_missing_model(preflight.look(run, args, ray), run, args)
    except CptError as error:
        findings.append(Finding("cluster", error.what, error))
    print("# findings", *findings, sep="\n")
    levels = [finding.level for finding in findings]
    errors, warnings = levels.count("error"), levels.count("warning")
    print(
        f"\nnothing was launched; {errors or 'nothing'} to fix, {warnings or 'no'} "
        f"warning{'s' * (warnings != 1)}"
    )
    return 1 if errors else 0


def plan(arguments: Any, speed: float | None) -> int:
    """``plan``: prints steps, tokens, memory, disk, hours and price.

    Args:
        arguments: The command's arguments.
        speed: Measured tokens per second of all workers.

    Returns:
        0 without errors, else 1.
    """
    recipe = arguments.recipe or arguments.config
    run, resolved, findings = examine(arguments, recipe, arguments.overrides, arguments.corpus)
    args = resolved.readable
    blocks = _blocks(run) if arguments.tokens is None else arguments.tokens // args.block_size
    print(plan_text(args, blocks, arguments.gpu, speed, arguments.price))
    for finding in findings:
        if finding.level != "note":
            print(f"\n{finding}")
    return 1 if any(finding.error for finding in findings) else 0


def examine(
    arguments: Any, recipe: str, overrides: Any, corpus: str | None
) -> tuple[Run, resolution.Resolved, Findings]:
    """Resolves a recipe as far as possible, and finds its errors and warnings.

    A corpus that step 2 has not read yet is no error if it can be found.

    Raises:
        ConfigError: The recipe has unknown keys, or values of the wrong type.
    """
    run = Run.open(arguments.run, arguments.storage)
    recipe, overrides = recipe or recipes.DEFAULT_RECIPE, as_overrides(overrides)
    source = sources.find(corpus or recipes.corpus_of(recipe, overrides))
    prepared = run.step_json("02_data").is_file()
    blocks = run.read_step("02_data")["data"]["tokenized_path"] if prepared else None
    resolved = resolution.resolve(run, recipe, overrides, source.name, blocks, examine=True)
    findings = Findings()
    for problem in resolved.problems:
        name = _unprepared(problem)
        findings.append(
            Finding("corpus", f"{name} will be read by step 2")
            if name and (name == source.name or _can_be_found(name))
            else Finding("recipe", problem.what, problem)
        )
    if not any(finding.error for finding in findings):
        findings.append(Finding("recipe", "every key is known, and there is no contradiction"))
    unique = dict.fromkeys([*findings, *warned(resolved.warnings)])
    return run, resolved, Findings(unique)


def _unprepared(problem: ConfigError) -> str | None:
    """The corpus of an error about a missing dataset."""
    for start in ("unknown dataset '", "the dataset '"):
        if problem.what.startswith(start):
            return problem.what.removeprefix(start).split("'")[0].removesuffix(HELD_OUT)
    return None


def _can_be_found(name: str) -> bool:
    try:
        return sources.find(name).name == name
    except DataError:
        return False


def _without_missing_model(findings: Findings, run: Run, args: Recipe) -> Iterator[Finding]:
    """The findings, with a note for a model that step 1 will fetch."""
    model = Path(str(args["model_name_or_path"]))
    known = model.parent == run.storage / "models" and model.name in assets.MODELS
    for finding in findings:
        if finding.error and known and not model.exists() and str(model) in finding.error.where:
            if finding.subject == "model":
                yield Finding("model", f"{model.name} will be fetched by step 1")
        else:
            yield finding


def _blocks(run: Run) -> int | None:
    """Blocks of the training half, from step 2's results; ``None`` before step 2."""
    prepared = run.step_json("02_data").is_file()
    return run.read_step("02_data")["data"]["blocks"] if prepared else None


def plan_text(
    args: Recipe,
    blocks: int | None,
    gpu: str = "",
    speed: float | None = None,
    price: float | None = None,
) -> str:
    """The plan of a recipe as text.

    Args:
        args: The resolved recipe; ``deepspeed`` is a file that can be read.
        blocks: Blocks of the corpus; ``None`` if unknown.
        gpu: A kind of GPU; by default the recipe's.
        speed: Measured tokens per second of all workers.
        price: Price of the cluster per hour.
    """
    shape, per_step = planning.shape_of(args), args.global_batch * args.block_size
    size, steps, rows = shape.size, args.max_steps, list[tuple[str, str]]()
    rows.append(("model", f"{size.name}: {size.parameters:,} parameters, {size.trained:,} trained"))
    tokens = f"{args.global_batch} blocks of {args.block_size} = {per_step:,} tokens"
    rows.append(("one step", tokens))
    if blocks is not None:
        steps = planning.plan(args, blocks, 0).steps
        rows.append(("corpus", f"{blocks:,} blocks = {blocks * args.block_size:,} tokens"))
    if steps > 0:
        rows.append(("steps", f"{steps:,}, {steps * per_step:,} tokens in all"))
        disk = planning.disk(args, size, steps)
        rows.append(("disk space", f"{disk.total:.3g} GiB: {disk.in_words()}"))
    else:
        rows.append(("steps", "known once step 2 has read the corpus, or with --tokens"))
    kind = hardware.gpu_of(args, gpu)
    stage = memory.settings_of(args).stage
    lines = [
        "# plan",
        *_aligned(rows),
        f"\n  memory of each of {args.workers} workers in GiB; the recipe has ZeRO stage {stage}",
        hardware.memory_table(args, shape).to_string(index=False),
        "",
        *_fit_lines(args, shape, kind),
    ]
    if steps > 0:
        costs = hardware.cost(
            args, shape, steps * per_step, kind, tokens_per_second=speed, price_per_hour=price
        )
        lines += _aligned(_cost_rows(costs, price))
    return "\n".join(lines) + "\n"


def _aligned(rows: list[tuple[str, str]]) -> list[str]:
    return [f"  {label:<22}{text}" for label, text in rows]


def _fit_lines(args: Recipe, shape: memory.Shape, kind: str | None) -> Iterator[str]:
    """Whether the recipe fits on this machine, or on each kind of GPU."""
    import psutil

    if args.use_cpu and not kind:
        need = memory.of_worker(args, shape).peak / 2**30
        have = psutil.virtual_memory().total / 2**30
        enough = args.workers * need < hardware.USABLE * have
        text = f"{args.workers} x {need:.1f} GiB of {have:.0f} GiB"
        yield from _aligned([("this machine", f"{text}: {'' if enough else 'not '}enough")])
    else:
        for gpu in [kind] if kind else flops.GPUS:
            tried = hardware.fits(args, shape, gpu)
            first, last = (fit.memory.peak / 2**30 for fit in (tried[0], tried[-1]))
            start = f"  {gpu}, {flops.GPUS[gpu][1]:.1f} GiB: "
            yield f"{start}{'fits' if tried[0].fits else 'does not fit'}, {first:.1f} GiB needed"
            if not tried[0].fits and tried[-1].fits:
                changes = " + ".join(fit.change for fit in tried[1:])
                yield f"      fits with {changes} ({last:.1f} GiB)"
            elif not tried[0].fits:
                yield "      no change of the recipe makes it fit: more workers, or a larger GPU"
    if kind and (idle := hardware.unused(args, shape, kind)):
        yield f"      warning: {idle}"


def _cost_rows(costs: list[hardware.Cost], price: float | None) -> list[tuple[str, str]]:
    rows = []
    for cost in costs:
        minutes = math.ceil(cost.hours * 60)
        time = f"{minutes} minute{'s' * (minutes != 1)}"
        time = time if minutes < 120 else f"{cost.hours:.1f} hours"
        if cost.price is not None:
            time += f", {cost.price:,.2f} at {price:g} per hour"
        speed = f"{cost.tokens_per_second:,.0f} tokens/s: {cost.source}"
        rows.append(("time of the steps", f"{time}, with {speed}"))
    hint = "with --gpu, --tokens-per-second, or --probe, which measures the speed"
    return rows or [("time of the steps", hint)]
