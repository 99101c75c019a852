"""Building blocks. One rule for precision: a module computes in the dtype of its own parameters.

With linear layers in bf16 and norms, layer scales and tokens in fp32, matmuls run in bf16. The residual stream, statistics and sums
stay in fp32. This is the same on every device.
"""

from .attention import Attention, Modulation, Rope, Sparsity
from .block import Block
from .cache import cache_tensors
from .linear import Conv2d, LayerNorm, Linear
from .mask_head import MaskHead
from .mlp import Mlp

__all__ = ["Attention", "Block", "Conv2d", "LayerNorm", "Linear", "MaskHead", "Mlp", "Modulation", "Rope", "Sparsity", "cache_tensors"]
