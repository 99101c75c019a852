"""Levenberg-Marquardt over similarities: known graphs, loops that close, and loops that are wrong."""

from __future__ import annotations

import math

import pytest
import torch

from page4d.geometry import Similarity, quaternion_to_matrix
from page4d.long_video.pose_graph import Edge, optimise, residual


def ring(count: int) -> list[Similarity]:
    """Worlds around a circle of radius 5, of growing units; the first is the common one."""
    found = []
    for k in range(count):
        angle = 2 * math.pi * k / count
        turn = quaternion_to_matrix(torch.tensor([0, 0, math.sin(angle / 2), math.cos(angle / 2)], dtype=torch.float64))
        place = torch.tensor([5 * math.cos(angle) - 5, 5 * math.sin(angle), 0.1 * k], dtype=torch.float64)
        found.append(Similarity(torch.tensor(1 + 0.05 * k, dtype=torch.float64), turn, place))
    return found


def between(nodes, i: int, j: int) -> Similarity:
    return nodes[i].inverse().after(nodes[j])


def disturbed(x: Similarity, size: float, generator: torch.Generator) -> Similarity:
    draw = size * torch.randn(7, generator=generator, dtype=torch.float64)
    quaternion = torch.cat([draw[3:6] / 2, torch.ones(1, dtype=torch.float64)])
    return x.after(Similarity(draw[6].exp(), quaternion_to_matrix(quaternion), draw[:3]))


def distance(nodes, true) -> float:
    return max(float((a.apply(torch.eye(3).double()) - b.apply(torch.eye(3).double())).norm()) for a, b in zip(nodes, true, strict=True))


def chain(true, noise: float, seed: int = 0) -> tuple[list[Edge], list[Similarity]]:
    """Edges between neighbours with noise, and the nodes that follow from them."""
    generator = torch.Generator().manual_seed(seed)
    edges = [Edge(k, k + 1, disturbed(between(true, k, k + 1), noise, generator), 3 * noise) for k in range(len(true) - 1)]
    nodes = [true[0]]
    for edge in edges:
        nodes.append(nodes[-1].after(edge.similarity))
    return edges, nodes


def test_exact_edges_give_the_exact_nodes_from_afar():
    true, generator = ring(8), torch.Generator().manual_seed(0)
    edges = [Edge(i, j, between(true, i, j)) for i, j in ((0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7), (0, 7), (2, 6))]
    start = [true[0], *(disturbed(node, 0.3, generator) for node in true[1:])]
    assert distance(start, true) > 0.5
    assert distance(optimise(start, edges, [1.0] * 8), true) < 1e-6


def test_without_a_loop_nothing_moves():
    edges, nodes = chain(ring(6), 0.05)
    assert distance(optimise(nodes, edges, [1.0] * 6), nodes) < 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_a_loop_takes_back_the_drift(seed):
    true = ring(12)
    edges, nodes = chain(true, 0.02, seed)
    loop = Edge(0, 11, between(true, 0, 11), 0.06, loop=True)
    solved = optimise(nodes, [*edges, loop], [1.0] * 12)
    drift = float((nodes[11].translation - true[11].translation).norm())
    assert float((solved[11].translation - true[11].translation).norm()) < drift / 4
    middle = float((nodes[8].translation - true[8].translation).norm())
    assert float((solved[8].translation - true[8].translation).norm()) < middle + 0.02
    assert residual(loop, solved, 1.0) < residual(loop, nodes, 1.0) / 4


def test_a_wrong_loop_is_outvoted_and_a_trusted_one_is_not():
    true = ring(12)
    edges, nodes = chain(true, 0.005)
    good = Edge(0, 11, between(true, 0, 11), 0.015, loop=True)
    wrong = Similarity(
        torch.tensor(2.0, dtype=torch.float64), torch.eye(3, dtype=torch.float64), torch.tensor([3.0, -4, 1], dtype=torch.float64)
    )
    bent = optimise(nodes, [*edges, good, Edge(2, 8, wrong, 0.015)], [1.0] * 12)
    robust = optimise(nodes, [*edges, good, Edge(2, 8, wrong, 0.015, loop=True)], [1.0] * 12)
    assert distance(bent, true) > 1 > 5 * distance(robust, true)


def test_it_repeats_to_the_bit():
    true = ring(6)
    edges, nodes = chain(true, 0.05)
    edges.append(Edge(0, 5, between(true, 0, 5), 0.15, loop=True))
    first, second = (optimise(nodes, edges, [1.0] * 6) for _ in range(2))
    assert all(torch.equal(x, y) for a, b in zip(first, second, strict=True) for x, y in zip(a, b, strict=True))
