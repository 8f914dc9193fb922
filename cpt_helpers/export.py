"""A checkpoint becomes a Hugging Face folder, is loaded afresh, and held against the trainer.

Nothing of the training state goes along: safetensors weights, configuration, tokenizer. What LoRA
trained is merged into its base, or goes alone, as an adapter that names its base.
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
from .assets import sha256
from .checkpoints import MANIFEST
from .environment import require_room
from .errors import AssetError, CheckpointError, ExportError
from .packing import pack
from .streams import hushed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "bfloat16", "float16", "float32")
FORMS = ("merged", "adapter")
_ADAPTER = "adapter_config.json"
_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "BF16": 2, "F16": 2, "F32": 4}


def export(checkpoint: Path, target: Path, *, dtype: str = "auto", form: str = "merged") -> Path:
    """Writes a checkpoint's model as a plain Hugging Face folder; an equal one is left alone.

    Args:
        checkpoint: The Hugging Face checkpoint (``Checkpoint.model``).
        target: The folder to make.
        dtype: ``"auto"`` keeps the precision it was trained in; what LoRA trained is merged into
            the precision its base is stored in.
        form: ``"merged"``, a model that stands alone, or ``"adapter"``, what LoRA trained alone.

    Raises:
        ExportError: The dtype or form is unknown, the folder holds another export, there is no
            adapter to export, or it is not its base's.
        CheckpointError: The checkpoint is missing or broken.
        AssetError: An adapter's base is not there.
        StorageError: There is too little room.
    """
    for name, value, known in (("dtype", dtype, DTYPES), ("form", form, FORMS)):
        if value not in known:
            raise ExportError(f"unknown {name} '{value}'", expected=", ".join(known))
    made_from = {"checkpoint": str(checkpoint), "dtype": dtype, "form": form}
    if _is_there(target, made_from):
        return target
    _require_whole(checkpoint)
    lora = (checkpoint / _ADAPTER).is_file()
    if form == "adapter" and not lora:
        raise ExportError(
            "there is no adapter in this checkpoint: all that was trained are the model's weights",
            where=checkpoint,
            expected=f"a LoRA checkpoint, with {_ADAPTER}",
            do="export it with form 'merged'",
        )
    if lora:
        _require_base(checkpoint)
    existing = next(p for p in target.absolute().parents if p.is_dir())
    need = _size(checkpoint, dtype, form) / 2**30
    require_room(existing, need, f"room for the export ({form}, {dtype})")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        (_write_adapter if form == "adapter" else _write_model)(checkpoint, part, dtype)
        (part / "export.json").write_text(json.dumps(made_from, indent=2) + "\n", "utf-8")
        part.chmod(0o755)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def load(folder: str | Path, *, dtype: str = "auto") -> tuple[Any, Any]:
    """A model and its tokenizer in plain transformers, ready to be asked.

    Args:
        folder: A Hugging Face folder, a name on the hub, or a folder with a LoRA adapter, which is
            put on the base it names.
        dtype: ``"auto"`` takes the precision the weights (of an adapter: its base's) are stored in.

    Raises:
        AssetError: There is no such model, or the hub is out of reach.
        ExportError: An adapter is not its base's.
    """
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    base = _require_base(Path(folder)) if (Path(folder) / _ADAPTER).is_file() else folder
    auto = _auto_class(config_of(base))
    try:
        model, info = auto.from_pretrained(
            base,
            torch_dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            output_loading_info=True,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise _unknown_model(folder, error) from None
    tied = model._tied_weights_keys or [] if model.config.tie_word_embeddings else []
    if missing := sorted(set(info["missing_keys"]) - set(tied)):  # they would be random numbers
        raise _unknown_model(base, KeyError(f"without the weights {', '.join(missing[:3])}"))
    if base is not folder:
        import peft

        with hushed():
            model = peft.PeftModel.from_pretrained(model, str(folder))
    if torch.cuda.is_available():
        model = model.to("cuda")
    return model.eval(), tokenizer


def base_of(folder: Path) -> str:
    """The base model an adapter names; empty where the folder holds no adapter."""
    if not (folder / _ADAPTER).is_file():
        return ""
    return json.loads((folder / _ADAPTER).read_text("utf-8")).get("base_model_name_or_path") or ""


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


def _is_there(target: Path, made_from: dict[str, str]) -> bool:
    """Whether that very export is there already; another one, or anything else, is refused."""
    if not target.exists():
        return False
    try:
        note = json.loads((target / "export.json").read_text("utf-8"))
        if {"form": "merged"} | note == made_from:  # notes of old do not name a form
            return True
    except (OSError, ValueError, TypeError):
        pass
    raise ExportError(
        "the export folder exists and holds something else",
        where=target,
        expected="no folder, or an export of {checkpoint} as {dtype}, {form}".format(**made_from),
        do="move it away, or export the same again; nothing was changed",
    )


def _weights(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights, its adapter's where it is LoRA's."""
    if (folder / _ADAPTER).is_file():
        return [folder / "adapter_model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        return [folder / name for name in sorted(named)]
    return [folder / "model.safetensors"]


def _require_whole(checkpoint: Path) -> None:
    """Reads what the weights' files say of themselves, and compares them with the manifest."""
    reason = "there is no such folder" if not checkpoint.is_dir() else ""
    try:
        files = _weights(checkpoint) if not reason else []
        needed = _ADAPTER if (checkpoint / _ADAPTER).is_file() else "config.json"
        named = {}
        if (checkpoint.parent / MANIFEST).is_file():
            named = json.loads((checkpoint.parent / MANIFEST).read_text("utf-8"))["files"]
        for path in [checkpoint / needed, checkpoint / "tokenizer_config.json", *files]:
            written = named.get(f"{checkpoint.name}/{path.name}")
            if not reason and not path.is_file():
                reason = f"{path.name} is missing"
            elif not reason and written and sha256(path) != written["sha256"]:
                reason = f"{path.name} is not what was written: its sha256 differs"
        if not reason:
            _shapes(checkpoint)
            json.loads((checkpoint / needed).read_text("utf-8"))
    except Exception as error:  # safetensors has an error of its own, derived from Exception
        reason = f"it cannot be read: {' '.join(str(error).split())[:200]}"
    if reason:
        raise CheckpointError(
            f"the checkpoint cannot be exported: {reason}",
            where=checkpoint,
            expected="a Hugging Face checkpoint with configuration, tokenizer and safetensors",
            do="export another one (checkpoints.pick passes broken ones over); nothing was written",
        )


def _shapes(folder: Path) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype of each tensor, from the files' headers."""
    from safetensors import safe_open

    found = {}
    for path in _weights(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, it is no dict
                part = file.get_slice(name)
                found[name] = (part.get_shape(), part.get_dtype())
    return found


def _auto_class(config: Any) -> Any:
    import transformers

    if hasattr(config, "vision_config"):
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def _empty(base: str) -> Any:
    """A model's modules without any storage, to know its shapes."""
    import torch

    config = config_of(base)
    with torch.device("meta"):
        return _auto_class(config).from_config(config)


def _require_base(folder: Path) -> str:
    """The base an adapter names, after a look at whether its layers are those of the adapter."""
    base = base_of(folder)
    try:
        modules = dict(_empty(base).named_modules())
    except AssetError as error:
        raise AssetError(
            f"the base model of the adapter is not there: '{base}'",
            where=folder / _ADAPTER,
            expected=error.what,
            do="bring that model back, or name where it is as base_model_name_or_path",
        ) from None
    for name, (shape, _) in _shapes(folder).items():
        layer, _, half = name.removeprefix("base_model.model.").rpartition(".lora_")
        if half not in ("A.weight", "B.weight"):
            continue
        weight = getattr(modules.get(layer), "weight", None)
        theirs = None if weight is None else weight.shape[1 if half[0] == "A" else 0]
        if theirs != (ours := shape[1 if half[0] == "A" else 0]):
            found = "has no such layer" if theirs is None else f"is {theirs} wide there"
            raise ExportError(
                f"the adapter is of another model than '{base}'",
                where=f"{folder}: {layer} is {ours} wide; the base {found}",
                expected="the model it was trained on",
                do="correct base_model_name_or_path in adapter_config.json",
            )
    return base


def _size(checkpoint: Path, dtype: str, form: str) -> int:
    """Bytes the export's weights will take."""
    if form == "merged" and (base := base_of(checkpoint)):
        stored = str(getattr(config_of(base), "torch_dtype", None)).removeprefix("torch.")
        width = _BYTES.get(stored if dtype == "auto" else dtype, 4)
        return width * sum(p.numel() for p in _empty(base).parameters())
    shapes = _shapes(checkpoint).values()
    return sum(
        math.prod(shape) * _BYTES.get(own if dtype == "auto" else dtype, 4) for shape, own in shapes
    )


def _write_model(checkpoint: Path, part: Path, dtype: str) -> None:
    import torch

    base = base_of(checkpoint)
    # Merged in fp32 and rounded once: sums in bf16 would lose what a small adapter adds.
    model, tokenizer = load(checkpoint, dtype="float32" if base else dtype)
    if base:
        model = model.merge_and_unload()
        stored = getattr(config_of(base), "torch_dtype", None) or torch.float32
        model = model.to(stored if dtype == "auto" else getattr(torch, dtype))
    with hushed():  # DeepSpeed's import tells where it runs
        model.save_pretrained(part, safe_serialization=True)
    tokenizer.save_pretrained(part)
    for name in ("preprocessor_config.json", "processor_config.json"):
        for folder in [Path(base), checkpoint] if base else [checkpoint]:
            if (folder / name).is_file():  # multimodal models need theirs to be served
                shutil.copy(folder / name, part / name)


def _write_adapter(checkpoint: Path, part: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    weights = load_file(checkpoint / "adapter_model.safetensors")
    if dtype != "auto":
        weights = {name: w.to(getattr(torch, dtype)) for name, w in weights.items()}
    save_file(weights, part / "adapter_model.safetensors", {"format": "pt"})
    shutil.copy(checkpoint / _ADAPTER, part / _ADAPTER)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(part)


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
