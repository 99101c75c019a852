"""From pictures to a reconstruction in one call. `page4d infer` is this function with options."""

from .parallel import serve
from .reconstruction import Reconstruction, reconstruct

__all__ = ["Reconstruction", "reconstruct", "serve"]
