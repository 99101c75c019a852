"""How the formats are written."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

from ..errors import InputError

CHOICES = {"glb": ("animated", "all", "static"), "depth_size": ("network", "original"), "depth_type": ("png", "exr")}


@dataclass(frozen=True)
class ExportOptions:
    """Options of the export, checked when they are made.

    Attributes:
        moving: motion (0 to 1) above which a pixel counts as moving, for masks and for what is static.
        glb: "animated": static points, and at each moment what moves; "all": all points at once; "static": only what stands still.
        depth_size: of the depth PNGs: the network's, or that of the original pictures.
        depth_type: "png" (16 bits with a scale per frame) or "exr" (fp32).

    Raises:
        InputError: a value is not possible.
    """

    moving: float = 0.5
    glb: str = "animated"
    depth_size: str = "network"
    depth_type: str = "png"

    def __post_init__(self) -> None:
        if not isinstance(self.moving, Real) or not 0 <= self.moving <= 1:
            raise InputError(f"the threshold of motion must be between 0 and 1, not {self.moving!r:.40}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(f"{name} cannot be {getattr(self, name)!r}: choose from {', '.join(choices)}")


DEFAULTS = ExportOptions()
