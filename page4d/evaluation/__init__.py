"""Metrics of a model on sequences with ground truth: `evaluate`, and `python -m page4d.evaluation` on the command line."""

from .evaluate import TASKS, evaluate
from .protocol import Protocol
from .readers import Dataset, Rules, open_dataset

__all__ = ["TASKS", "Dataset", "Protocol", "Rules", "evaluate", "open_dataset"]
