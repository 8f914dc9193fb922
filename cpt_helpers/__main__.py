"""The walkthrough from a terminal: ``python -m cpt_helpers run --run NAME --config RECIPE``."""

from __future__ import annotations

import argparse
import sys

from .errors import CptError


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m cpt_helpers", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run the six notebooks in order")
    run.add_argument("--run", default="cpt-cpu", help="the run's name (default: %(default)s)")
    run.add_argument("--storage", default="", help="shared storage (default: CPT_STORAGE, …)")
    run.add_argument("--config", default="", help="a recipe of train-configs/, or a path")
    run.add_argument("--corpus", default="", help="a built-in name, package:<name>, path or URL")
    run.add_argument("--overrides", default="", help="LLaMA-Factory keys: '{max_steps: 10}'")
    return top


def main(argv: list[str] | None = None) -> int:
    """Runs one command; a problem the reader can act on ends in its message and exit code 1."""
    arguments = parser().parse_args(argv)
    from . import pipeline

    try:
        return pipeline.main(arguments)
    except CptError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
