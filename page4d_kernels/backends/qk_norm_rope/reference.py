"""The specification as a backend."""

from ...reference.qk_norm_rope import qk_norm_rope, qk_norm_rope_backward
from ..registry import Backend

BACKEND = Backend("reference", "plain PyTorch in fp32", qk_norm_rope, qk_norm_rope_backward)
