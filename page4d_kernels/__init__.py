"""Fused kernels for mask-modulated attention, the dynamics-aware mask head, QK-norm + 2-D RoPE and residual + norm; swappable backends."""

from .backends.registry import BackendError, is_backend_supported, registries, use_backend
from .layout import TokenLayout
from .ops.mask_attention import mask_attention
from .ops.mask_head import mask_head
from .ops.qk_norm_rope import qk_norm_rope
from .ops.residual_norm import residual_norm
from .reference.qk_norm_rope import rope_tables

__all__ = [
    "BackendError",
    "TokenLayout",
    "is_backend_supported",
    "mask_attention",
    "mask_head",
    "qk_norm_rope",
    "registries",
    "residual_norm",
    "rope_tables",
    "use_backend",
]
