"""Runs the walkthrough from a terminal: six notebooks, or the training alone."""

from __future__ import annotations

import argparse
import sys

from .errors import CptError, Interrupted

_COMMANDS = {
    "run": "run the six notebooks in order",
    "train": "train or resume a run, without the notebooks",
    "plan": "estimate steps, memory, disk, hours and price of a recipe",
    "lab": "open copies of the notebooks in JupyterLab",
}
# fmt: off
_OPTIONS = (  # commands, option, metavar, type, default, help
    ("run train plan", "--run", "NAME", str, "cpt-cpu", "name of the run (default: cpt-cpu)"),
    ("run train plan lab", "--storage", "FOLDER", str, "", "folder that all nodes share (default: "
     "CPT_STORAGE, then /mnt/cluster_storage if it exists, then ./cluster_storage)"),
    ("run train plan", "--config", "RECIPE", str, "",
     "file name in train-configs/, or a path (default: cpt_cpu.yaml)"),
    ("run train plan", "--corpus", "CORPUS", str, "",
     "built-in name, package:<name>, hf:<dataset>, path or URL (default: the recipe's)"),
    ("run train plan", "--overrides", "YAML", str, "",
     "LLaMA-Factory keys that replace the recipe's: '{max_steps: 10}' (default: none)"),
    ("run", "--parameters", "YAML", str, "",
     "other notebook parameters: '{REPLAY: {news: 0.05}}' (default: none)"),
    ("train", "--retries", "N", int, 3, "restarts after a failed worker (default: 3)"),
    ("train", "--workers", "N", int, None,
     "number of workers, with the same global batch (default: the recipe's)"),
    ("plan", "--gpu", "TYPE", str, "", "GPU type, such as L40S (default: the recipe's)"),
    ("plan", "--tokens", "N", int, None, "tokens of the corpus (default: as tokenised by step 2)"),
    ("plan", "--tokens-per-second", "SPEED", float, None,
     "tokens per second of all workers (default: an earlier measurement, or an estimate)"),
    ("plan", "--probe", "STEPS", int, None,
     "train this number of steps to measure the speed (default: no training)"),
    ("plan", "--price", "PRICE", float, None,
     "price per hour of the cluster, in any currency (default: no price)"),
)
_FLAGS = (  # commands, option, help
    ("run train", "--dry-run", "print the recipe, the plan and all problems; launch nothing"),
    ("train", "--resume", "continue an interrupted run from its newest checkpoint"),
)
# fmt: on


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m cpt_helpers", description=__doc__)
    subparsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in _COMMANDS.items():
        sentence = f"{summary[0].upper()}{summary[1:]}."
        command = subparsers.add_parser(name, help=summary, description=sentence)
        for commands, option, metavar, convert, default, text in _OPTIONS:
            if name in commands.split():
                command.add_argument(
                    option, metavar=metavar, type=convert, default=default, help=text
                )
        for commands, option, text in _FLAGS:
            if name in commands.split():
                command.add_argument(option, action="store_true", help=text)
    plan, lab = subparsers.choices["plan"], subparsers.choices["lab"]
    plan.add_argument("recipe", nargs="?", default="", metavar="RECIPE", help="same as --config")
    lab.add_argument("jupyter", nargs="*", metavar="-- OPTION", help="options of JupyterLab")
    return top


def main(argv: list[str] | None = None) -> int:
    """Runs one command; prints an error of this package as a message without a traceback.

    Returns:
        The exit code: 0, 130 after Ctrl-C, or 1 after any other error.
    """
    arguments = parser().parse_args(argv)
    from . import lab, pipeline
    from .config import dry_run

    commands = {"run": pipeline.main, "train": pipeline.train, "plan": pipeline.plan}
    commands["lab"] = lab.start
    if getattr(arguments, "dry_run", False):
        commands[arguments.command] = dry_run.dry_run
    try:
        return commands[arguments.command](arguments)
    except CptError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        return 130 if isinstance(error, Interrupted) else 1


if __name__ == "__main__":
    sys.exit(main())
