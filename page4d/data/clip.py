"""The bundled clip: a synthetic scene with a moving camera, a walker and another thing that moves.

`python -m page4d.data.clip OUT.mp4` writes the video again.
"""

from __future__ import annotations

import sys

import torch

from .sample import Sample
from .synthetic import random_scene, render
from .video import write_video

FPS, FRAMES, SIZE = 12, 28, (252, 336)
SCENE = 15  # of the dynamic ones, for its light room


def render_clip(size: tuple[int, int] = SIZE, supersample: int = 3) -> Sample:
    """The clip's frames with their ground truth."""
    return render(random_scene("dynamic", FRAMES, torch.Generator().manual_seed(SCENE)), size, supersample=supersample)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m page4d.data.clip OUT.mp4")
    write_video(sys.argv[1], render_clip().images, FPS)
