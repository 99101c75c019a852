"""A pose graph over similarities, solved by Levenberg-Marquardt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jacfwd, vmap

from ..geometry import Similarity

ROUNDS = 100
CONVERGED = 1e-5  # relative decrease of the cost
DAMPING = (1e-4, 1e10, 1e-12)  # the first one, the one at which there is no step that helps, and the least
CHANNELS = 7  # of a similarity: translation, rotation vector, log of the scale


@dataclass(frozen=True)
class Edge:
    """A measured similarity from node `j`'s world to node `i`'s."""

    i: int
    j: int
    similarity: Similarity
    sigma: float = 1.0  # the expected |e|, see `optimise`
    loop: bool = False  # it may be wrong, and must not bend the whole then


def optimise(nodes: Sequence[Similarity], edges: Sequence[Edge], units: Sequence[float]) -> list[Similarity]:
    """The nodes X_k, from their worlds to a common one, that fit the edges best; the first stays where it is.

        minimise  sum over edges of rho(|e| / sigma),   e = chart(S_ij^-1 X_i^-1 X_j),   chart(E) = (t / u_j, rotation vector of R, log s)

    rho is the square. For loops it is Cauchy's c^2 log(1 + x^2 / c^2), with c = 3 sqrt(1 + |i - j|): what the seams between i and j may
    have added up to is believed, much more is not. Float64 on the CPU, exact Jacobians by forward-mode differentiation, damping by the gain
    ratio (H. Nielsen, Damping parameter in Marquardt's method, 1999). Time is linear in the number of nodes. Deterministic.

    Args:
        nodes: where the solution starts.
        units: u_k, the length that counts as one in each node's world, such as its median depth.
    """
    at = torch.stack([_pack(node) for node in nodes])
    first, second = (torch.tensor([getattr(edge, name) for edge in edges]) for name in ("i", "j"))
    measured = torch.stack([_pack(edge.similarity) for edge in edges])
    sigma = torch.tensor([edge.sigma for edge in edges], dtype=torch.float64)[:, None]
    limit = torch.where(torch.tensor([edge.loop for edge in edges]), 3 * (1 + (first - second).abs()).double().sqrt(), math.inf)
    unit = torch.tensor(units, dtype=torch.float64)[second]

    def residuals(at: Tensor) -> Tensor:
        return vmap(_residual)(still, at[first], at[second], measured, unit) / sigma

    still = torch.zeros(len(first), 2, CHANNELS, dtype=torch.float64)
    best, damping, growth = _cost(residuals(at), limit), DAMPING[0], 2.0
    for _ in range(ROUNDS):
        error = residuals(at)
        jacobian = vmap(jacfwd(_residual))(still, at[first], at[second], measured, unit) / sigma[:, None, None]
        weight = 1 / (1 + error.square().sum(1) / limit**2)  # by which reweighted least squares follows Cauchy's function
        equations = _NormalEquations(error, jacobian, weight, first, second, len(at))
        improved = False
        while damping < DAMPING[1]:
            step = equations.solve(damping)
            moved = vmap(_moved)(at, step)
            cost = _cost(residuals(moved), limit)
            if cost < best:
                improved = True
                break
            damping, growth = damping * growth, 2 * growth
        if not improved:
            break
        gain = float((best - cost) / equations.predicted(step, damping))
        small = best - cost <= CONVERGED * best
        at, best, damping, growth = moved, cost, max(damping * max(1 / 3, 1 - (2 * gain - 1) ** 3), DAMPING[2]), 2.0
        if small:
            break
    return [_unpack(values) for values in at]


def residual(edge: Edge, nodes: Sequence[Similarity], unit: float) -> float:
    """|e| of an edge, see `optimise`."""
    zero, length = torch.zeros(2, CHANNELS, dtype=torch.float64), torch.tensor(unit, dtype=torch.float64)
    return float(_residual(zero, _pack(nodes[edge.i]), _pack(nodes[edge.j]), _pack(edge.similarity), length).norm())


class _NormalEquations:
    """(J^T W J + damping D) x = -J^T W e, D the diagonal, without the first node.

    Edges between neighbours make J^T W J block tridiagonal. The others, which are few, add a matrix of low rank, for which Woodbury's
    formula holds. So the time is linear in the number of nodes.
    """

    def __init__(self, error: Tensor, jacobian: Tensor, weight: Tensor, first: Tensor, second: Tensor, count: int):
        rows = jacobian * weight.sqrt()[:, None, None, None]  # (E, 7, 2, 7)
        ends = ((first, rows[:, :, 0]), (second, rows[:, :, 1]))
        self.vector = error.new_zeros(count, CHANNELS)
        square = error.new_zeros(count, CHANNELS)
        self.diagonal = error.new_zeros(count, CHANNELS, CHANNELS)
        self.below = error.new_zeros(count, CHANNELS, CHANNELS)  # block (k, k - 1)
        chained = ((first - second).abs() == 1) | (first == 0) | (second == 0)
        for node, part in ends:
            self.vector.index_put_((node,), (part.mT @ (weight.sqrt()[:, None] * error)[:, :, None])[:, :, 0], accumulate=True)
            square.index_put_((node,), part.square().sum(1), accumulate=True)
            self.diagonal.index_put_((node[chained],), (part.mT @ part)[chained], accumulate=True)
        for (lower, low), (upper, high) in (ends, ends[::-1]):
            later = chained & (upper == lower + 1)
            self.below.index_put_((upper[later],), (high.mT @ low)[later], accumulate=True)
        far = (~chained).nonzero()[:, 0]
        wide = error.new_zeros(len(far), CHANNELS, count, CHANNELS)
        for node, part in ends:
            wide[torch.arange(len(far)), :, node[far]] += part[far]
        self.far = wide.flatten(0, 1)  # (7 F, K, 7)
        self.square = square

    def solve(self, damping: float) -> Tensor:
        """Steps (K, 7), zero for the first node."""
        damped = self.diagonal + damping * torch.diag_embed(self.square)
        right = torch.cat([-self.vector[:, :, None], self.far.permute(1, 2, 0)], 2)
        found = _block_tridiagonal(damped[1:], self.below[2:], right[1:])  # (K - 1, 7, 1 + 7 F)
        step, spread = found[:, :, 0], found[:, :, 1:]
        if len(self.far):
            inner = torch.einsum("fkc,kcg->fg", self.far[:, 1:], spread) + torch.eye(len(self.far), dtype=step.dtype)
            step = step - spread @ torch.linalg.solve(inner, torch.einsum("fkc,kc->f", self.far[:, 1:], step))
        return torch.cat([step.new_zeros(1, CHANNELS), step])

    def predicted(self, step: Tensor, damping: float) -> Tensor:
        """By how much the step should lower the cost."""
        return (step * (damping * self.square * step - self.vector)).sum().clamp(min=1e-300)


def _block_tridiagonal(diagonal: Tensor, below: Tensor, right: Tensor) -> Tensor:
    """x (K, 7, n) of a symmetric positive definite block tridiagonal matrix: blocks (K, 7, 7) and (K - 1, 7, 7), right (K, 7, n)."""
    found: list[tuple[Tensor, Tensor]] = []  # of each block: what the next one takes away, and the rest
    for k in range(len(diagonal)):
        block, rest = diagonal[k], right[k]
        if k:
            take, known = found[-1]
            block, rest = block - below[k - 1] @ take, rest - below[k - 1] @ known
        beside = below[k].mT if k < len(below) else block[:, :0]
        solved = torch.linalg.solve(block, torch.cat([beside, rest], 1))
        found.append((solved[:, : beside.shape[1]], solved[:, beside.shape[1] :]))
    x = [found[-1][1]]
    for take, known in found[-2::-1]:
        x.append(known - take @ x[-1])
    return torch.stack(x[::-1])


def _cost(error: Tensor, limit: Tensor) -> Tensor:
    square = error.square().sum(1)
    return torch.where(limit.isinf(), square, limit**2 * torch.log1p(square / limit**2)).sum()


def _pack(x: Similarity) -> Tensor:
    """(13,): scale, rotation by rows, translation."""
    return torch.cat([x.scale.reshape(1), x.rotation.flatten(), x.translation]).double().cpu()


def _unpack(values: Tensor) -> Similarity:
    return Similarity(values[0], values[1:10].view(3, 3), values[10:])


def _moved(values: Tensor, step: Tensor) -> Tensor:
    """A node after a small step in its own world."""
    x = _unpack(values)
    change = Similarity(step[6].exp(), torch.linalg.matrix_exp(_skew(step[3:6])), step[:3])
    found = x.after(change)
    return torch.cat([found.scale.reshape(1), found.rotation.flatten(), found.translation])


def _residual(steps: Tensor, first: Tensor, second: Tensor, measured: Tensor, unit: Tensor) -> Tensor:
    """e (7,) of an edge after small steps (2, 7) of its two nodes."""
    i, j = _unpack(_moved(first, steps[0])), _unpack(_moved(second, steps[1]))
    error = _unpack(measured).inverse().after(i.inverse().after(j))
    return torch.cat([error.translation / unit, _rotation_vector(error.rotation), error.scale.log().reshape(1)])


def _skew(v: Tensor) -> Tensor:
    x, y, z = v.unbind()
    zero = torch.zeros_like(x)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero]).view(3, 3)


def _rotation_vector(rotation: Tensor) -> Tensor:
    """Axis times angle, below pi."""
    odd = (rotation - rotation.mT) / 2
    sine_axis = torch.stack([odd[2, 1], odd[0, 2], odd[1, 0]])
    square = sine_axis.square().sum()
    cosine = (rotation.diagonal().sum() - 1) / 2
    small = (square < 1e-12) & (cosine > 0)
    sine = torch.where(small, torch.ones_like(square), square).sqrt()
    return sine_axis * torch.where(small, 1 + square / 6, torch.atan2(sine, cosine) / sine)
