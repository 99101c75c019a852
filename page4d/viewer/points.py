"""The points in viser's scene: `/static`, and `/moving` with a node per frame."""

from __future__ import annotations

from typing import Any

from .cloud import Cloud, Colored
from .flipbook import Flipbook


class PointNodes:
    """The nodes of the points.

    Args:
        scene: viser's `SceneApi`.
        cloud: the points.
        size: radius of a drawn point, in scene units.
        most: number of static points.
    """

    def __init__(self, scene: Any, cloud: Cloud, size: float, most: int) -> None:
        self._scene, self._cloud, self._size, self._most = scene, cloud, size, most
        self.static: Any = None
        self.moving = Flipbook(scene, "/moving")

    def split(self, percentile: float, moving: float) -> None:
        """Send all points, see `Cloud.split`."""
        visible = self.static is None or self.static.visible
        static, parts = self._cloud.split(percentile, moving, self._most)
        self.static = self._add("/static", static, visible)
        for i, part in enumerate(parts):
            if len(part.xyz):
                self.moving.pages[i] = self._add(self.moving.page_name(i), part, i == self.moving.shown)
            elif i in self.moving.pages:
                self.moving.pages.pop(i).remove()

    def resize(self, size: float) -> None:
        self._size = size
        for node in (self.static, *self.moving.pages.values()):
            node.point_size = size

    def _add(self, name: str, points: Colored, visible: bool) -> Any:
        shape: Any = {"point_size": self._size, "point_shape": "circle", "point_shading": "flat"}
        return self._scene.add_point_cloud(name, points.xyz, points.rgb, precision="float32", visible=visible, **shape)
