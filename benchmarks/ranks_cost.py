"""What a pass on several GPUs would take, calculated: `python -m benchmarks.ranks_cost`. Nothing here is measured.

Arithmetic and bytes come from the formulas that the tests compare with counts. The rates below are assumed.
"""

from __future__ import annotations

from dataclasses import dataclass

from page4d.config import Page4DConfig, preset
from page4d.execution.across import Mesh, shares
from page4d.execution.memory import MemoryPlan, Share, Workload, predicted_bytes
from page4d.execution.traffic import sent_bytes

from .formulas import heads_flops, trunk_flops
from .sizes import SIZE

RATE = 400e12  # FLOP/s of a GPU in bf16, in matrix products and attention: two fifths of an H100's peak
NVLINK, PCIE, NETWORK = 360e9, 24e9, 40e9  # bytes/s that a GPU sends: 0.8 of NVLink 4, 0.75 of PCIe 4 x16, 0.8 of a 400 Gb/s port
BF16 = 2
OUTPUTS = frozenset({"camera", "depth"})


@dataclass(frozen=True)
class Cost:
    """Of a pass, on the rank that has the most to do."""

    compute: float  # seconds
    exchange: float  # seconds in which nothing is computed
    sent: int  # bytes
    memory: int  # bytes beyond the weights


def cost(config: Page4DConfig, frames: int, mesh: Mesh, within: float, between: float) -> Cost:
    """Bytes per second `within` a row of the mesh (all-to-all) and `between` rows (rings, which are hidden as far as attention takes)."""
    ranks = mesh.heads * mesh.rings
    counts = shares(frames, ranks)
    work = trunk_flops(config, frames, SIZE)
    flops = sum(work.values()) + frames * sum(heads_flops(config, 1, SIZE).values())
    rows = [sum(counts[first : first + mesh.heads]) for first in range(0, ranks, mesh.heads)]
    share = None if ranks == 1 else Share(frames, rows[0], max(rows), mesh.heads, mesh.rings)
    workload = Workload(config, 1, counts[0], SIZE, BF16, OUTPUTS, images_on_device=False, results_on_device=False, share=share)
    sent = sent_bytes(workload, counts, mesh, 0, mask=True)
    ring = sent.pop("ring", 0) / between
    attention = work["across frames"] / ranks / RATE
    hidden = min(ring, attention * (mesh.rings - 1) / mesh.rings)  # no block is on its way during the last step
    exchange = sum(sent.values()) / within + ring - hidden
    memory = predicted_bytes(workload, MemoryPlan(min(9, counts[0]), min(8, counts[0])))
    return Cost(flops * counts[0] / frames / RATE, exchange, sum(sent.values()) + round(ring * between), memory)


def seconds(found: Cost) -> str:
    return f"{found.compute + found.exchange:.2f} ({found.exchange / (found.compute + found.exchange):.1%})"


def by_link(config: Page4DConfig) -> list[str]:
    lines = ["| frames | GPUs | sent per GPU | NVLink, s (exchanging) | PCIe, s (exchanging) | GB per GPU |", "|---|---|---|---|---|---|"]
    for frames in (100, 300, 1000, 3000):
        for ranks in (1, 2, 4, 8):
            mesh = Mesh.of(ranks, config.num_heads)
            fast, slow = (cost(config, frames, mesh, link, link) for link in (NVLINK, PCIE))
            sent = f"{fast.sent / 1e9:.1f} GB"
            lines.append(f"| {frames} | {ranks} | {sent} | {seconds(fast)} | {seconds(slow)} | {fast.memory / 1e9:.1f} |")
    return lines


def rings_or_heads(config: Page4DConfig) -> list[str]:
    lines = ["| frames | GPUs | link | all-to-all, s (exchanging) | ring, s (exchanging) |", "|---|---|---|---|---|"]
    for name, link in (("NVLink", NVLINK), ("PCIe", PCIE)):
        for frames, ranks in ((50, 8), (100, 8), (300, 8), (1000, 8), (100, 2)):
            both = (cost(config, frames, mesh, link, link) for mesh in (Mesh(ranks, 1), Mesh(1, ranks)))
            lines.append(f"| {frames} | {ranks} | {name} | {' | '.join(map(seconds, both))} |")
    return lines


def many(config: Page4DConfig) -> list[str]:
    lines = ["| mesh of 64 GPUs, 8 per node | 10 000 frames, s (exchanging) | sent per GPU | GB per GPU |", "|---|---|---|---|"]
    for mesh, within, between in ((Mesh(8, 8), NVLINK, NETWORK), (Mesh(16, 4), NETWORK, NETWORK), (Mesh(1, 64), NETWORK, NETWORK)):
        found = cost(config, 10_000, mesh, within, between)
        lines.append(f"| {mesh} | {seconds(found)} | {found.sent / 1e9:.0f} GB | {found.memory / 1e9:.1f} |")
    return lines


def main() -> None:
    config = preset("page4d-mask").replace(point_head=None, track=None)
    for part in (by_link, rings_or_heads, many):
        print("\n".join(part(config)), end="\n\n")


if __name__ == "__main__":
    main()
