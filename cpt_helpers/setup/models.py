"""A model in plain transformers: looked at by its files, loaded afresh, and asked.

Any Hugging Face folder or name on the hub will do, before training or after, and so will a folder
with a LoRA adapter, which names its base. Nothing of the trainer has a part in it.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AssetError, ExportError
from ..redirect import hushed
from . import hub
from .assets import sha256

if TYPE_CHECKING:
    pass

ADAPTER = "adapter_config.json"  # a folder with this file holds an adapter
BASE = "base_model.json"  # beside it: which weights it was trained on, as the worker wrote it


def load(folder: str | Path, *, dtype: str = "auto") -> tuple[Any, Any]:
    """A model and its tokenizer in plain transformers, ready to be asked.

    Args:
        folder: A Hugging Face folder (one that :mod:`quantize` wrote too), a name on the hub, or a
            folder with a LoRA adapter, which is put on the base it names.
        dtype: ``"auto"`` takes the precision the weights (of an adapter: its base's) are stored in.

    Raises:
        AssetError: There is no such model, or the hub is out of reach.
        ExportError: An adapter is not its base's.
    """
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    base = require_base(Path(folder)) if (Path(folder) / ADAPTER).is_file() else folder
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
    if getattr(model.config, "quantization_config", None):
        from compressed_tensors.quantization import disable_quantization

        # The first pass unpacks the weights; they would be rounded once more in each one after it.
        model.apply(disable_quantization)
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


def base_of(folder: Path) -> str:
    """The base model an adapter names; empty where the folder holds no adapter."""
    if not (folder / ADAPTER).is_file():
        return ""
    return json.loads((folder / ADAPTER).read_text("utf-8")).get("base_model_name_or_path") or ""


def require_base(folder: Path) -> str:
    """The base an adapter names, after a look at whether it is the one it was trained on.

    Its layers must be as wide as the adapter's, and where the adapter's folder says so, its weights
    must be the same.

    Raises:
        AssetError: The base is not there.
        ExportError: It is another model than the adapter was trained on.
    """
    base = base_of(folder)
    try:
        modules = dict(empty(config_of(base)).named_modules())
    except AssetError as error:
        raise AssetError(
            f"the base model of the adapter is not there: '{base}'",
            where=folder / ADAPTER,
            expected=error.what,
            do="bring that model back, or name where it is as base_model_name_or_path",
        ) from None
    for name, (shape, _) in shapes_of(folder).items():
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
    trained_on = json.loads((folder / BASE).read_text("utf-8")) if (folder / BASE).is_file() else {}
    if trained_on and Path(base).is_dir() and weights_sha256(Path(base)) != trained_on["sha256"]:
        raise ExportError(
            f"the adapter is of another model than '{base}': the same layers, other weights",
            where=folder / BASE,
            expected=f"the weights it was trained on, those of '{trained_on['name']}' at that time "
            f"(sha256 {trained_on['sha256'][:12]}…)",
            do="correct base_model_name_or_path in adapter_config.json",
        )
    return base


def note_base(folder: Path, base: str, digest: str) -> None:
    """Writes beside an adapter which weights it was trained on.

    Args:
        folder: The adapter's.
        base: The base as the recipe names it.
        digest: The sha256 of its weights (:func:`weights_sha256`).
    """
    (folder / BASE).write_text(json.dumps({"name": base, "sha256": digest}) + "\n", "utf-8")


def weights_sha256(folder: Path) -> str:
    """The sha256 of a folder's weights, all files as one; of nothing where there are none."""
    each = [sha256(path) for path in sorted(folder.glob("*.safetensors"))]
    return each[0] if len(each) == 1 else hashlib.sha256(" ".join(each).encode()).hexdigest()


def empty(config: Any) -> Any:
    """A model's modules without any storage, to know its shapes.

    Args:
        config: Its ``transformers`` configuration.
    """
    import torch

    with torch.device("meta"):
        return _auto_class(config).from_config(config)


def weights_of(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights, its adapter's where it is LoRA's."""
    if (folder / ADAPTER).is_file():
        return [folder / "adapter_model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        return [folder / name for name in sorted(named)]
    return [folder / "model.safetensors"]


def shapes_of(folder: Path) -> dict[str, tuple[list[int], str]]:
    """Each tensor's shape and dtype (``"BF16"``, as safetensors names it), from the headers."""
    from safetensors import safe_open

    found = {}
    for path in weights_of(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, it is no dict
                part = file.get_slice(name)
                found[name] = (part.get_shape(), part.get_dtype())
    return found


def continued(folder: str | Path, prompt: str) -> str:
    """What a stored model adds to a prompt; the model is released afterwards.

    Args:
        folder: As for :func:`load`.
        prompt: The text to continue.

    Raises:
        AssetError: There is no such model, or the hub is out of reach.
    """
    model, tokenizer = load(folder)
    said = continuation(model, tokenizer, prompt)
    del model
    release()
    return said


def release() -> None:
    """Gives the memory of models that no variable holds back, a GPU's to other processes too."""
    import torch

    gc.collect()  # models are in reference cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def continuation(model: Any, tokenizer: Any, prompt: str, *, new_tokens: int = 40) -> str:
    """What a model adds to a prompt, greedily, so that it is the same every time.

    It ends at the first special token: after a separator or a chat token another text begins.
    """
    import torch

    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=True).to(model.device)
    inputs.pop("token_type_ids", None)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    with torch.inference_mode():
        ids = model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            do_sample=False,
            repetition_penalty=1.1,
            eos_token_id=sorted(special | {tokenizer.eos_token_id}),
            pad_token_id=tokenizer.eos_token_id,  # one prompt: nothing is padded
        )
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def copy_processor(source: Path, target: Path) -> None:
    """Copies how images become tensors, where a folder says: servers of such models ask for it."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (source / name).is_file():
            shutil.copy(source / name, target / name)


def _auto_class(config: Any) -> Any:
    import transformers

    if hasattr(config, "vision_config"):
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


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
