"""Warnings about a recipe: it can be trained, and the result is probably not what was meant."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..recipes import HELD_OUT, Recipe, names_of, where_of
from ..redirect import hushed
from . import refused

_BATCH = 1000  # documents that LLaMA-Factory 0.9.3 tokenises and packs at once, by default


def warnings(
    args: Recipe, path: Path, overrides: dict[str, Any] | None = None
) -> Iterator[ConfigError]:
    """Every warning, with its reason and the line that fixes it. Nothing is refused for it.

    Args:
        args: The resolved recipe.
        path: The file it was read from.
        overrides: Those keys that do not come from the file.
    """
    overrides = overrides or {}

    def warning(key: str, what: str, reason: str, do: str) -> ConfigError:
        return ConfigError(what, where=where_of(path, key, overrides), expected=reason, do=do)

    if tokens := replaced_end_token(args):
        yield warning(
            "template",
            f"template: {args['template']} replaces the end-of-sequence token {tokens[0]} "
            f"by {tokens[1]}, a token of chats",
            "the model's own token. LLaMA-Factory joins documents by the chat token, and saves it "
            "with the trained model as the end of a text",
            "template: empty",
        )
    if _true(args, "trust_remote_code"):
        yield warning(
            "trust_remote_code",
            "trust_remote_code: true runs Python code of the model's repository on every worker",
            "code of transformers only. A model needs its own code where its config.json has "
            "auto_map; read that code first",
            "trust_remote_code: false",
        )
    if _true(args, "overwrite_cache"):
        yield warning(
            "overwrite_cache",
            "overwrite_cache: true makes LLaMA-Factory tokenise again at each start and restart",
            "tokenising once. Step 2 does that, and its blocks ignore this key",
            "overwrite_cache: false",
        )
    lines = list(_evaluation_lines(args))
    if lines:
        yield warning(
            "eval_dataset",
            "nothing is evaluated on held-out text during the training",
            "a held-out loss: without it, memorising the corpus looks like learning",
            "\n".join(lines),
        )
    processes, documents = args.get("preprocessing_num_workers") or 1, _documents(args)
    if processes > 1 and documents is not None and documents < processes * _BATCH:
        yield warning(
            "preprocessing_num_workers",
            f"preprocessing_num_workers: {processes} for {documents:,} documents or fewer",
            f"{_BATCH:,} documents or more for each process. LLaMA-Factory drops the tokens that "
            "fill no block once per process; step 2 does not, and ignores this key",
            f"preprocessing_num_workers: {max(documents // _BATCH, 1)}",
        )
    if ignored := refused.ignored_by_ray(args):
        yield warning(
            "ray_init_kwargs",
            f"ray_init_kwargs: {', '.join(ignored)} will be ignored",
            "runtime_env.env_vars, the only key that is used",
            "take it out",
        )


def replaced_end_token(args: Recipe) -> tuple[str, str] | None:
    """The end-of-sequence token of a recipe's model, and the one that its template puts there.

    A model in a folder is asked: the template is applied to its tokenizer, as LLaMA-Factory does.
    For one on the hub the template's definition has to do.

    Returns:
        ``None`` where the token stays.
    """
    if args.get("template") in (None, "empty"):
        return None  # known without LLaMA-Factory, whose import takes seconds
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
    """What a recipe lacks to evaluate on held-out text; nothing where it says that it shall not."""
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
    """Documents to train on, at most; ``None`` where nothing tells."""
    known = [args["max_samples"]] if args.get("max_samples") else []
    folder = Path(str(args.get("dataset_dir", "data"))) / "corpora"
    files = [folder / name / "corpus.json" for name in names_of(args.get("dataset"))]
    if files and all(file.is_file() for file in files):
        known.append(sum(json.loads(file.read_text("utf-8"))["documents"] for file in files))
    return min(known, default=None)


def _true(args: Recipe, key: str) -> bool:
    return str(args.get(key, False)).lower() in ("true", "yes", "t", "y", "1")
