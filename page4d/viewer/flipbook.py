"""Nodes of the scene of which one is visible at a time."""

from __future__ import annotations

from typing import Any


class Flipbook:
    """One node per frame below a parent. All are sent to the page once; from then on only their visibility changes.

    Args:
        scene: viser's `SceneApi`.
        name: of the parent, such as "/moving".
    """

    def __init__(self, scene: Any, name: str) -> None:
        self.name = name
        self.parent = scene.add_frame(name, show_axes=False)
        self.pages: dict[int, Any] = {}  # viser's handles by frame. A frame may have none
        self.shown = 0

    def page_name(self, index: int) -> str:
        return f"{self.name}/{index:06d}"

    def show(self, index: int) -> None:
        for frame in (self.shown, index):
            if frame in self.pages:
                self.pages[frame].visible = frame == index
        self.shown = index
