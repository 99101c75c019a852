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
CONVERGED = 1e-10  # relative decrease of the cost
DAMPING = (1e-4, 1e10)  # the first one, and the one at which there is no step that helps
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
    have added up to is believed, much more is not. Float64 on the CPU, exact Jacobians by forward-mode differentiation, dense normal
    equations. Deterministic.

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
    best, damping = _cost(residuals(at), limit), DAMPING[0]
    for _ in range(ROUNDS):
        error = residuals(at)
        jacobian = vmap(jacfwd(_residual))(still, at[first], at[second], measured, unit) / sigma[:, None, None]
        weight = 1 / (1 + error.square().sum(1) / limit**2)  # by which reweighted least squares follows Cauchy's function
        matrix, vector = _normal_equations(error, jacobian, weight, first, second, len(at))
        improved = False
        while damping < DAMPING[1]:
            step = torch.linalg.solve(matrix + damping * torch.diag(matrix.diagonal()), -vector)
            moved = vmap(_moved)(at, torch.cat([step.new_zeros(CHANNELS), step]).view(-1, CHANNELS))
            cost = _cost(residuals(moved), limit)
            if cost < best:
                improved = True
                break
            damping *= 10
        if not improved:
            break
        small = best - cost <= CONVERGED * best
        at, best, damping = moved, cost, max(damping / 10, 1e-12)
        if small:
            break
    return [_unpack(values) for values in at]


def residual(edge: Edge, nodes: Sequence[Similarity], unit: float) -> float:
    """|e| of an edge, see `optimise`."""
    zero, length = torch.zeros(2, CHANNELS, dtype=torch.float64), torch.tensor(unit, dtype=torch.float64)
    return float(_residual(zero, _pack(nodes[edge.i]), _pack(nodes[edge.j]), _pack(edge.similarity), length).norm())


def _normal_equations(error: Tensor, jacobian: Tensor, weight: Tensor, first: Tensor, second: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """J^T W J and J^T W e, without the first node: (7 (K - 1), 7 (K - 1)) and (7 (K - 1),)."""
    whole = error.new_zeros(len(error), CHANNELS, count, CHANNELS)
    edge = torch.arange(len(error))
    whole[edge, :, first] += jacobian[:, :, 0]
    whole[edge, :, second] += jacobian[:, :, 1]
    rows = whole[:, :, 1:].flatten(2).flatten(0, 1)
    weighted = rows * weight.repeat_interleave(CHANNELS)[:, None]
    return rows.T @ weighted, weighted.T @ error.flatten()


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
