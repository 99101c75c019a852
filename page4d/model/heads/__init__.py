"""From trunk features to cameras, dense maps and tracks. All heads run in fp32 (or float64), whatever the trunk runs in."""

from .camera import CameraHead
from .dense import DenseHead
from .track import TrackHead

__all__ = ["CameraHead", "DenseHead", "TrackHead"]
