"""Continued pre-training in six notebooks: LLaMA-Factory, DeepSpeed ZeRO and Ray Train.

One sub-package per step:

- ``setup``: the machine, the cluster, the embedded model and corpora, loading a model.
- ``data``: sources, formats, cleaning, packing, mixing, the registry.
- ``config``: resolving and validating a recipe, planning, checks before a launch.
- ``checkpoints``: manifests, listing, picking, pruning, another number of workers.
- ``train``: the launch, the workers, failures, tracking.
- ``export``: export, evaluation, report, quantization, serving, the model registry.

The core modules serve all of them: ``run`` (the files of a run), ``recipes``, ``notebook``,
``display``, ``plots``, ``errors``, ``redact`` and ``redirect``. ``pipeline`` runs the notebooks in
order, and ``lab`` opens them in JupyterLab. Functions import torch, ray and llamafactory when they
need them, so that the import of this package is instant.
"""

__version__ = "0.2.0"
