"""Models in plain transformers: load, describe, continue a prompt; adapters; the hub.

A model is a Hugging Face folder, a name on the hub, or a folder with a LoRA adapter, which names
its base model. The trainer's code is not used here. Functions that read a model raise `AssetError`
where it does not exist, is gated, or the hub does not answer.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from ..errors import AssetError, ExportError
from ..redirect import hushed
from .assets import sha256, tokenizer_of
from .machine import Facts

ADAPTER = "adapter_config.json"  # a folder with this file holds an adapter
BASE = "base_model.json"  # next to it: the digest of the base's weights, written by the worker
HUB_TIMEOUT = 8.0  # seconds


def describe_model(model: str | Path) -> Facts:
    """Architecture and sizes of a model, from its configuration; no weights are loaded."""
    config = config_of(model)
    modules, text = empty(config), config.get_text_config()
    modules.tie_weights()
    return Facts(
        {
            "model": str(model),
            "architecture": type(modules).__name__,
            "parameters": sum(p.numel() for p in modules.parameters()),
            "layers": text.num_hidden_layers,
            "hidden size": text.hidden_size,
            "context (tokens)": getattr(text, "max_position_embeddings", None),
        }
    )


def describe_tokenizer(model: str) -> Facts:
    """Vocabulary and special tokens of a model."""
    tokenizer = tokenizer_of(model)
    # Llama 3 forces BOS without an attribute ``add_bos_token``, so the tokenizer's output decides.
    forces_bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return Facts(
        {
            "vocabulary (tokens)": len(tokenizer),
            "document separator (EOS)": tokenizer.eos_token,
            "its id": tokenizer.eos_token_id,
            "forced first token (BOS)": tokenizer.bos_token if forces_bos else None,
            "padding token (blocks are never padded)": tokenizer.pad_token,
        }
    )


def load(folder: str | Path, *, dtype: str = "auto") -> tuple[Any, Any]:
    """A model and its tokenizer in plain transformers, ready for inference.

    Args:
        folder: A Hugging Face folder (quantized or not), a name on the hub, or a folder with a
            LoRA adapter, which is loaded onto the base that it names.
        dtype: ``"auto"`` takes the precision of the stored weights (an adapter: of its base's).

    Raises:
        ExportError: The adapter was trained on another base.
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
        raise _unknown_model(base, KeyError(f"the weights {', '.join(missing[:3])} are missing"))
    if base is not folder:
        import peft

        with hushed():
            model = peft.PeftModel.from_pretrained(model, str(folder))
    if getattr(model.config, "quantization_config", None):
        from compressed_tensors.quantization import disable_quantization

        # The first pass unpacks the weights. Each later pass would round them once more.
        model.apply(disable_quantization)
    if torch.cuda.is_available():
        model = model.to("cuda")
    return model.eval(), tokenizer


def continue_text(folder: str | Path, prompt: str) -> str:
    """Loads a model, continues a prompt, and releases the model's memory."""
    model, tokenizer = load(folder)
    text = continuation(model, tokenizer, prompt)
    del model
    release()
    return text


def continuation(model: Any, tokenizer: Any, prompt: str, *, new_tokens: int = 40) -> str:
    """A model's continuation of a prompt; greedy decoding gives the same text every time.

    It ends at the first special token: another document or a chat turn begins there.
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
            pad_token_id=tokenizer.eos_token_id,  # unused with one prompt
        )
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def release() -> None:
    """Frees the memory of models that no variable refers to, on the GPU too."""
    import torch

    gc.collect()  # models are in reference cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def config_of(model: str | Path) -> Any:
    """The transformers configuration of a model folder or of a name on the hub."""
    from transformers import AutoConfig

    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise _unknown_model(model, FileNotFoundError("it has no config.json"))
    if not Path(model).is_dir() and not Path(model).is_absolute():
        ask_hub(str(model))  # transformers itself retries for half a minute
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise _unknown_model(model, error) from None


def empty(config: Any) -> Any:
    """A model of a transformers configuration without storage for its weights: its shapes."""
    import torch

    with torch.device("meta"):
        return _auto_class(config).from_config(config)


def ask_hub(name: str) -> str:
    """Asks the Hugging Face hub for a model's configuration file, without downloading it.

    Args:
        name: ``organisation/name``.

    Returns:
        The answer, as a sentence.

    Raises:
        AssetError: The model does not exist or is gated, or the hub does not answer and the local
            cache does not hold the model.
    """
    import requests
    from huggingface_hub import constants, errors, get_token, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    token = get_token()  # of the environment, or of `huggingface-cli login`
    named = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "the token of `huggingface-cli login`"
    page = f"{constants.ENDPOINT}/{name}"
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        # huggingface_hub's own call takes half a minute where the hub does not answer.
        headers = build_hf_headers(token=token or False)
        url = hf_hub_url(name, "config.json")
        hf_raise_for_status(requests.head(url, headers=headers, timeout=HUB_TIMEOUT))
        return f"{name} is on the hub, and {named if token else 'anyone'} may read it"
    except errors.GatedRepoError:
        what = f"the model {name} is gated, and "
        what += f"{named} is not allowed to read it" if token else "there is no HF_TOKEN"
        expected = "a token of an account that has accepted the licence"
        do = f"accept the licence at {page}, create a token with permission to read, and `export "
        do += "HF_TOKEN=…` (or `huggingface-cli login`) before starting"
    except (errors.RepositoryNotFoundError, errors.EntryNotFoundError):
        readable = f"none that {named} may read" if token else "none that is readable without token"
        what = f"the hub has no model {name}, or {readable}"
        expected = "organisation/name of a model, or a folder"
        do = "correct model_name_or_path, or `export HF_TOKEN=…` for a private model"
    except (OSError, errors.HfHubHTTPError) as error:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return f"{name} is in the local cache (the hub is offline or does not answer)"
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        what = f"the hub cannot be asked for the model {name}, and the local cache does not hold "
        what += f"it: {reason}"
        expected = "a hub that answers, or a folder as model_name_or_path"
        do = "check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or give a folder"
    raise AssetError(what, where=page, expected=expected, do=do)


def base_of(folder: Path) -> str:
    """The base model that an adapter names; empty where the folder holds no adapter."""
    return _read_json(folder / ADAPTER).get("base_model_name_or_path") or ""


def require_base(folder: Path) -> str:
    """The base model that an adapter names, after a check that the adapter was trained on it.

    The base's layers must have the adapter's widths. Where :data:`BASE` exists, the base must also
    have the same weights.

    Raises:
        AssetError: The base does not exist.
        ExportError: The adapter was trained on another model.
    """
    base = base_of(folder)
    try:
        modules = dict(empty(config_of(base)).named_modules())
    except AssetError as error:
        raise AssetError(
            f"the base model of the adapter does not exist: '{base}'",
            where=folder / ADAPTER,
            expected=error.what,
            do="restore that model, or write its new path as base_model_name_or_path",
        ) from None
    for name, (shape, _) in shapes_of(folder).items():
        layer, _, half = name.removeprefix("base_model.model.").rpartition(".lora_")
        if half not in ("A.weight", "B.weight"):
            continue
        axis = 1 if half[0] == "A" else 0
        weight = getattr(modules.get(layer), "weight", None)
        if weight is None or weight.shape[axis] != shape[axis]:
            width = "has no such layer" if weight is None else f"has width {weight.shape[axis]}"
            raise _wrong_base(
                f"the adapter is of another model than '{base}'",
                f"{folder}: {layer} has width {shape[axis]}; the base {width}",
                "the model that the adapter was trained on",
            )
    recorded = _read_json(folder / BASE)
    if recorded and Path(base).is_dir() and weights_sha256(Path(base)) != recorded["sha256"]:
        raise _wrong_base(
            f"the adapter is of another model than '{base}': the same layers, other weights",
            folder / BASE,
            f"the weights of '{recorded['name']}' at the time of the training "
            f"(sha256 {recorded['sha256'][:12]}…)",
        )
    return base


def note_base(folder: Path, base: str, digest: str) -> None:
    """Records next to an adapter the name and the :func:`weights_sha256` of its base."""
    (folder / BASE).write_text(json.dumps({"name": base, "sha256": digest}) + "\n", "utf-8")


def weights_sha256(folder: Path) -> str:
    """One sha256 for all weight files of a folder; that of no bytes where there are none."""
    each = [sha256(path) for path in sorted(folder.glob("*.safetensors"))]
    return each[0] if len(each) == 1 else hashlib.sha256(" ".join(each).encode()).hexdigest()


def weights_of(folder: Path) -> list[Path]:
    """The weight files of a checkpoint; for LoRA, those of the adapter."""
    if (folder / ADAPTER).is_file():
        return [folder / "adapter_model.safetensors"]
    index = _read_json(folder / "model.safetensors.index.json")
    names = set(index["weight_map"].values()) if index else {"model.safetensors"}
    return [folder / name for name in sorted(names)]


def shapes_of(folder: Path) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype (``"BF16"``, as safetensors writes it) of each tensor, from the headers."""
    from safetensors import safe_open

    shapes = {}
    for path in weights_of(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, it is not a dict
                part = file.get_slice(name)
                shapes[name] = (part.get_shape(), part.get_dtype())
    return shapes


def copy_processor(source: Path, target: Path) -> None:
    """Copies the image processor's settings where there are any: servers need them."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (source / name).is_file():
            shutil.copy(source / name, target / name)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def _auto_class(config: Any) -> Any:
    import transformers

    if hasattr(config, "vision_config"):
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def _wrong_base(what: str, where: object, expected: str) -> ExportError:
    do = "correct base_model_name_or_path in adapter_config.json"
    return ExportError(what, where=where, expected=expected, do=do)


def _unknown_model(model: str | Path, error: Exception) -> AssetError:
    """The error for a model that transformers cannot load."""
    what, do = "cannot be loaded from the hub", "download the model and give its folder"
    if Path(model).is_absolute() or Path(model).is_dir():
        what, do = "is no model folder", "correct model_name_or_path, or run 01_setup to fetch it"
    return AssetError(
        f"the model '{model}' {what}",
        where=" ".join(str(error).split())[:200],
        expected="a folder with config.json and safetensors, or a name on the Hugging Face hub",
        do=do,
    )
