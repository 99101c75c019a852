"""Our CUDA kernel (csrc/cuda/qk_norm_rope.cuh). Not yet run on a GPU. Backward: the reference's formulas."""

from __future__ import annotations

from ... import native
from ...reference.qk_norm_rope import qk_norm_rope_backward
from .. import native_common
from ..registry import Backend
from . import compiled
from .problem import QkNormRopeProblem

HEAD_DIMS = (32, 64, 128)


def _unsupported(problem: QkNormRopeProblem) -> list[str]:
    reasons = native_common.cuda_unsupported(problem)
    if problem.head_dim not in HEAD_DIMS:
        reasons.append(f"it takes head dims {', '.join(map(str, HEAD_DIMS))}, not {problem.head_dim}")
    return reasons


BACKEND = Backend(
    "cuda",
    "our CUDA kernel, sm_80 and newer; not yet run on a GPU; backward by PyTorch",
    compiled.forward("qk_norm_rope_cuda", native.cuda_launch_args),
    qk_norm_rope_backward,
    unsupported=_unsupported,
    unavailable=lambda: native_common.cuda_unavailable("qk_norm_rope_cuda"),
)
