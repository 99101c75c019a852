"""How many bytes a rank sends in a pass without gradients, by formula. `Ranks.traffic` counts them; both are equal."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import Page4DConfig
from .across import Mesh
from .memory import FP32, Workload


def sent_bytes(workload: Workload, frames: Sequence[int], mesh: Mesh, rank: int, mask: bool, checked_layers: int = 0) -> dict[str, int]:
    """Bytes that a rank sends to the others, by kind of exchange.

    With n the tokens of this rank, N those of its row of the mesh, n_j those of row j, C the channels, u the ranks of a row, g the rows:

        attention, per global layer:  item * B * C * (3 n (u - 1) + N - n) / u     q, k and v to the row, the outputs back
        ring, per global layer:       item * B * C * 2 (n_j of g - 1 blocks) / u   keys and values, to the next row
        mask:                         4 B * n (R - 1)                              the key bias, to all R ranks
        camera:                       4 B * 2 C * S_r (R - 1)                      one token of each of S_r frames
        tracks:                       4 B * N_p L (S_r * iterations + [rank 0]) (R - 1)    features of N_p points

    Args:
        frames: of each rank.
        mask: whether it modulates.
        checked_layers: layers of an attention plan whose deviation is measured.
    """
    config, ranks, batch = workload.config, len(frames), workload.batch
    others, own = ranks - 1, frames[rank]
    layers = layers_run(config, workload.outputs)
    rows = [sum(frames[first : first + mesh.heads]) for first in range(0, ranks, mesh.heads)]
    place = rank // mesh.heads
    value = workload.itemsize * batch * workload.per_frame * config.embed_dim // mesh.heads  # bytes of a frame, of a rank's heads
    blocks = sum(rows[(place - step) % mesh.rings] for step in range(mesh.rings - 1))
    found = {
        "attention": layers * value * (3 * own * (mesh.heads - 1) + rows[place] - own),
        "ring": layers * value * 2 * blocks,
        "mask": FP32 * batch * own * workload.per_frame * others if mask else 0,
        "camera": FP32 * batch * own * 2 * config.embed_dim * others if "camera" in workload.outputs else 0,
        "deviation": FP32 * 2 * checked_layers * others,
        "tracks": 0,
    }
    if workload.points and config.track is not None:
        steps = own * config.track.iterations + (rank == 0)
        found["tracks"] = FP32 * batch * workload.points * config.track.features * steps * others
    return {kind: count for kind, count in found.items() if count}


def layers_run(config: Page4DConfig, outputs: frozenset[str]) -> int:
    """How many global layers run: up to the last one that a head reads, or none for the mask alone."""
    return config.kept_layers[-1] + 1 if outputs & {"camera", "depth", "points", "track"} else 0
