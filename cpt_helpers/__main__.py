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
    run = commands.add_parser("run", parents=[common], help="run the six notebooks in order")
    run.add_argument(
        "--parameters", default="", help="other notebook parameters: '{REPLAY: {news: 0.05}}'"
    )
    train = commands.add_parser("train", parents=[common], help="train, without the notebooks")
    train.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    train.add_argument("--retries", type=int, default=3, help="restarts after a worker's failure")
    train.add_argument("--workers", type=int, help="another number of workers, same global batch")
    return top


def main(argv: list[str] | None = None) -> int:
    """Runs one command; a problem the reader can act on ends in its message and exit code 1."""
    arguments = parser().parse_args(argv)
    from . import pipeline

    try:
        return {"run": pipeline.main, "train": pipeline.train}[arguments.command](arguments)
    except CptError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        return 130 if isinstance(error, Interrupted) else 1


if __name__ == "__main__":
    sys.exit(main())
