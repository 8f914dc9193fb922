"""Packing: joins documents by a separator, cuts them into blocks, and tokenises them once.

Workers load the blocks from the storage (``tokenized_path``); no worker tokenises.

Some tokenizers put a BOS token in front of every text: Gemma's, Llama's, Mistral's. Their models
fail without it: the perplexity of Gemma 7B on LAMBADA is 5.9e9 without and 3.5 with BOS
(EleutherAI/lm-evaluation-harness#1465). So every block begins with BOS, also where a document
continues. Inside a block each document has its BOS too, after the separator of the one before.
Open pre-trainings of such models join documents this way, such as torchtitan's of Llama 3
(``hf_datasets.py``: ``bos=True, eos=True``). A prompt begins with BOS when the model is served.
A model that sees BOS at block starts alone learns that BOS precedes the middle of a document.

LLaMA-Factory 0.9.3 overwrites the first token of each block with BOS, and so loses that token.
It puts no BOS in front of documents inside a block.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from ..recipes import HELD_OUT
from ..run import in_one_piece, write_json
from .corpora import Corpus, texts_of

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase

FORMAT = 2  # of blocks on the storage; blocks of another format are made again
_BATCH, _CHARACTERS = 512, 4_000_000  # documents, and characters, tokenised at once by all cores


@dataclass(frozen=True)
class Packed:
    """Packed documents in memory."""

    blocks: list[list[int]]  # token ids, ``block_size`` in each
    lengths: list[int]  # tokens of each document, its separator and its BOS included
    dropped: int  # tokens of the last block, which was not full

    def first_block(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The text of the first block; empty if no block is full."""
        return tokenizer.decode(self.blocks[0]) if self.blocks else ""


@dataclass(frozen=True)
class Blocks:
    """A half of a corpus as blocks on the storage."""

    name: str  # in the registry
    folder: Path
    block_size: int  # tokens per block
    documents: int
    tokens: int  # with separators, and BOS of documents and blocks
    blocks: int  # full ones
    dropped: int  # tokens at the end that fill no block
    histogram: dict[str, int] = field(repr=False)  # documents by length in tokens, powers of two

    @property
    def file(self) -> str:
        return str(self.folder / "blocks.arrow")


class Packer:
    """Joins documents and cuts blocks as a stream; counts documents and tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, block_size: int) -> None:
        if block_size < 2:
            raise DataError(
                f"blocks of {block_size} tokens have nothing to predict",
                where=f"cutoff_len: {block_size}",
                expected="two or more; 512 to 4,096 are usual",
                do="correct cutoff_len",
            )
        self.tokenizer, self.block_size = tokenizer, block_size
        self.lengths: list[int] = []
        self.tokens = self.dropped = 0
        self.bos = forced_bos(tokenizer)
        self.before = [] if self.bos is None else [self.bos]
        self.after = [tokenizer.eos_token_id]
        self.fast = _fast_tokenizer(tokenizer)

    def blocks(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """Arrays of full blocks, shape ``(n, block_size)``, int32."""
        import numpy as np

        rest = np.zeros(0, dtype=np.int32)
        for batch in _batches(texts):
            pieces = [rest]
            for ids in self._encode(batch):
                ids = [*self.before, *ids, *self.after]
                self.lengths.append(len(ids))
                pieces.append(np.array(ids, dtype=np.int32))
            whole, rest = self._cut(np.concatenate(pieces))
            self.tokens += whole.size
            if len(whole):
                yield whole
        self.dropped = len(rest)
        self.tokens += self.dropped

    def _cut(self, joined: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Full blocks, and the tokens at the end that fill none."""
        import numpy as np

        bos, none = np.array(self.before, dtype=np.int32), joined[:0]
        blocks: list[np.ndarray] = []
        start = 0
        while start < len(joined):
            # A block that begins with a document has that document's BOS.
            head = none if joined[start] == self.bos else bos
            end = start + self.block_size - len(head)
            if end > len(joined):
                break
            blocks.append(np.concatenate([head, joined[start:end]]))
            start = end
        return np.array(blocks, dtype=np.int32).reshape(-1, self.block_size), joined[start:]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if self.fast is None:  # a tokenizer in Python only
            return self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        encode = getattr(self.fast, "encode_batch_fast", self.fast.encode_batch)  # no offsets
        return [encoded.ids for encoded in encode(texts, add_special_tokens=False)]


def forced_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the BOS token if the tokenizer puts it in front of every text, else ``None``.

    The tokenizer's output decides, as it does for servers. LLaMA-Factory 0.9.3 reads the attribute
    ``add_bos_token`` instead. Llama 3's tokenizer has no such attribute: its post-processor adds
    BOS, and LLaMA-Factory trains it without.
    """
    first = tokenizer("a")["input_ids"][0]
    return first if first == tokenizer.bos_token_id else None


def pack(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, block_size: int) -> Packed:
    """Joins documents by the end-of-sequence token and cuts blocks, in memory.

    If the tokenizer forces BOS, each document and each block begins with BOS. ``block_size`` is the
    recipe's ``cutoff_len``, two or more tokens.
    """
    packer = Packer(tokenizer, block_size)
    blocks = [block for array in packer.blocks(texts) for block in array.tolist()]
    return Packed(blocks, packer.lengths, packer.dropped)


def tokenise(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, block_size: int, *, held_out: bool
) -> Blocks:
    """Half a corpus as blocks on the storage, in ``tokenised/``; made once."""
    name = corpus.name + (HELD_OUT if held_out else "")
    key = [FORMAT, corpus.sha256, corpus.fraction, held_out, block_size, fingerprint(tokenizer)]
    folder = corpus.folder.parent.parent / "tokenised" / f"{name}-{digest_of(key)}"
    description = folder / "blocks.json"
    if description.is_file():
        values = json.loads(description.read_text("utf-8"))
        return Blocks(**values | {"folder": folder, "name": name})
    with in_one_piece(folder) as new:
        packer = Packer(tokenizer, block_size)
        texts = texts_of(corpus.heldout if held_out else corpus.train)
        count = write_arrow(new / "blocks.arrow", packer.blocks(texts))
        lengths = Counter(1 << (max(length, 1) - 1).bit_length() for length in packer.lengths)
        blocks = Blocks(
            name=name,
            folder=folder,
            block_size=block_size,
            documents=len(packer.lengths),
            tokens=packer.tokens,
            blocks=count,
            dropped=packer.dropped,
            histogram={str(length): lengths[length] for length in sorted(lengths)},
        )
        write_json(new / "blocks.json", asdict(blocks) | {"folder": "", "name": ""})
    return blocks


def _fast_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Any | None:
    """A copy of the Rust tokenizer without truncation and padding; ``None`` if there is none."""
    from tokenizers import Tokenizer

    fast = getattr(tokenizer, "_tokenizer", None)
    if fast is None:
        return None
    copy = Tokenizer.from_str(fast.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of everything that decides how a tokenizer encodes a text."""
    fast = _fast_tokenizer(tokenizer)
    text = fast.to_str() if fast else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = [tokenizer.eos_token_id, forced_bos(tokenizer)]
    return hashlib.sha256(f"{text}{special}".encode()).hexdigest()


def write_arrow(path: Path, arrays: Iterator[np.ndarray]) -> int:
    """Writes blocks as an Arrow stream with the trainer's columns; returns their number."""
    import numpy as np
    import pyarrow as pa

    schema = pa.schema(
        [("input_ids", pa.list_(pa.int32())), ("attention_mask", pa.list_(pa.int8()))]
    )
    written = 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for array in arrays:
            offsets = np.arange(len(array) + 1, dtype=np.int32) * array.shape[1]
            ones = np.ones(array.size, dtype=np.int8)
            columns = [
                pa.ListArray.from_arrays(offsets, pa.array(array.ravel())),
                pa.ListArray.from_arrays(offsets, pa.array(ones)),
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema))
            written += len(array)
    return written


def plot_document_lengths(halves: Iterable[Blocks]) -> Figure:
    """The distribution of document lengths in each corpus."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
    for half in halves:
        shares = [count / half.documents for count in half.histogram.values()]
        axes.plot(list(half.histogram), shares, "o-", label=half.name)
    axes.set(xlabel="largest number of tokens in a document", ylabel="share of documents")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def digest_of(values: list) -> str:
    return hashlib.sha256(json.dumps(values, default=str).encode()).hexdigest()[:16]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) == _BATCH or characters >= _CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
