"""The model card of an export: its base model, data, training and measurements, as recorded.

The layout is in ``README.md.jinja``.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

from .. import recipes
from ..errors import ExportError
from ..recipes import Recipe, names_of
from ..run import Run
from ..setup import assets, models
from .huggingface import CARD, NOTE
from .report import render

_LICENSE_FILES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")
_LICENSE_TEXTS = {  # the beginning of a licence's text, and the hub's name for it
    r"Apache License\s+Version 2\.0": "apache-2.0",
    r"MIT License": "mit",
    r"BSD 3-Clause License": "bsd-3-clause",
}


def write(run: Run, export_folder: Path, exported: dict[str, Any]) -> Path:
    """Writes ``README.md``, a Hugging Face model card, from the records of the run.

    The card names the base model's licence, and the licence files are copied next to it.

    Args:
        run: The run.
        export_folder: From :func:`huggingface.write_model`.
        exported: The export's ``step``, ``dtype`` and ``perplexity``.

    Returns:
        The card.

    Raises:
        ExportError: There is no export in that folder.
        ConfigError: The run has no resolved recipe.
    """
    note = export_folder / NOTE
    if not note.is_file():
        raise ExportError(
            "there is no export to write a card for",
            where=export_folder,
            expected=f"a folder with {NOTE}",
            do="run notebook 06_export",
        )
    form = json.loads(note.read_text("utf-8")).get("form", "merged")
    recipe, results, events = recipes.load(run), run.results(), run.events()
    last = {event["event"]: event for event in events}
    base = str(recipe["model_name_or_path"])
    public_base = Path(base).name if Path(base).is_absolute() else base
    license_ = _license(base)
    for pattern in _LICENSE_FILES:  # most licences require that their text is passed on
        for path in Path(base).glob(pattern) if Path(base).is_dir() else ():
            shutil.copy(path, export_folder / path.name)
    return render(
        export_folder / CARD,
        front_matter=_front_matter(recipe, public_base, form, license_),
        name=run.name,
        base=public_base,
        form=form,
        license=license_.get("license_name") or license_.get("license"),
        recipe=recipe,
        results=results,
        exported=exported,
        events=events,
        start=last.get("start", {}),
        step=last.get("step", {}),
    )


def _front_matter(recipe: Recipe, base: str, form: str, license_: dict[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    tags = ["continued-pretraining", "llama-factory", "deepspeed", "ray"]
    tags += ["lora"] * (recipe.method == "lora") + ["peft"] * (form == "adapter")
    return ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
        datasets=names_of(recipe.get("dataset")),
        **license_,
    ).to_yaml()


def _license(base: str) -> dict[str, Any]:
    """The base model's licence as keys of a card's front matter; empty where it is not known.

    The sources are the model's own card, then a licence file, then the list of embedded models.
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
    # A card is optional, so any error means that the licence is not known.
    with contextlib.suppress(Exception):
        if not Path(base).is_absolute() and not Path(base).is_dir():
            cached = try_to_load_from_cache(base, "README.md")
            if not isinstance(cached, str):
                card = model_info(base, timeout=models.HUB_TIMEOUT).card_data
                return card.to_dict() if card else {}
            path = Path(cached)
        return metadata_load(path) or {}
    return {}
