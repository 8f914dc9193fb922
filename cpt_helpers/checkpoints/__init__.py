"""Checkpoints: verified against their manifests, listed, picked, and converted.

In: a run's folder, where the workers write checkpoints during the training (step 4).
Out: whole checkpoints, to resume from (step 4) or to export (step 6).

- :mod:`.manifests` writes, reads, verifies, picks and prunes checkpoints;
- :mod:`.contents` shows them, their files and ranks as tables;
- :mod:`.resharding` converts a checkpoint for another number of workers.
"""

from __future__ import annotations

from .contents import files, ranks_with_shards, sizes, table
from .manifests import Checkpoint, latest, listing, pick

__all__ = [
    "Checkpoint",
    "files",
    "latest",
    "listing",
    "pick",
    "ranks_with_shards",
    "sizes",
    "table",
]
