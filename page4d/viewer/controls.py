"""The panel of the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .options import FASTEST, ViewOptions
from .thumbnails import Thumbnails


@dataclass(frozen=True)
class State:
    """What the controls say. Without motion or tracks those of them are off."""

    frame: int
    static: bool
    moving: bool
    tracks: bool
    cameras: bool
    percentile: float  # of the confidence
    threshold: float  # of the motion
    size: float  # diameter of a point, in pixels of the input at the median depth


class Controls:
    """Time, the picture of the current frame, points and cameras.

    Args:
        server: viser's server.
        thumbnails: the pictures.
        tracks: whether there are any.
        options: the first values.
        on_change: called when any control changes, from a thread of viser's.
        on_look: called with viser's client that wants to look through the current camera.
    """

    def __init__(
        self,
        server: Any,
        thumbnails: Thumbnails,
        tracks: bool,
        options: ViewOptions,
        on_change: Callable[[], None],
        on_look: Callable[[Any], None],
    ) -> None:
        self._thumbnails, self._on_change = thumbnails, on_change
        self._has_motion = thumbnails.prediction.mask is not None
        self.playing = False
        self.count = len(thumbnails.frames)
        gui = server.gui
        self.frame: Any = None
        self.moving: Any = None
        self.threshold: Any = None
        self.tracks: Any = None
        if self.count > 1:
            with gui.add_folder("Time"):
                self.frame = self._watched(gui.add_slider("frame", 0, self.count - 1, 1, 0))
                self.fps = self._watched(gui.add_slider("frames/s", 1, FASTEST, 0.5, options.fps))
                self.play = gui.add_button("play")
                self.play.on_click(lambda _: self.toggle())
        with gui.add_folder("Picture, depth, motion" if self._has_motion else "Picture, depth"):
            self._picture = gui.add_image(thumbnails.sheet(0), jpeg_quality=85)
        with gui.add_folder("Points"):
            self.static = self._watched(gui.add_checkbox("static", True, hint="what stands still, of all frames"))
            if self._has_motion:
                self.moving = self._watched(gui.add_checkbox("moving", True, hint="what moves, of the current frame"))
            if tracks:
                self.tracks = self._watched(gui.add_checkbox("tracks", True, hint="where tracked points have been"))
            if self._has_motion:
                hint = "motion above which a point counts as moving"
                self.threshold = self._watched(gui.add_slider("motion", 0, 1, 0.01, options.moving, hint=hint))
            hint = "percentile from which points are shown"
            self.percentile = self._watched(gui.add_slider("confidence", 0, 100, 1, options.confidence, hint=hint))
            self.size = self._watched(gui.add_slider("size", 0.5, 5, 0.1, 1.5, hint="of a point, in pixels of the input"))
        with gui.add_folder("Cameras"):
            self.cameras = self._watched(gui.add_checkbox("frusta", True, hint="click one to look through it"))
            gui.add_button("look through this camera").on_click(lambda event: on_look(event.client))

    def _watched(self, handle: Any) -> Any:
        handle.on_update(lambda _: self._on_change())
        return handle

    def toggle(self) -> None:
        """Start or stop playing."""
        self.playing = not self.playing
        self.play.label = "pause" if self.playing else "play"
        self._on_change()

    def advance(self) -> None:
        """To the next frame; after the last comes the first."""
        self.frame.value = (self.frame.value + 1) % self.count

    def state(self) -> State:
        return State(
            frame=self.frame.value if self.frame else 0,
            static=self.static.value,
            moving=self.moving.value if self.moving else False,
            tracks=self.tracks.value if self.tracks else False,
            cameras=self.cameras.value,
            percentile=self.percentile.value,
            threshold=self.threshold.value if self.threshold else 1.0,
            size=self.size.value,
        )

    def show_picture(self, index: int) -> None:
        self._picture.image = self._thumbnails.sheet(index)
