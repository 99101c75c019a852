"""Small pictures: of the frames, their depth and their motion."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

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

    def sheet(self, index: int) -> Pixels:
        """The picture above, depth and motion side by side below. Without a mask depth is as large as the picture.

        Depth: near = warm, in the same colours for all frames; grey where it is not known. Motion: red.
        """
        picture = self.picture(index)
        larger = max(1, WIDTH // picture.shape[1])  # the panel does not enlarge small pictures
        depth = depth_picture(depth_map(self.prediction, self.frames, index), self._limits)
        if self.prediction.mask is None:
            return _enlarged(np.concatenate([picture, depth]), larger)
        motion = motion_picture(picture, motion_map(self.prediction, self.frames, index))
        picture, depth, motion = (_enlarged(pixels, larger) for pixels in (picture, depth, motion))
        below = np.concatenate([depth[::2, ::2], motion[::2, ::2]], 1)
        return np.concatenate([picture, below[:, : picture.shape[1]]])


def _enlarged(pixels: Pixels, factor: int) -> Pixels:
    return pixels.repeat(factor, 0).repeat(factor, 1)
