"""Data: from sources of text to blocks of tokens.

Takes a recipe and the notebook's parameters (``CORPUS``, ``REPLAY``, ``CLEAN`` …). Writes to the
storage: ``corpora/<name>/`` (documents), ``tokenised/`` (blocks) and ``dataset_info.json`` (the
registry). The recipe's ``tokenized_path`` then names the blocks that the workers load.

The modules, in the order of the work:

- :mod:`sources`: where text comes from. Add a source here.
- :mod:`formats`: JSON Lines, JSON, Parquet, CSV, text. Add a file format here.
- :mod:`ingest`: reads shards on all cores.
- :mod:`cleaning`: validation, quality filters, fingerprints.
- :mod:`duplicates`: exact and near duplicates, contamination.
- :mod:`corpora`: a corpus on the storage, its held-out half, the registry of datasets.
- :mod:`packing`: documents become blocks of tokens.
- :mod:`mixing`: the corpora of a recipe, their shares, replay.
"""

from .cleaning import Cleaning
from .corpora import load as load_corpus
from .corpora import prepare as prepare_corpus
from .corpora import registered_datasets
from .mixing import Mix, TrainingData, prepare
from .packing import pack, plot_document_lengths
from .sources import find as find_source

__all__ = [
    "Cleaning",
    "Mix",
    "TrainingData",
    "find_source",
    "load_corpus",
    "pack",
    "plot_document_lengths",
    "prepare",
    "prepare_corpus",
    "registered_datasets",
]
