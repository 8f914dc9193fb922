"""Step 6: a checkpoint becomes a model that can be used, measured, served and found again.

Input: a checkpoint of a trained run, and its held-out texts. Output: ``<run>/export/``, a plain
Hugging Face folder; ``<run>/report.html``; a model card; a version in MLflow's model registry.

- ``huggingface``: writes a checkpoint as a Hugging Face folder, and verifies its perplexity.
- ``evaluation``: losses of documents, perplexity, comparisons with bootstrap intervals.
- ``cloze``: a cloze test on the facts of held-out documents.
- ``report``: evaluates the base model and the trained model, and writes the HTML report.
- ``quantization``: weights of 8 or 4 bits.
- ``serving``: the server's command, and the folder of adapters that servers load.
- ``model_card``: the README of the exported folder.
- ``model_registry``: the model card, the MLflow run and the model registry.
"""

from .huggingface import export_run
from .model_registry import publish, registered
from .quantization import compare_formats, quantize, validate_options
from .report import evaluate
from .report import write as write_report
from .serving import lay_out_adapters, serve_command

__all__ = [
    "compare_formats",
    "evaluate",
    "export_run",
    "lay_out_adapters",
    "publish",
    "quantize",
    "registered",
    "serve_command",
    "validate_options",
    "write_report",
]
