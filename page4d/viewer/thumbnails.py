"""Small pictures: of the frames, their depth and their motion."""

from __future__ import annotations

from dataclasses import replace

from ..data.frames import Frames
from ..export.views import Pixels, depth_map, depth_picture, frame_pixels, inverse_depth_range, motion_map, motion_picture
from ..prediction import Prediction

WIDTH = 256  # about that of the panel


class Thumbnails:
    """Every n-th pixel of a clip, so that the pictures are not wider than twice `WIDTH`.

    Attributes:
        prediction, frames: the smaller clip, with images, depth and mask.
    """

    def __init__(self, prediction: Prediction, frames: Frames) -> None:
        step = max(1, prediction.images.shape[-1] // WIDTH)
        assert prediction.depth is not None
        images = prediction.images[..., ::step, ::step]
        self.prediction = Prediction(images, prediction.mask, depth=prediction.depth[:, :, ::step, ::step])
        shift = 0.5 - 0.5 / step  # of pixel centres
        self.frames = replace(frames, images=images[0], scale=frames.scale / step, offset=frames.offset / step + shift)
        self._limits = inverse_depth_range(self.prediction, self.frames)

    def picture(self, index: int) -> Pixels:
        return frame_pixels(self.prediction, index)

    def depth(self, index: int) -> Pixels:
        """Near = warm, in the same colours for all frames; grey where it is not known."""
        return depth_picture(depth_map(self.prediction, self.frames, index), self._limits)

    def motion(self, index: int) -> Pixels:
        return motion_picture(self.picture(index), motion_map(self.prediction, self.frames, index))
