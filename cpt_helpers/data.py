"""A corpus on the storage: read, checked, split by a stable hash, registered, packed.

A corpus is documents; a document is one ``text``. What training sees is neither: documents are
joined by the end-of-sequence token and cut into blocks of ``cutoff_len`` tokens (*packing*).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import assets
from .errors import DataError, nearest
from .run import PROJECT, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REGISTRY = "dataset_info.json"
HELD_OUT = "_heldout"  # the suffix of a corpus's held-out half in the registry
C4_URL = (  # the file of the guide "Continued Pre-Training (CPT) at scale with DeepSpeed"
    "https://anyscale-public-materials.s3.us-west-2.amazonaws.com/"
    "llm-finetuning/llama-factory/datasets/alpaca/c4.jsonl"
)


@dataclass(frozen=True)
class Corpus:
    """A corpus in its two halves, as it lies on the storage.

    Attributes:
        name: Its name in the registry; the held-out half is ``<name>_heldout``.
        source: Where its documents came from.
        folder: Holds ``train.jsonl`` and ``heldout.jsonl``.
        documents: Documents in the training half.
        heldout_documents: Documents in the held-out half.
        characters: Characters in both.
        duplicates: Documents that were dropped because the same text had been read already.
        fraction: The share of documents meant to be held out.
        sha256: Digest of all documents as read.
    """

    name: str
    source: str
    folder: Path
    documents: int
    heldout_documents: int
    characters: int
    duplicates: int
    fraction: float
    sha256: str

    def as_dict(self) -> dict[str, object]:
        """What to keep of it in a run's results."""
        kept = ("source", "documents", "heldout_documents", "duplicates", "sha256")
        return {"corpus": self.name, **{key: getattr(self, key) for key in kept}}

    @property
    def train(self) -> Path:
        return self.folder / "train.jsonl"

    @property
    def heldout(self) -> Path:
        return self.folder / "heldout.jsonl"


@dataclass(frozen=True)
class Builtin:
    """A corpus known by name: how to read it, and the share of it to hold out."""

    description: str
    read: Callable[[], Iterable[str]]
    fraction: float


BUILTIN = {
    "ray_docs": Builtin(
        "docstrings of the installed ray package", lambda: assets.docstrings("ray"), 0.005
    ),
    "news": Builtin("Lee news corpus, 299 articles", assets.news, 0.06),
    "my_cpt_c4": Builtin("the guide's 100 documents of C4", lambda: read_url(C4_URL), 0.1),
}


def prepare(corpus: str, storage: Path, *, fraction: float | None = None) -> Corpus:
    """Reads a corpus, holds documents out, and registers both halves; once per content.

    Args:
        corpus: A name of :data:`BUILTIN`, ``package:<import name>`` (its docstrings), a URL, or the
            path of a JSON Lines file whose lines are objects with a ``text``.
        storage: Where it is kept, in ``corpora/<name>``.
        fraction: Share of documents to hold out; default 1 % to 10 % by corpus, 5 % for your own.

    Raises:
        DataError: The corpus cannot be read, has a bad line, is empty, or its name is taken.
    """
    name, read, default = _source(corpus)
    fraction = default if fraction is None else fraction
    if not 0 < fraction < 1:
        raise DataError(f"held-out fraction {fraction}", expected="a number between 0 and 1")
    texts = [text for text in read() if text.strip()]
    unique = list(dict.fromkeys(texts))
    halves = ([], [])
    for text in unique:
        halves[is_held_out(text, fraction)].append(text)
    found = Corpus(
        name=name,
        source=corpus,
        folder=storage / "corpora" / name,
        documents=len(halves[False]),
        heldout_documents=len(halves[True]),
        characters=sum(map(len, unique)),
        duplicates=len(texts) - len(unique),
        fraction=fraction,
        sha256=hashlib.sha256("\0".join(unique).encode("utf-8", "surrogatepass")).hexdigest(),
    )
    if not halves[False] or not halves[True]:
        raise DataError(
            f"'{corpus}' has {len(unique)} documents: too few to hold out {fraction:.0%} of them",
            expected="at least one document to train on and one to measure with",
            do="give more documents, or hold out a larger fraction",
        )
    _store(found, halves)
    register(storage / REGISTRY, _entries(name))
    return found


def load(name: str, storage: Path) -> Corpus:
    """A corpus that has been prepared.

    Raises:
        DataError: It has not.
    """
    path = storage / "corpora" / name / "corpus.json"
    if not path.is_file():
        raise DataError(
            f"the corpus '{name}' is not on the storage",
            where=path,
            do="run notebook 02_data with it",
        )
    return Corpus(**json.loads(path.read_text("utf-8")) | {"folder": path.parent})


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document is held out: by a hash of its text alone.

    A document so stays on its side when the corpus grows, is shuffled, or is read elsewhere.
    """
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def read_jsonl(path: Path, *, max_examples: int = 5) -> list[str]:
    """The documents of a JSON Lines file, every line checked.

    Raises:
        DataError: The file is missing, empty, or has a line that is not UTF-8, not JSON, or has no
            ``text`` that is a string with something in it; names the first lines, counts the rest.
    """
    if not path.is_file():
        raise DataError(
            f"the corpus file {path.name} does not exist"
            if not path.exists()
            else f"the corpus {path.name} is not a file",
            where=path,
            expected='a JSON Lines file, one {"text": "…"} a line, or a built-in corpus: '
            + ", ".join(BUILTIN),
            do="check the path; a relative one starts at the working directory",
        )
    texts, bad = [], []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            text, problem = _document(line)
            if problem:
                bad.append(f"{path.name}:{number}: {problem}")
            else:
                texts.append(text)
    if bad:
        more = f"\nand {len(bad) - max_examples} more" if len(bad) > max_examples else ""
        raise DataError(
            f"{len(bad)} of {len(bad) + len(texts)} lines are no documents",
            where="\n".join(bad[:max_examples]) + more + f"\nin {path}",
            expected='UTF-8, one JSON object a line with a non-empty string: {"text": "…"}',
            do="mend or remove these lines; nothing was written",
        )
    if not texts:
        raise DataError("the corpus file is empty", where=path, expected='{"text": "…"} lines')
    return texts


def read_url(url: str, *, timeout: float = 30.0) -> list[str]:
    """The documents of a JSON Lines file behind a URL.

    Raises:
        DataError: It cannot be reached within ``timeout`` seconds, or has bad lines.
    """
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / (Path(urllib.request.url2pathname(url)).name or "corpus.jsonl")
        try:
            with urllib.request.urlopen(url, timeout=timeout) as reply, target.open("wb") as file:
                shutil.copyfileobj(reply, file)
        except (OSError, ValueError) as error:  # URLError and time-outs are OSErrors
            code = f"HTTP {error.code}, " if hasattr(error, "code") else ""
            reason = f"{code}{getattr(error, 'reason', error)}"
            raise DataError(
                f"the corpus cannot be fetched: {reason}",
                where=url,
                expected=f"a JSON Lines file, answered within {timeout:.0f} s",
                do="check the address and the network, or download it and give its path",
            ) from None
        return read_jsonl(target)


def register(registry: Path, entries: dict[str, dict]) -> None:
    """Adds datasets to a ``dataset_info.json``, keeping what is there.

    Raises:
        DataError: The registry is not JSON, or one of the names means something else in it.
    """
    known = read_registry(registry) if registry.exists() else {}
    for name, entry in entries.items():
        if known.get(name, entry) != entry:
            raise DataError(
                f"the dataset name '{name}' is taken",
                where=f"{registry}: {json.dumps(known[name])}",
                expected=json.dumps(entry),
                do="rename the corpus file, or remove that entry if nothing needs it",
            )
    if any(name not in known for name in entries):
        write_json(registry, known | entries)


def read_registry(registry: Path) -> dict[str, dict]:
    """The datasets a ``dataset_info.json`` names.

    Raises:
        DataError: It is missing or not JSON.
    """
    try:
        return json.loads(registry.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"the dataset registry cannot be read: {error}",
            where=registry,
            do="run notebook 02_data, which writes it, or mend it by hand",
        ) from None


def texts_of(path: Path) -> Iterator[str]:
    """The documents of a half that :func:`prepare` wrote."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


@dataclass(frozen=True)
class Packed:
    """Documents as training sees them.

    Attributes:
        blocks: Lists of ``block_size`` token ids.
        lengths: Tokens of each document, its separator included.
        dropped: Tokens of the last block, which was not full.
    """

    blocks: list[list[int]]
    lengths: list[int]
    dropped: int


def pack(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, block_size: int) -> Packed:
    """Joins documents by the end-of-sequence token and cuts blocks, as LLaMA-Factory does.

    LLaMA-Factory packs every 1,000 documents by themselves (``preprocessing_batch_size``), and
    drops the tail of each 1,000; so does this, to give the same blocks.

    Args:
        texts: The documents.
        tokenizer: The model's.
        block_size: ``cutoff_len``, in tokens.
    """
    blocks, lengths, dropped = [], [], 0
    texts = [text + tokenizer.eos_token for text in texts]
    for start in range(0, len(texts), 1000):
        ids = tokenizer(texts[start : start + 1000], add_special_tokens=False)["input_ids"]
        lengths += map(len, ids)
        joined = [token for document in ids for token in document]
        whole = len(joined) // block_size * block_size
        blocks += [joined[i : i + block_size] for i in range(0, whole, block_size)]
        dropped += len(joined) - whole
    if getattr(tokenizer, "add_bos_token", False):
        for block in blocks:  # as LLaMA-Factory does where the tokenizer asks for a BOS
            block[0] = tokenizer.bos_token_id
    return Packed(blocks, lengths, dropped)


def _source(corpus: str) -> tuple[str, Callable[[], Iterable[str]], float]:
    """A corpus's registry name, its reader and the share to hold out."""
    if corpus in BUILTIN:
        return corpus, BUILTIN[corpus].read, BUILTIN[corpus].fraction
    if corpus.startswith("package:"):
        package = corpus.removeprefix("package:")
        return assets.slug(package) + "_docs", lambda: assets.docstrings(package), 0.02
    if corpus.startswith(("http://", "https://")):
        stem = Path(urllib.request.url2pathname(corpus)).name.split(".")[0]
        return assets.slug(stem) or "corpus", lambda: read_url(corpus), 0.05
    path = Path(corpus).expanduser()
    if not corpus or (not path.exists() and "/" not in corpus and not path.suffix):
        raise DataError(
            f"unknown corpus '{corpus}'",
            expected=f"a built-in name ({nearest(corpus, BUILTIN)}), package:<name>, a path or URL",
            do="correct the name, or give the path of a JSON Lines file",
        )
    name = assets.slug(path.stem) or "corpus"
    if name in BUILTIN or name.removesuffix(HELD_OUT) in BUILTIN:
        raise DataError(
            f"a file named {path.name} would take the name of the built-in corpus '{name}'",
            where=path,
            do="rename the file",
        )
    return name, lambda: read_jsonl(path), 0.05


def _document(line: bytes) -> tuple[str, str]:
    """The text of one line and what is wrong with it, one of them empty."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return "", f"not UTF-8 (byte {error.start + 1} of the line is 0x{line[error.start]:02x})"
    except json.JSONDecodeError as error:
        return "", f"not JSON ({error.msg} at column {error.colno})"
    if not isinstance(record, dict) or "text" not in record:
        keys = f"its keys: {', '.join(record)[:80]}" if isinstance(record, dict) else "no object"
        return "", f"no `text` ({keys})"
    text = record["text"]
    if not isinstance(text, str):
        return "", f"`text` is {type(text).__name__}, not a string"
    return (text, "") if text.strip() else ("", "`text` is empty")


def _store(corpus: Corpus, halves: tuple[list[str], list[str]]) -> None:
    """Writes a corpus in one piece; leaves an equal one alone and refuses another."""
    if corpus.folder.exists():
        there = load(corpus.name, corpus.folder.parent.parent)
        if (there.sha256, there.fraction) == (corpus.sha256, corpus.fraction):
            return
        raise DataError(
            f"the corpus name '{corpus.name}' is taken by other documents",
            where=f"{corpus.folder}: {there.documents + there.heldout_documents} documents from "
            f"{there.source}, {there.fraction:.0%} held out, sha256 {there.sha256[:12]}",
            expected=f"{corpus.documents + corpus.heldout_documents} documents, "
            f"{corpus.fraction:.0%} held out, sha256 {corpus.sha256[:12]}",
            do="rename the file, or move that folder away if no run needs it; nothing was changed",
        )
    corpus.folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=corpus.folder.parent, prefix=f".{corpus.name}."))
    try:
        assets.write_jsonl(part / "train.jsonl", halves[False])
        assets.write_jsonl(part / "heldout.jsonl", halves[True])
        write_json(part / "corpus.json", asdict(corpus) | {"folder": ""})
        part.chmod(0o755)
        part.rename(corpus.folder)
    except OSError:
        if not corpus.folder.is_dir():  # another process was faster with the same corpus
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _entries(name: str) -> dict[str, dict]:
    """A corpus's two lines in the registry; those of the built-in ones stand in the project."""
    shipped = read_registry(PROJECT / "dataset-configs" / REGISTRY)
    made = {
        dataset: {"file_name": f"corpora/{name}/{half}.jsonl", "columns": {"prompt": "text"}}
        for dataset, half in ((name, "train"), (name + HELD_OUT, "heldout"))
    }
    return shipped | made
