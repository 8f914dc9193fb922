"""Continued pre-training in six notebooks: LLaMA-Factory, DeepSpeed ZeRO and Ray Train.

Each module is one step's room: ``environment``, ``assets``, ``data``, ``config``, ``launch`` (with
``worker`` on the far side), ``checkpoints``, ``export``; ``run`` names what they hand on,
``notebook`` begins and ends each, and ``pipeline`` runs them in order. Importing the package is
instant: torch, ray and llamafactory are imported by the functions that need them.
"""

__version__ = "0.2.0"
