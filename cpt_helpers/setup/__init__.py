"""Step 1: check the machine, connect to the cluster, fetch and describe the model.

Comes in: a storage folder, and a recipe that names a model and the resources of its workers.
Goes out: the model's folder on the storage (or its name on the Hugging Face hub), tables about the
machine, the cluster and the model, and an error that names a fix where a run would fail later.

- :mod:`.machine`: package versions, CPU cores, GPUs, memory, free disk space.
- :mod:`.cluster`: Ray: connect, list the nodes, place the workers.
- :mod:`.assets`: files: the embedded model and corpora, their sha256, tokenizers.
- :mod:`.models`: models in transformers: load, describe, continue a prompt; adapters and their
  base; the Hugging Face hub.
- :mod:`.tracking_store`: MLflow's store: its URI, its client, a check of the server.
"""

from .assets import fetch_model, tokenizer_of
from .cluster import list_nodes, ray_cluster, require_workers
from .machine import inspect_machine, require_room
from .models import continue_text, describe_model, describe_tokenizer

__all__ = [
    "continue_text",
    "describe_model",
    "describe_tokenizer",
    "fetch_model",
    "inspect_machine",
    "list_nodes",
    "ray_cluster",
    "require_room",
    "require_workers",
    "tokenizer_of",
]
