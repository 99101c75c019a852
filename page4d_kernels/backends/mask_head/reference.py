"""The specification as a backend: torch convolutions over a (B*S, C, h, w) copy of the tokens in fp32."""

from ...reference.mask_head import mask_head, mask_head_backward
from ..registry import Backend

BACKEND = Backend("reference", "plain PyTorch convolutions in fp32", mask_head, mask_head_backward)
