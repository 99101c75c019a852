"""The PAGE-4D model: encoder, aggregator (trunk), prediction heads, weights in and out, CUDA graphs."""

from .page4d import OUTPUTS, Page4D, default_device, default_dtype

__all__ = ["OUTPUTS", "Page4D", "default_device", "default_dtype"]
