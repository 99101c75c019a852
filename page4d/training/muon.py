"""Muon: momentum for matrices, orthogonalised before the step.

torch has Muon since 2.9, but always computes in bf16. On a processor without bf16 matmuls it takes four fifths of a training step of nano.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # chosen to be steepest at 0; singular values end near 1, not exactly at 1
ITERATIONS = 5


def orthogonalise(matrix: Tensor) -> Tensor:
    """Approximately U V^T of a matrix U S V^T (m, n), in its dtype. Singular values of at least 0.0015 |matrix| become 0.68 to 1.21.

    X <- a X + (b A + c A^2) X with A = X X^T, five times, from X = matrix / |matrix| (Frobenius). A zero matrix stays zero. Computed in
    bf16 on a GPU, where that is accurate enough, and in fp32 elsewhere.

    Source: K. Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix.to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    wide = x if x.shape[0] <= x.shape[1] else x.mT  # so that X X^T is the smaller Gram matrix
    wide = wide / wide.norm().clamp_min(1e-7)
    for _ in range(ITERATIONS):
        gram = wide @ wide.mT
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return (wide if x.shape[0] <= x.shape[1] else wide.mT).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """W <- (1 - lr wd) W - 0.2 sqrt(max(m, n)) lr orthogonalise(G + 0.95 (M - G)) for matrices W (m, n) with gradients G.

    M is the running mean of the gradients, M <- 0.95 M + 0.05 G. The factor gives updates the root mean square of AdamW's (J. Liu et al.,
    Muon is scalable for LLM training, 2025). So both use the same learning rate and weight decay.
    """

    def __init__(self, params: Iterable[dict], lr: float = 1e-3, weight_decay: float = 0.01, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update all parameters that have gradients."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for weight in (w for w in group["params"] if w.grad is not None):
                state = self.state[weight]
                if not state:
                    state["mean"] = torch.zeros_like(weight)
                mean = state["mean"]
                mean.lerp_(weight.grad, 1 - momentum)
                direction = orthogonalise(weight.grad.lerp(mean, momentum))
                weight.mul_(1 - lr * group["weight_decay"])
                weight.add_(direction, alpha=-0.2 * math.sqrt(max(weight.shape)) * lr)
