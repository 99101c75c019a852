"""The page: a scene, its controls, and the loop that makes the one follow the other."""

from __future__ import annotations

import contextlib
import threading
import time
import webbrowser
from typing import Any

from ..data.frames import Frames
from ..errors import InputError
from ..export.frusta import LENGTH, frustum_length
from ..export.scene import scene_cameras
from ..export.track_points import track_points
from ..prediction import Prediction
from .cameras import CameraNodes
from .cloud import load_cloud
from .controls import Controls, State
from .options import ViewOptions
from .points import PointNodes
from .serving import has_browser, page_address, quiet, start_server
from .thumbnails import Thumbnails
from .trails import add_trails

IDLE = 1.0  # seconds between looks for Ctrl-C, which on Windows does not end a wait


class Page:
    """A viser server with the scene of a prediction. It serves as soon as it is made.

    World: the axes of the first camera (x right, y down, z forward), scene units.

    >>> with Page(prediction, frames) as page:
    ...     print(page.address)
    ...     page.run()  # until Ctrl-C

    Args:
        prediction: one sequence (B = 1) with depth and cameras. Mask and tracks are shown if they are there.
        frames: the frames that it was predicted from.
        options: the first values of the controls, and the address.

    Raises:
        InputError: viser is not installed, the address cannot be used, or the prediction lacks something or has no finite camera.
    """

    def __init__(self, prediction: Prediction, frames: Frames, options: ViewOptions | None = None) -> None:
        options = options or ViewOptions()
        cameras = scene_cameras(prediction, frames)
        if not cameras.finite.any():
            raise InputError("no frame has a finite camera: there is nothing to show")
        cloud = load_cloud(prediction, frames)
        thumbnails = Thumbnails(prediction, frames)
        length = frustum_length(thumbnails.prediction, thumbnails.frames)
        self._pixel = length / LENGTH / float(cameras.network[cameras.finite, 0, 0].mean())  # width of a pixel at the median depth
        self._changed, self._closed = threading.Event(), False
        self.server = start_server(options.host, options.port)
        self.address = page_address(options.host, self.server.get_port())
        self.cameras = CameraNodes(self.server, cameras, frames, thumbnails, length, length / LENGTH, self.look_through)
        self.tracks = add_trails(self.server.scene, track_points(prediction, frames, cameras)) if prediction.track is not None else None
        self.controls = Controls(
            self.server, thumbnails, self.tracks is not None, options, self._changed.set, lambda client: self.look_through(client)
        )
        self.shown = self.controls.state()
        self.points = PointNodes(self.server.scene, cloud, self.shown.size / 2 * self._pixel, options.points)
        self.points.split(self.shown.percentile, self.shown.threshold)
        self.cameras.highlight(self.shown.frame)

    def look_through(self, client: Any, index: int | None = None) -> None:
        """Give a client the view of a camera, of the current frame by default. The frusta are hidden, since they would be in the way.

        A camera that is not finite has no view: then nothing happens.
        """
        index = self.shown.frame if index is None else index
        if index not in self.cameras.frusta:
            return
        if self.controls.frame:
            self.controls.frame.value = index
        self.controls.cameras.value = False
        self.cameras.look_through(client, index)

    def refresh(self) -> None:
        """Make the scene what the controls say. Only what differs is sent."""
        wanted, shown = self.controls.state(), self.shown
        with self.server.atomic():
            if (wanted.percentile, wanted.threshold) != (shown.percentile, shown.threshold):
                self.points.split(wanted.percentile, wanted.threshold)
            if wanted.size != shown.size:
                self.points.resize(wanted.size / 2 * self._pixel)
            self._switch(wanted)
            if wanted.frame != shown.frame:
                self.points.moving.show(wanted.frame)
                self.cameras.highlight(wanted.frame)
                if self.tracks:
                    self.tracks.show(wanted.frame)
                self.controls.show_picture(wanted.frame)
        self.shown = wanted

    def _switch(self, wanted: State) -> None:
        switches = [(self.points.static, wanted.static), (self.points.moving.parent, wanted.moving), (self.cameras.parent, wanted.cameras)]
        if self.tracks:
            switches.append((self.tracks.parent, wanted.tracks))
        for node, visible in switches:
            if node.visible != visible:
                node.visible = visible

    def run(self, open_browser: bool = True) -> None:
        """Serve until Ctrl-C. `open_browser`: open one, if there is a screen for it."""
        with contextlib.suppress(KeyboardInterrupt):
            if open_browser and has_browser():
                webbrowser.open(self.address)
            self.follow()

    def follow(self) -> None:
        """Keep the scene as the controls say, and play, until the page is closed."""
        due = time.monotonic()  # of the next frame
        while not self._closed:
            self._changed.clear()
            self.refresh()
            now = time.monotonic()
            if not self.controls.playing:
                due = now
                self._changed.wait(IDLE)
            elif now >= due:
                period = 1 / self.controls.fps.value
                due = max(due + period, now)  # what was missed is not made up for
                self.controls.advance()
            else:
                self._changed.wait(due - now)

    def close(self) -> None:
        """Stop serving."""
        self._closed = True
        self._changed.set()
        with quiet(), contextlib.suppress(KeyboardInterrupt):  # an impatient second Ctrl-C
            self.server.stop()

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
