"""Prediction heads: cameras, dense maps and tracks from trunk features. All heads run in fp32 (or float64)."""

from .camera import CameraHead
from .dense import DenseHead
from .track import TrackHead

__all__ = ["CameraHead", "DenseHead", "TrackHead"]
