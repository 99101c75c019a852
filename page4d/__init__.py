"""PAGE-4D: cameras, depth, point maps, point tracks and a dynamics mask from images or a video, in one forward pass."""

from .config import PRESETS, Page4DConfig, PlansConfig, preset
from .execution.attention_plan import AttentionPlan
from .model import Page4D
from .prediction import Cameras, Prediction

__version__ = "0.1.0"
__all__ = ["PRESETS", "AttentionPlan", "Cameras", "Page4D", "Page4DConfig", "PlansConfig", "Prediction", "__version__", "preset"]
