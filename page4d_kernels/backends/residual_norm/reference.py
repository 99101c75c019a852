"""The specification as a backend: three PyTorch operators."""

from ...reference.residual_norm import residual_norm, residual_norm_backward
from ..registry import Backend

BACKEND = Backend("reference", "plain PyTorch in fp32", residual_norm, residual_norm_backward)
