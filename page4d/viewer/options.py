"""How a scene is shown at first, and where the page is served."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError

FASTEST = 30.0  # frames per second


@dataclass(frozen=True)
class ViewOptions:
    """Options of the page, checked when they are made.

    Attributes:
        moving: motion (0 to 1) above which a point counts as moving.
        confidence: percentile of confidence from which points are shown, 0 to 100.
        fps: frames per second that the page plays.
        points: static points that are sent at most. All frames show much of the same, so few are missed.
        host: address that the page is served at.
        port: the first port that is tried.

    Raises:
        InputError: a value is not possible.
    """

    moving: float = 0.5
    confidence: float = 50.0
    fps: float = 10.0
    points: int = 600_000
    host: str = "127.0.0.1"
    port: int = 8080

    def __post_init__(self) -> None:
        if not 0 <= self.moving <= 1:
            raise InputError(f"the threshold of motion must be between 0 and 1, not {self.moving:g}")
        if not 0 <= self.confidence <= 100:
            raise InputError(f"the percentile of confidence must be between 0 and 100, not {self.confidence:g}")
        if not 1 <= self.fps <= FASTEST:
            raise InputError(f"the page can play 1 to {FASTEST:g} frames per second, not {self.fps:g}")
        if self.points < 1:
            raise InputError(f"the number of points must be at least 1, not {self.points}")
        if not 1 <= self.port <= 65535:
            raise InputError(f"the port must be between 1 and 65535, not {self.port}")
