"""The walkthrough from a terminal: ``python -m cpt_helpers run --run NAME --config RECIPE``."""

from __future__ import annotations

import argparse
import sys

from .errors import CptError, Interrupted


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m cpt_helpers", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--run", default="cpt-cpu", help="the run's name (default: %(default)s)")
    common.add_argument("--storage", default="", help="shared storage (default: CPT_STORAGE, …)")
    common.add_argument("--config", default="", help="a recipe of train-configs/, or a path")
    common.add_argument("--corpus", default="", help="a built-in name, package:<name>, path or URL")
    common.add_argument("--overrides", default="", help="LLaMA-Factory keys: '{max_steps: 10}'")
    dry = argparse.ArgumentParser(add_help=False)
    dry.add_argument(
        "--dry-run",
        action="store_true",
        help="show the resolved files, the plan and what a look around finds; launch nothing",
    )
    run = commands.add_parser("run", parents=[common, dry], help="run the six notebooks in order")
    run.add_argument(
        "--parameters", default="", help="other notebook parameters: '{REPLAY: {news: 0.05}}'"
    )
    train = commands.add_parser("train", parents=[common, dry], help="train, without the notebooks")
    train.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    train.add_argument("--retries", type=int, default=3, help="restarts after a worker's failure")
    train.add_argument("--workers", type=int, help="another number of workers, same global batch")
    plan = commands.add_parser("plan", parents=[common], help="what a recipe will come to")
    plan.add_argument("recipe", nargs="?", default="", help="as --config")
    plan.add_argument(
        "--gpu", default="", help="a kind of GPU, such as L40S (default: the recipe's)"
    )
    plan.add_argument("--tokens", type=int, help="tokens of the corpus, where it is not prepared")
    plan.add_argument("--tokens-per-second", type=float, help="of all workers, where it is known")
    plan.add_argument("--probe", type=int, metavar="STEPS", help="measure it: train a few steps")
    plan.add_argument("--price", type=float, help="of the cluster, an hour")
    return top


def main(argv: list[str] | None = None) -> int:
    """Runs one command; a problem the reader can act on ends in its message and exit code 1."""
    arguments = parser().parse_args(argv)
    from . import pipeline
    from .config import dry_run

    try:
        if getattr(arguments, "dry_run", False):
            return dry_run.dry_run(arguments)
        commands = {"run": pipeline.main, "train": pipeline.train, "plan": pipeline.plan}
        return commands[arguments.command](arguments)
    except CptError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        return 130 if isinstance(error, Interrupted) else 1


if __name__ == "__main__":
    sys.exit(main())
