"""Fused kernels behind swappable backends: mask-modulated attention, mask head, QK-norm + 2-D RoPE, residual + norm."""

from .backends.registry import Backend, BackendError, is_backend_supported, register_backend, registries, use_backend
from .layout import TokenLayout
from .ops.mask_attention import mask_attention
from .ops.mask_head import mask_head
from .ops.qk_norm_rope import qk_norm_rope
from .ops.residual_norm import residual_norm
from .reference.qk_norm_rope import rope_tables
from .thin_attention import KeySelection, frame_attention, select_keys, thin_attention

__all__ = [
    "Backend",
    "BackendError",
    "KeySelection",
    "TokenLayout",
    "frame_attention",
    "is_backend_supported",
    "mask_attention",
    "mask_head",
    "qk_norm_rope",
    "register_backend",
    "registries",
    "residual_norm",
    "rope_tables",
    "select_keys",
    "thin_attention",
    "use_backend",
]
