"""The cameras in viser's scene: frusta with pictures, the path, and the view of a camera."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..data.frames import Frames
from ..export.color import colormap
from ..export.scene import SceneCameras
from .thumbnails import Thumbnails

PICTURE_STEP = 2  # every n-th pixel of a thumbnail is on the frustum
GREY, HIGHLIGHT = (110, 110, 110), (255, 90, 0)
THIN, THICK = 1.5, 4.0  # lines, in pixels of the screen
BEHIND, ABOVE = 16.0, 6.0  # how far the first look steps back and up, in lengths of a frustum


class CameraNodes:
    """Frusta `/cameras/<frame>`, clickable, and the line `/cameras/path`, coloured from the first frame to the last.

    Args:
        server: viser's server.
        cameras: of S frames. Those that are not finite have no frustum.
        thumbnails: the pictures.
        length: of a frustum, in scene units.
        depth: a usual depth, in scene units.
        on_click: called with viser's client and the frame.
    """

    def __init__(
        self,
        server: Any,
        cameras: SceneCameras,
        frames: Frames,
        thumbnails: Thumbnails,
        length: float,
        depth: float,
        on_click: Callable[[Any, int], None],
    ) -> None:
        self._cameras, self._length, self._depth = cameras, length, depth
        self._size = tuple(frames.images.shape[-2:])
        self._shown = 0
        self.parent = server.scene.add_frame("/cameras", show_axes=False)
        self.frusta: dict[int, Any] = {}
        for i in np.flatnonzero(cameras.finite).tolist():
            self.frusta[i] = self._frustum(server.scene, thumbnails, i)
            self.frusta[i].on_click(lambda event, i=i: on_click(event.client, i))
        found = sorted(self.frusta)
        if len(found) > 1:
            centres = cameras.world_from_camera[found, :3, 3]
            colors = np.repeat(colormap(np.linspace(0, 1, len(found)))[1:, None], 2, 1)
            segments = np.stack([centres[:-1], centres[1:]], 1).astype(np.float32)
            server.scene.add_line_segments("/cameras/path", segments, colors, thickness=THICK, thickness_units="screen")
        self._first_look(server, found[0])

    def fov(self, index: int) -> tuple[float, float]:
        """The vertical field of view of a frame in radians, and its aspect: width over height at the same distance."""
        height, width = self._size
        across, down = width / 2 / self._cameras.network[index, 0, 0], height / 2 / self._cameras.network[index, 1, 1]
        return 2 * math.atan(down), across / down

    def _frustum(self, scene: Any, thumbnails: Thumbnails, index: int) -> Any:
        import viser.transforms as tf

        fov, aspect = self.fov(index)
        pose = self._cameras.world_from_camera[index]
        # viser keeps the volume of a frustum. This scale gives it the length instead.
        scale = self._length * math.cbrt(math.tan(fov / 2) ** 2 * aspect / 3)
        return scene.add_camera_frustum(
            f"/cameras/{index:06d}",
            fov,
            aspect,
            scale=scale,
            thickness=THIN,
            thickness_units="screen",
            color=GREY,
            image=thumbnails.picture(index)[::PICTURE_STEP, ::PICTURE_STEP],
            jpeg_quality=85,
            wxyz=tf.SO3.from_matrix(pose[:3, :3]).wxyz,
            position=pose[:3, 3],
            cast_shadow=False,
            receive_shadow=False,
        )

    def _first_look(self, server: Any, index: int) -> None:
        """From behind and above the first camera: at its very place the pictures of the frusta would hide the scene."""
        pose = self._cameras.world_from_camera[index]
        server.scene.set_up_direction("-y")
        first = server.initial_camera
        first.up = -pose[:3, 1]
        first.position = pose[:3, 3] - self._length * (BEHIND * pose[:3, 2] + ABOVE * pose[:3, 1])
        first.look_at = pose[:3, 3] + self._depth * pose[:3, 2]
        first.fov = self.fov(index)[0]

    def highlight(self, index: int) -> None:
        """Show which frustum is that of the current frame."""
        for frame in (self._shown, index):
            if frame in self.frusta:
                self.frusta[frame].color = HIGHLIGHT if frame == index else GREY
                self.frusta[frame].thickness = THICK if frame == index else THIN
        self._shown = index

    def look_through(self, client: Any, index: int) -> None:
        """Give viser's client the place, direction and field of view of a camera. All of its picture is seen."""
        pose = self._cameras.world_from_camera[index]
        fov, aspect = self.fov(index)
        with client.atomic():
            client.camera.position = pose[:3, 3]
            client.camera.up_direction = -pose[:3, 1]
            client.camera.look_at = pose[:3, 3] + self._depth * pose[:3, 2]
            client.camera.fov = 2 * math.atan(math.tan(fov / 2) * max(1, aspect / client.camera.aspect))
