"""Input images and videos: reading, sampling and preprocessing frames, and the bundled clip."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError
from .frames import Frames, load_frames

__all__ = ["Frames", "InputError", "bundled_clip", "load_frames"]


def bundled_clip() -> Path:
    """Path of the short rendered video that ships with the package. `page4d.data.clip` renders it."""
    return Path(__file__).parent / "assets" / "clip.mp4"
