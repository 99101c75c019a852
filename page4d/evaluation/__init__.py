"""How good a model is on sequences with ground truth: `evaluate`, and `python -m page4d.evaluation` around it."""

from .evaluate import TASKS, evaluate
from .protocol import Protocol
from .readers import Dataset, Rules, open_dataset

__all__ = ["TASKS", "Dataset", "Protocol", "Rules", "evaluate", "open_dataset"]
