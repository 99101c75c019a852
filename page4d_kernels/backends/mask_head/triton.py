"""Our Triton kernels. Not yet run on a GPU; tested in the interpreter and by ahead-of-time compilation."""

from __future__ import annotations

from .. import triton_common

BACKEND = triton_common.backend("mask_head", "two passes over the tokens, no copy of them; not yet run on a GPU")
