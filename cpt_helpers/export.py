"""A checkpoint becomes a Hugging Face folder, is loaded afresh, and held against the trainer.

Nothing of the training state goes along: safetensors weights, configuration, tokenizer.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import hub
from .errors import AssetError, ExportError
from .packing import pack
from .streams import hushed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "bfloat16", "float16", "float32")


def export(checkpoint: Path, target: Path, *, dtype: str = "auto") -> Path:
    """Writes a checkpoint's model as a plain Hugging Face folder; an equal one is left alone.

    Args:
        checkpoint: The Hugging Face checkpoint (``Checkpoint.model``).
        target: The folder to make.
        dtype: ``"auto"`` keeps the precision it was trained in.

    Raises:
        ExportError: The dtype is unknown, or the folder holds another export.
    """
    if dtype not in DTYPES:
        raise ExportError(f"unknown dtype '{dtype}'", expected=", ".join(DTYPES))
    made_from = {"checkpoint": str(checkpoint), "dtype": dtype}
    note = target / "export.json"
    if target.exists():
        if note.is_file() and json.loads(note.read_text("utf-8")) == made_from:
            return target
        raise ExportError(
            "the export folder exists and holds something else",
            where=target,
            expected=f"no folder, or an export of {checkpoint} as {dtype}",
            do="move it away, or export the same again; nothing was changed",
        )
    model, tokenizer = load(checkpoint, dtype=dtype)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        with hushed():  # DeepSpeed's import tells where it runs
            model.save_pretrained(part, safe_serialization=True)
        tokenizer.save_pretrained(part)
        for name in ("preprocessor_config.json", "processor_config.json"):
            if (checkpoint / name).is_file():  # multimodal models need theirs to be served
                shutil.copy(checkpoint / name, part / name)
        (part / "export.json").write_text(json.dumps(made_from, indent=2) + "\n", "utf-8")
        part.chmod(0o755)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def load(folder: str | Path, *, dtype: str = "auto") -> tuple[Any, Any]:
    """A model and its tokenizer in plain transformers, ready to be asked.

    Args:
        folder: A Hugging Face folder, or a name on the hub.
        dtype: ``"auto"`` takes the precision the weights are stored in.

    Raises:
        AssetError: There is no such model, or the hub is out of reach.
    """
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    config = config_of(folder)
    auto = transformers.AutoModelForCausalLM
    if hasattr(config, "vision_config"):
        auto = transformers.AutoModelForImageTextToText
    try:
        model = auto.from_pretrained(
            folder, torch_dtype=dtype if dtype == "auto" else getattr(torch, dtype)
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise _unknown_model(folder, error) from None
    if torch.cuda.is_available():
        model = model.to("cuda")
    return model.eval(), tokenizer


def config_of(model: str | Path) -> Any:
    """A model's configuration, from its folder or the hub.

    Raises:
        AssetError: There is no such model, it is gated, or the hub is out of reach.
    """
    from transformers import AutoConfig

    local = Path(model).is_dir() or Path(model).is_absolute()
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise _unknown_model(model, FileNotFoundError("no config.json in it"))
    if not local:
        hub.ask(str(model))  # transformers goes on asking a dead hub for half a minute
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise _unknown_model(model, error) from None


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    block_size: int,
) -> float:
    """Perplexity over packed text, measured as the trainer measures it.

    Args:
        model: In plain transformers.
        tokenizer: The model's.
        texts: Held-out documents.
        block_size: The training's ``cutoff_len``, in tokens.

    Returns:
        exp of the mean over whole blocks of their mean cross-entropy, one block at a time.
    """
    import torch

    # The trainer leaves padding out of the loss; where padding is the separator, that goes too.
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    blocks = torch.tensor(pack(texts, tokenizer, block_size).blocks, device=model.device)
    means = []
    with torch.inference_mode():
        for block in blocks:
            logits = model(input_ids=block[None]).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, block[1:], ignore_index=padding)
            means.append(loss.item())
    return math.exp(sum(means) / len(means))


def continuation(model: Any, tokenizer: Any, prompt: str, *, new_tokens: int = 40) -> str:
    """What a model adds to a prompt, greedily, so that it is the same every time."""
    import torch

    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=True).to(model.device)
    inputs.pop("token_type_ids", None)
    with torch.inference_mode():
        ids = model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            do_sample=False,
            repetition_penalty=1.1,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def dtype_of(folder: Path) -> str:
    """The precision of the weights in an exported folder."""
    from safetensors import safe_open

    first = sorted(folder.glob("*.safetensors"))[0]
    with safe_open(first, framework="pt") as weights:
        return str(weights.get_tensor(next(iter(weights.keys()))).dtype).removeprefix("torch.")


def _unknown_model(model: str | Path, error: Exception) -> AssetError:
    said = " ".join(str(error).split())
    if "gated" in said.lower() or "401" in said or "403" in said:
        what, do = (
            "is gated: its licence has to be accepted",
            ("accept the licence on its page and set HF_TOKEN in the environment"),
        )
    elif Path(model).is_absolute() or Path(model).is_dir():
        what, do = "is no model folder", "correct model_name_or_path, or run 01_setup to fetch it"
    else:
        what, do = (
            "is not known, or the hub is out of reach",
            ("correct model_name_or_path, or download the model and give its folder"),
        )
    return AssetError(
        f"the model '{model}' {what}",
        where=said[:200],
        expected="a folder with config.json and safetensors, or a name on the Hugging Face hub",
        do=do,
    )
