"""FlexAttention with the rank-1 score_mod s + r[b, i] c[b, j], compiled on first use, which takes seconds to a minute."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable

import torch
from torch import Tensor

from ..registry import Backend
from .problem import AttentionArgs, AttentionProblem, all_of, no_lse


def _unavailable() -> list[str]:
    try:
        from torch.nn.attention import flex_attention  # noqa: F401
    except ImportError as error:
        return [f"this torch ({torch.__version__}) has no FlexAttention: {error}"]
    return []


def _unsupported(problem: AttentionProblem) -> list[str]:
    reasons = []
    if problem.device not in ("cpu", "cuda"):
        reasons.append(f"FlexAttention runs on cpu and cuda, not on {problem.device}")
    if problem.device == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        reasons.append("on cpu it is compiled, and no C++ compiler was found (install g++)")
    if problem.device == "cpu" and problem.needs_grad:
        reasons.append("FlexAttention on cpu has no backward")
    if problem.dtype == torch.float64:
        reasons.append("FlexAttention has no float64")
    bias_grad = sorted(problem.needs_grad & {"query_gate", "key_bias"})
    if bias_grad:
        reasons.append(f"no deterministic gradient for {' and '.join(bias_grad)}")
    return reasons


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # Dynamic shapes do not compile on cpu. With fullgraph, reaching the recompilation limit raises instead of silently using N x N memory.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _forward(args: AttentionArgs) -> Tensor:
    q, k, v, query_gate, key_bias, _, scale = args
    score_mod = None
    if query_gate is not None and key_bias is not None:

        def score_mod(score, b, h, i, j):
            return score + query_gate[b, i] * key_bias[b, j]

    if torch.compiler.is_compiling():
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention(q, k, v, score_mod=score_mod, scale=scale)
    return _compiled()(q, k, v, score_mod=score_mod, scale=scale)


BACKEND = Backend(
    "flex",
    "FlexAttention with a rank-1 score_mod",
    _forward,
    unsupported=all_of(no_lse, _unsupported),
    unavailable=_unavailable,
    automatic=False,  # it is compiled anew for every length
)
