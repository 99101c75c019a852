"""The bundled clip: a synthetic scene with a moving camera, two walkers and a room.

`python -m page4d.data.clip OUT.mp4` renders the video again.
"""

from __future__ import annotations

import sys

from .sample import Sample
from .synthetic import SyntheticScenes
from .video import write_video

FPS, FRAMES, SIZE = 12, 28, (252, 336)
SCENE = 21  # number of the dynamic scene with seed 0


def render_clip(size: tuple[int, int] = SIZE, supersample: int = 3) -> Sample:
    """The clip's frames with their ground truth."""
    return SyntheticScenes("dynamic", frames=FRAMES, size=size, seed=0, supersample=supersample)[SCENE]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m page4d.data.clip OUT.mp4")
    write_video(sys.argv[1], render_clip().images, FPS)
