"""Synthetic scenes with exact ground truth: rooms and open ground with static and moving objects, seen by a moving camera.

`SyntheticScenes` is the dataset. `python -m page4d.data.synthetic --preview` renders examples.
"""

from .dataset import SyntheticScenes, stream
from .render import render
from .scene import KINDS, Scene, random_scene
from .seeds import seeded
from .texture import photographs_in

__all__ = ["KINDS", "Scene", "SyntheticScenes", "photographs_in", "random_scene", "render", "seeded", "stream"]
