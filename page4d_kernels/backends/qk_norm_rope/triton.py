"""Our Triton kernels. Not yet run on a GPU; tested in the interpreter and by ahead-of-time compilation."""

from __future__ import annotations

from .. import triton_common

BACKEND = triton_common.backend("qk_norm_rope", "one pass over the projection; not yet run on a GPU")
