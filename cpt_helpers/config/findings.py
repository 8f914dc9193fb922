"""Warnings about a recipe, and the findings of every check: error, warning or note."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import display
from ..errors import ConfigError, CptError
from ..recipes import HELD_OUT, Recipe, names_of, where_of
from ..redirect import hushed
from .validation import ignored_by_ray

if TYPE_CHECKING:
    from pandas import DataFrame

_MARKS = {"error": "✗", "warning": "!", "note": "✓"}
_BATCH = 1000  # documents that LLaMA-Factory 0.9.3 tokenises and packs at once by default


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    subject: str  # what was checked
    result: str  # what was found
    error: CptError | None = None  # why the run cannot train, and the fix
    # why the setting is probably not intended, and the fix. It stops nothing
    warning: CptError | None = None

    @property
    def level(self) -> str:
        """``"error"``, ``"warning"`` or ``"note"``."""
        return "error" if self.error else "warning" if self.warning else "note"

    def __str__(self) -> str:
        return f"{_MARKS[self.level]} {self.subject}: {self.error or self.warning or self.result}"


class Findings(list[Finding]):
    """The results of all checks. Shows as a table, the worst first."""

    def table(self) -> DataFrame:
        ordered = sorted(self, key=lambda finding: list(_MARKS).index(finding.level))
        do = [getattr(f.error or f.warning, "do", "").replace("\n", "; ") for f in ordered]
        rows = [(f.level, f.subject, f.result, fix) for f, fix in zip(ordered, do, strict=True)]
        return display.table(rows, columns=["level", "subject", "result", "do"])

    def __repr__(self) -> str:
        return self.table().to_string()

    def _repr_html_(self) -> str:
        return self.table().to_html()


def warned(warnings: Iterable[CptError]) -> Findings:
    """The warnings about a recipe as findings."""
    return Findings(Finding("recipe", warning.what, warning=warning) for warning in warnings)


def raise_if_wrong(findings: Iterable[Finding]) -> None:
    """Raises the errors of the findings, several in one error.

    Raises:
        CptError: Of the class of the first error.
    """
    errors = [finding.error for finding in findings if finding.error is not None]
    if len(errors) == 1:
        raise errors[0]
    if errors:
        numbered = "\n".join(f"{n}. {error}" for n, error in enumerate(errors, 1))
        raise type(errors[0])(f"{len(errors)} errors keep this run from training\n{numbered}")


def warnings(
    args: Recipe, path: Path, overrides: dict[str, Any] | None = None
) -> Iterator[ConfigError]:
    """Settings that can be trained and are probably not intended, each with the line to write.

    Args:
        args: The resolved recipe.
        path: The file it was read from.
        overrides: The keys that do not come from the file.
    """
    for key, what, expected, do in _doubts(args):
        where = where_of(path, key, overrides or {})
        yield ConfigError(what, where=where, expected=expected, do=do)


def _doubts(args: Recipe) -> Iterator[tuple[str, str, str, str]]:
    """Each doubtful setting: its key, the problem, what is expected, the line to write."""
    if tokens := replaced_end_token(args):
        yield (
            "template",
            f"template: {args['template']} replaces the end-of-sequence token {tokens[0]} "
            f"by {tokens[1]}, a token of chats",
            "the model's own token. LLaMA-Factory joins documents by the chat token, and saves it "
            "with the trained model as the end of a text",
            "template: empty",
        )
    if _true(args, "trust_remote_code"):
        yield (
            "trust_remote_code",
            "trust_remote_code: true runs Python code of the model's repository on every worker",
            "code of transformers only. A model needs its own code if its config.json has "
            "auto_map; read that code first",
            "trust_remote_code: false",
        )
    if _true(args, "overwrite_cache"):
        yield (
            "overwrite_cache",
            "overwrite_cache: true makes LLaMA-Factory tokenise again at each start and restart",
            "tokenising once. Step 2 does that, and its blocks ignore this key",
            "overwrite_cache: false",
        )
    if lines := list(_evaluation_lines(args)):
        yield (
            "eval_dataset",
            "nothing is evaluated on held-out text during the training",
            "a held-out loss: without it, memorising the corpus looks like learning",
            "\n".join(lines),
        )
    processes, documents = args.get("preprocessing_num_workers") or 1, _documents(args)
    if processes > 1 and documents is not None and documents < processes * _BATCH:
        yield (
            "preprocessing_num_workers",
            f"preprocessing_num_workers: {processes} for {documents:,} documents or fewer",
            f"{_BATCH:,} documents or more per process. Each process of LLaMA-Factory drops the "
            "tokens that fill no block. Step 2 does not, and ignores this key",
            f"preprocessing_num_workers: {max(documents // _BATCH, 1)}",
        )
    if ignored := ignored_by_ray(args):
        yield (
            "ray_init_kwargs",
            f"ray_init_kwargs: {', '.join(ignored)} will be ignored",
            "runtime_env.env_vars, the only key that is used",
            "take it out",
        )


def replaced_end_token(args: Recipe) -> tuple[str, str] | None:
    """The model's end-of-sequence token and the one that the template replaces it by.

    The template is applied to the tokenizer of a model in a folder, as LLaMA-Factory does. For a
    model on the hub, the template's definition decides.

    Returns:
        ``None`` if the token stays.
    """
    if args.get("template") in (None, "empty"):
        return None  # without LLaMA-Factory, whose import takes seconds
    with hushed():
        from llamafactory.data.template import TEMPLATES
    template = TEMPLATES.get(args["template"])
    if template is None or not template.replace_eos:
        return None
    folder = Path(str(args.get("model_name_or_path", "")))
    if not (folder / "tokenizer_config.json").is_file():
        return "of the model", template.stop_words[0]
    from ..setup.assets import tokenizer_of

    tokenizer = tokenizer_of(str(folder))
    before = tokenizer.eos_token
    with hushed():
        template.fix_special_tokens(tokenizer)
    return None if tokenizer.eos_token == before else (str(before), tokenizer.eos_token)


def _evaluation_lines(args: Recipe) -> Iterator[str]:
    """The lines that a recipe lacks for an evaluation; none if it declines one."""
    strategy = args.get("eval_strategy")
    if strategy is not None and str(strategy).lower() in ("no", "false"):  # YAML 1.1: no is false
        return
    if not args.get("eval_dataset") and not args.get("val_size"):
        yield f"eval_dataset: {(names_of(args.get('dataset')) or ['<corpus>'])[0]}{HELD_OUT}"
    if strategy is None:
        yield "eval_strategy: steps"
        if not args.get("eval_steps"):
            yield "eval_steps: 50"


def _documents(args: Recipe) -> int | None:
    """The most documents of the training; ``None`` if unknown."""
    known = [args["max_samples"]] if args.get("max_samples") else []
    folder = Path(str(args.get("dataset_dir", "data"))) / "corpora"
    files = [folder / name / "corpus.json" for name in names_of(args.get("dataset"))]
    if files and all(file.is_file() for file in files):
        known.append(sum(json.loads(file.read_text("utf-8"))["documents"] for file in files))
    return min(known, default=None)


def _true(args: Recipe, key: str) -> bool:
    return str(args.get(key, False)).lower() in ("true", "yes", "t", "y", "1")
