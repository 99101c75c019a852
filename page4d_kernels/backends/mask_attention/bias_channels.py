"""The bias r c^T folded into eight more channels of q and k, exactly, for kernels that know no bias. Their head dims
are multiples of eight.

With r and c split into parts that bf16 holds, r = r1 + r2 + r3 and c / scale = c1 + c2 + c3, eight products make up r c to about 2^-32:

    q' = [q, r1, r1, r2, r2, r1, r3, r2, r3],   k' = [k, c1, c2, c1, c2, c3, c1, c3, c2],   q' k'^T * scale = q k^T * scale + r c^T

In fp32 one product is enough and rounds least, unless torch may round the inputs of fp32 matmuls, to TF32 or bf16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)  # the range of fp16 is too small for c / scale
LARGEST = 1e30  # of |c / scale|: far beyond what a softmax tells apart, and far from overflow
PRODUCTS = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (1, 2), (2, 1))  # parts of r and of c; the rest is below fp32's rounding
EXTRA = len(PRODUCTS)  # channels


def fold(q: Tensor, k: Tensor, query_gate: Tensor, key_bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q' (B, H, Nq, D + 8) and k' (B, H, Nk, D + 8), copies."""
    scaled = (key_bias / scale).clamp(-LARGEST, LARGEST)
    if q.dtype == torch.float32 and not _rounds():
        return tuple(_append(x, F.pad(y.unsqueeze(-1), (0, EXTRA - 1))) for x, y in ((q, query_gate), (k, scaled)))  # type: ignore[return-value]
    parts_r, parts_c = _parts(query_gate), _parts(scaled)
    of_q = torch.stack([parts_r[i] for i, _ in PRODUCTS], -1)
    of_k = torch.stack([parts_c[j] for _, j in PRODUCTS], -1)
    return _append(q, of_q.to(q.dtype)), _append(k, of_k.to(k.dtype))


def _rounds() -> bool:
    """Whether torch may round the inputs of fp32 matmuls. A compiler cannot ask."""
    if torch.compiler.is_compiling():
        return True
    own = getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", "none")
    return torch.get_float32_matmul_precision() != "highest" or own not in ("none", "ieee")


def _append(x: Tensor, columns: Tensor) -> Tensor:
    return torch.cat([x, columns.unsqueeze(1).expand(-1, x.shape[1], -1, -1)], -1)


def _parts(x: Tensor) -> list[Tensor]:
    """x (fp32) as a sum of three bf16 tensors, the largest first."""
    parts = []
    for _ in range(3):
        parts.append(x.to(torch.bfloat16))
        x = x - parts[-1].float()
    return parts
