"""The model card of an export: what it was made from, how, and what was measured, as recorded."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

from .. import recipes
from ..config.resolution import names_of
from ..errors import ExportError
from ..recipes import Recipe
from ..run import Run
from ..setup import assets, models

_MISSING = "not recorded"
_LICENSE_FILES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")
_LICENSE_TEXTS = {  # how a licence's text begins, and the hub's name for it
    r"Apache License\s+Version 2\.0": "apache-2.0",
    r"MIT License": "mit",
    r"BSD 3-Clause License": "bsd-3-clause",
}


def write(run: Run, export_folder: Path, exported: dict[str, Any]) -> Path:
    """Writes ``README.md``, a Hugging Face model card, from the run's own records.

    The base model's licence goes along: its name in the card, its files beside it.

    Args:
        run: Whose model it is.
        export_folder: As :func:`export.export` made it.
        exported: The export's ``step``, ``dtype``, ``perplexity``, measured again.

    Returns:
        The card.

    Raises:
        ExportError: There is no export in that folder.
        ConfigError: The run has no resolved recipe.
    """
    note = export_folder / "export.json"
    if not note.is_file():
        raise ExportError(
            "there is no export to write a card for",
            where=export_folder,
            expected="a folder that export.export made, with export.json",
            do="run notebook 06_export",
        )
    form = json.loads(note.read_text("utf-8")).get("form", "merged")
    args, results = recipes.load(run), run.results()
    base = str(args["model_name_or_path"])
    license_ = _license(base)
    for pattern in _LICENSE_FILES:  # most licences ask for their text to go along
        for path in Path(base).glob(pattern) if Path(base).is_dir() else ():
            shutil.copy(path, export_folder / path.name)
    parts = [
        _front_matter(args, base, license_, form),
        f"# {run.name}\n\n{_said(args, base, form)}",
        "## Use\n\n" + _use(base, form),
        "## Data\n\n" + _table(_data(args, results)),
        "## Training\n\n" + _table(_training(run, args, results)),
        "## Figures\n\n" + _figures(run, args, results, exported),
        "## Versions\n\n" + _table(list(results.get("versions", {}).items())),
        "## Limits\n\n" + _limits(results, license_),
    ]
    card = export_folder / "README.md"
    part = card.with_name(".README.md")
    part.write_text("\n\n".join(parts) + "\n", "utf-8")
    part.replace(card)
    return card


def public_name(model: str) -> str:
    """A model's name without the folders of the machine it lay on."""
    return Path(model).name if Path(model).is_absolute() else model


def _front_matter(args: Recipe, base: str, license_: dict[str, Any], form: str) -> str:
    import yaml

    matter: dict[str, Any] = {"base_model": public_name(base)} | license_
    matter["library_name"] = "transformers"
    matter["pipeline_tag"] = "text-generation"
    matter["tags"] = ["continued-pretraining", "llama-factory", "deepspeed", "ray"]
    if args.method == "lora":
        matter["tags"] += ["lora", *(["peft"] if form == "adapter" else [])]
    matter["datasets"] = names_of(args.get("dataset"))
    return "---\n" + yaml.safe_dump(matter, sort_keys=False, allow_unicode=True) + "---"


def _license(base: str) -> dict[str, Any]:
    """The base model's licence as a card's front matter says it; empty where it is not known.

    The model's own card is asked first, then a licence file beside it, then what is known of the
    embedded models.
    """
    card = _card_of(base)
    keys = ("license", "license_name", "license_link")
    if card.get("license"):
        return {key: card[key] for key in keys if card.get(key)}
    if Path(base).is_dir():
        for pattern in _LICENSE_FILES[:3]:
            for path in sorted(Path(base).glob(pattern)):
                head = path.read_text("utf-8", errors="replace")[:500]
                known = [name for text, name in _LICENSE_TEXTS.items() if re.search(text, head)]
                if known:
                    return {"license": known[0]}
                return {
                    "license": "other",
                    "license_name": "license-file",
                    "license_link": path.name,
                }
    embedded = assets.MODELS.get(Path(base).name)
    return {"license": embedded.licence.lower()} if embedded else {}


def _card_of(base: str) -> dict[str, Any]:
    """The front matter of a model's card, in its folder or on the hub; empty without one."""
    from huggingface_hub import model_info, try_to_load_from_cache
    from huggingface_hub.repocard import metadata_load

    path = Path(base) / "README.md"
    # A card is not needed to train: whatever is wrong with it, the licence is not known.
    with contextlib.suppress(Exception):
        if not Path(base).is_absolute() and not Path(base).is_dir():
            cached = try_to_load_from_cache(base, "README.md")
            if not isinstance(cached, str):
                card = model_info(base, timeout=models.HUB_TIMEOUT).card_data
                return card.to_dict() if card else {}
            path = Path(cached)
        return metadata_load(path) or {}
    return {}


def _said(args: Recipe, base: str, form: str) -> str:
    kind = args.method
    trained = {"full": "all weights", "freeze": "some layers", "lora": "a LoRA adapter"}
    what = "The adapter alone." if form == "adapter" else "A model that stands alone."
    merged = " The adapter is merged into it." if (kind, form) == ("lora", "merged") else ""
    return (
        f"`{public_name(base)}`, pre-trained further on raw text; trained were "
        f"{trained.get(kind, kind)}. {what}{merged}"
    )


def _use(base: str, form: str) -> str:
    if form == "adapter":
        code = (
            "from peft import PeftModel\n"
            "from transformers import AutoModelForCausalLM\n"
            f'base = AutoModelForCausalLM.from_pretrained("{public_name(base)}")\n'
            'model = PeftModel.from_pretrained(base, "path/to/this/folder")'
        )
    else:
        code = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")\n'
            'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")'
        )
    return f"```python\n{code}\n```"


def _data(args: Recipe, results: dict[str, Any]) -> list[tuple[str, Any]]:
    data = results.get("data", {})
    tokenised = args.get("tokenized_path")
    return [
        ("trained on", ", ".join(names_of(args.get("dataset")))),
        ("documents", data.get("documents")),
        ("tokens in them", data.get("tokens")),
        ("documents held out", data.get("heldout_documents")),
        ("measured on", ", ".join(names_of(args.get("eval_dataset")))),
        ("tokenised data", Path(tokenised).name if tokenised else None),
    ]


def _training(run: Run, args: Recipe, results: dict[str, Any]) -> list[tuple[str, Any]]:
    train, events = results.get("train", {}), run.events()
    start = next((e for e in reversed(events) if e["event"] == "start"), {})
    last = next((e for e in reversed(events) if e["event"] == "step"), {})
    sizes = start.get("parameters", {})
    date = time.strftime("%Y-%m-%d", time.gmtime(events[-1]["time"])) if events else None
    stage = start.get("zero_stage") if start else None
    return [
        ("date (UTC)", date),
        ("fine-tuning type", args.method),
        ("parameters trained", sizes.get("trained")),
        ("parameters in all", sizes.get("all")),
        ("learning rate", args.get("learning_rate")),
        ("steps", last.get("step")),
        ("blocks a step (global batch)", args.global_batch),
        ("tokens a block (cutoff_len)", args.block_size),
        ("precision", next((k for k in ("bf16", "fp16") if args.get(k)), "fp32")),
        ("workers", start.get("world_size")),
        ("ZeRO stage", stage),
        ("seconds", train.get("seconds")),
        ("tokens/s", train.get("tokens_per_second")),
    ]


def _figures(run: Run, args: Recipe, results: dict[str, Any], exported: dict[str, Any]) -> str:
    measured, again = results.get("perplexity", {}), exported.get("perplexity", {})
    lines = [
        f"Perplexity, of the checkpoint after step {exported.get('step', _MISSING)}, "
        f"exported in {exported.get('dtype', _MISSING)}. «Before» and «after» are the trainer's, "
        "at the training's begin and end; «export» is the exported folder's, measured again.\n",
        "| held-out text | before | after | export |",
        "|---|---|---|---|",
    ]
    for role, name in args.held_out.items():
        own = measured.get(role) or {}
        cells = [own.get("before"), own.get("after"), again.get(role)]
        lines.append(f"| {role}: {name} | " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines)


def _limits(results: dict[str, Any], license_: dict[str, Any]) -> str:
    said = [
        "Measured was perplexity on the held-out texts above, and nothing else: no downstream "
        "tasks, no safety, no bias.",
        "It was trained to continue text, not to follow instructions.",
    ]
    if not results.get("perplexity"):
        said.append("The run recorded no perplexity before and after.")
    if license_:
        named = license_.get("license_name") or license_["license"]
        said.append(f"The licence of the base model, {named}, holds for this model too.")
    else:
        said.append(
            "The licence of the base model is not known here: look at its own page, it holds for "
            "this model too."
        )
    return "\n".join(f"- {line}" for line in said)


def _table(rows: list[tuple[str, Any]]) -> str:
    if not rows:
        return f"{_MISSING[0].upper()}{_MISSING[1:]}."
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_cell(v)} |" for name, v in rows)])


def _cell(value: Any) -> str:
    if value is None or value == "":
        return _MISSING
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
