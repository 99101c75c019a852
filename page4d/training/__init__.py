"""Training and fine-tuning: `python -m page4d.training CONFIG.yaml`. The recipe is in docs/training.md."""

from .config import RunConfig, load_config
from .losses import total_loss
from .trainer import Trainer

__all__ = ["RunConfig", "Trainer", "load_config", "total_loss"]
