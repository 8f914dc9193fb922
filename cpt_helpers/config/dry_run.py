"""What a run would be, without running it: ``plan`` and ``--dry-run``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .. import recipes
from ..data import sources as corpora
from ..errors import ConfigError, CptError, DataError
from ..notebook import as_overrides
from ..recipes import HELD_OUT, Recipe
from ..run import Run
from ..setup import assets, cluster
from . import flops, forecast, planning, preflight, resolution
from .forecast import USABLE
from .preflight import Finding


def dry_run(arguments: Any) -> int:
    """``--dry-run``: the resolved files, the plan and every finding; launches and writes nothing.

    Returns:
        0 where nothing was found wrong, else 1; warnings do not count.
    """
    import yaml

    run = Run.open(arguments.run, arguments.storage)
    recipe = arguments.config or recipes.DEFAULT_RECIPE
    given = as_overrides(getattr(arguments, "parameters", ""))
    overrides = as_overrides(arguments.overrides or given.get("OVERRIDES", {}))
    corpus = arguments.corpus or given.get("CORPUS") or recipes.corpus_of(recipe, overrides)
    resolved, findings = examine(run, recipe, overrides, corpus)
    text = yaml.safe_dump(dict(resolved.args), sort_keys=False)
    print(f"# {run.train_yaml}, as it would be\n{text}")
    if resolved.deepspeed:
        print(f"# {run.config_dir / resolved.deepspeed.name}\n{resolved.deepspeed.read_text()}")
    args = _readable(resolved)
    try:
        print(_plan_in_words(run, args, blocks_of(run, args)))
    except CptError as error:
        findings.append(Finding("plan", error.what, error))
    try:
        with cluster.ray_cluster() as ray:
            findings += _later(preflight.look(run, args, ray), run, args)
    except CptError as error:
        findings.append(Finding("cluster", error.what, error))
    print("# what was looked at")
    for finding in findings:
        print(finding)
    levels = [finding.level for finding in findings]
    wrong, warned = levels.count("error"), levels.count("warning")
    print(
        f"\nnothing was launched; {wrong or 'nothing'} to fix, {warned or 'no'} "
        f"warning{'s' * (warned != 1)}"
    )
    return 1 if wrong else 0


def examine(
    run: Run, recipe: str, overrides: dict[str, Any], corpus: str
) -> tuple[resolution.Resolved, list[Finding]]:
    """A recipe resolved as far as it can be, and what is wrong with it.

    A corpus that step 2 has yet to read is no fault where it can be found.

    Raises:
        ConfigError: It has keys or values that nothing can be made of.
    """
    source = corpora.find(corpus)
    blocks = None
    if run.step_json("02_data").is_file():
        blocks = run.read_step("02_data")["data"]["tokenized_path"]
    resolved = resolution.resolve(run, recipe, overrides, source.name, blocks, examine=True)
    findings = []
    for problem in resolved.problems:
        name = _unprepared(problem)
        findings.append(
            Finding("corpus", f"{name} will be read by step 2")
            if name and _can_be_found(name, source.name)
            else Finding("recipe", problem.what, problem)
        )
    if not any(finding.error for finding in findings):
        findings.append(Finding("recipe", "every key is known, and none contradicts another"))
    findings += preflight.warned(resolved.warnings)
    return resolved, list(dict.fromkeys(findings))


def _unprepared(problem: ConfigError) -> str | None:
    """The corpus that a problem says is not there yet."""
    for start in ("unknown dataset '", "the dataset '"):
        if problem.what.startswith(start):
            return problem.what.removeprefix(start).split("'")[0].removesuffix(HELD_OUT)
    return None


def _can_be_found(name: str, given: str) -> bool:
    if name == given:
        return True  # it was found above
    try:
        return corpora.find(name).name == name
    except DataError:
        return False


def _readable(resolved: resolution.Resolved) -> Recipe:
    """Its arguments, DeepSpeed's file where it lies now: the run's copy is not written yet."""
    file = {"deepspeed": str(resolved.deepspeed)} if resolved.deepspeed else {}
    return resolved.args | file


def _later(findings: list[Finding], run: Run, args: Recipe) -> list[Finding]:
    """Those findings without what steps 1 and 2 will still bring."""
    model = Path(str(args["model_name_or_path"]))
    coming = model.parent == run.storage / "models" and model.name in assets.MODELS
    kept = []
    for finding in findings:
        if finding.error and coming and not model.exists() and str(model) in finding.error.where:
            if finding.subject == "model":
                kept.append(Finding("model", f"{model.name} will be fetched by step 1"))
            continue
        kept.append(finding)
    return kept


def blocks_of(run: Run, args: Recipe, tokens: int | None = None) -> int | None:
    """Blocks to train on: of step 2's results, or of a number of tokens; ``None`` if unknown."""
    if tokens is not None:
        return tokens // args.block_size
    if run.step_json("02_data").is_file():
        return run.read_step("02_data")["data"]["blocks"]
    return None


def plan(arguments: Any, speed: float | None) -> int:
    """``python -m cpt_helpers plan RECIPE``: steps, tokens, memory, disk, hours and price.

    Args:
        arguments: Of the command.
        speed: Tokens a second over all workers, where it was measured.

    Returns:
        0 where no error was found, else 1.
    """
    run = Run.open(arguments.run, arguments.storage)
    recipe = arguments.recipe or arguments.config or recipes.DEFAULT_RECIPE
    overrides = as_overrides(arguments.overrides)
    corpus = arguments.corpus or recipes.corpus_of(recipe, overrides)
    resolved, findings = examine(run, recipe, overrides, corpus)
    args = _readable(resolved)
    blocks = blocks_of(run, args, arguments.tokens)
    print(_plan_in_words(run, args, blocks, arguments.gpu, speed, arguments.price))
    for finding in findings:
        if finding.level != "note":
            print(f"\n{finding}")
    return 1 if any(finding.error for finding in findings) else 0


def _plan_in_words(
    run: Run,
    args: Recipe,
    blocks: int | None,
    gpu: str = "",
    speed: float | None = None,
    price: float | None = None,
) -> str:
    shape = forecast.shape_of(args)
    size, workers = shape.size, args.workers
    lines = ["# the plan"]

    def say(what: str, value: str) -> None:
        lines.append(f"  {what:<22}{value}")

    say("model", f"{size.name}: {size.parameters:,} parameters, {size.trained:,} trained")
    batch = args.global_batch
    per_step = batch * args.block_size
    say("one step", f"{batch} blocks of {args['cutoff_len']} = {per_step:,} tokens")
    steps = args.max_steps
    if blocks is not None:
        steps = planning.plan(args, blocks, 0).steps
        say("the corpus", f"{blocks:,} blocks = {blocks * args['cutoff_len']:,} tokens")
    if steps > 0:
        say("steps", f"{steps:,}, {steps * per_step:,} tokens in all")
        room = planning.disk(args, size, steps)
        say("on the storage", f"{room.total:.3g} GiB: {room.in_words()}")
    else:
        say("steps", "known once step 2 has read the corpus, or with --tokens")
    kind = forecast.gpu_of(args, gpu)
    kinds = [kind] if kind else [] if args.use_cpu else list(flops.GPUS)
    lines.append(f"\n  memory of each of {workers} workers, GiB (computed; the recipe: ZeRO "
                 f"{forecast.memory.settings_of(args, shape.hidden).stage})")  # fmt: skip
    rows = forecast.memory_rows(args, shape)
    lines += _columns(rows)
    lines.append("")
    for name in kinds:
        lines += _fit_in_words(args, shape, name)
    if kind and (idle := forecast.unused(args, shape, kind)):
        lines.append(f"      warning: {idle}")
    if args.use_cpu:
        import psutil

        each = forecast.memory.of_worker(args, shape).peak / 2**30
        have = psutil.virtual_memory().total / 2**30
        enough = "enough" if workers * each < USABLE * have else "not enough for all of them"
        say("on this machine", f"{workers} x {each:.1f} GiB of {have:.0f} GiB: {enough}")
    if steps > 0:
        costs = forecast.cost(
            args, shape, steps * per_step, kind, tokens_per_second=speed, price_per_hour=price
        )
        for known in costs:
            amount = f", {known.price:,.2f} at {price:g} an hour" if known.price is not None else ""
            say("time of the steps", f"{_duration(known.hours)}{amount}, if")
            say("", f"{known.tokens_per_second:,.0f} tokens/s: {known.source}")
        if not costs:
            say("time", "with --gpu, --tokens-per-second, or --probe, which measures it")
    return "\n".join(lines) + "\n"


def _fit_in_words(args: Recipe, shape: Any, gpu: str) -> list[str]:
    tried = forecast.fits(args, shape, gpu)
    have = tried[0].capacity / 2**30
    first = f"  {gpu}, {have:.1f} GiB: "
    need = f"{tried[0].memory.peak / 2**30:.1f} GiB"
    if tried[0].fits:
        return [f"{first}fits, {need} at the peak"]
    lines = [f"{first}does not fit, {need} at the peak"]
    if tried[-1].fits:
        changes = " + ".join(fit.change for fit in tried[1:])
        return [*lines, f"      fits with {changes} ({tried[-1].memory.peak / 2**30:.1f} GiB)"]
    return [*lines, "      nor with any change of the recipe: more workers, or a larger GPU"]


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    heads = list(rows[0])
    widths = [max(len(head), *(len(str(row[head])) for row in rows)) for head in heads]
    table = [heads, *([str(row[head]) for head in heads] for row in rows)]
    return [
        "  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))
        for line in table
    ]


def _duration(hours: float) -> str:
    minutes = math.ceil(hours * 60)
    if minutes < 120:
        return f"{minutes} minute{'s' * (minutes != 1)}"
    return f"{hours:.1f} hours"
