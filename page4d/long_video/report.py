"""What a run in chunks found out about itself: as JSON, and in words."""

from __future__ import annotations

import math
from typing import Any

from .chunks import Chunk
from .run import LongVideo


def as_json(found: LongVideo) -> dict[str, Any]:
    """For chunks.json, see docs/long_video.md. Numbers that are not finite are null."""
    return {
        "chunks": [{"start": chunk.start, "end": chunk.end, "overlap": chunk.overlap} for chunk in found.chunks],
        "seams": [
            {
                "frames": _common(chunk),
                "aligned_by": seam.method,
                "scale": _finite(float(seam.similarity.scale)),
                "abs_rel": _finite(seam.error),
                "static": _finite(seam.static),
            }
            for seam, chunk in zip(found.seams, found.chunks[1:], strict=True)
        ],
        "loops": [
            {
                "frames": [loop.first, loop.second],
                "chunks": [loop.edge.i, loop.edge.j],
                "likeness": loop.likeness,
                "abs_rel": [seam.error for seam in loop.seams],
                "residual_before": _finite(before),
                "residual_after": _finite(after),
            }
            for loop, before, after in found.loops or []
        ],
    }


def in_words(found: LongVideo) -> list[str]:
    """A line on the seams and one on the loops."""
    errors = [seam.error if math.isfinite(seam.error) else math.inf for seam in found.seams]
    drift = [abs(float(seam.similarity.scale.log())) for seam in found.seams]
    worst = max(range(len(errors)), key=errors.__getitem__)
    first, last = _common(found.chunks[worst + 1])
    where = f"frames {first} to {last}" if last > first else f"frame {first}"
    cameras = sum(seam.method == "cameras" for seam in found.seams)
    median = sorted(errors)[len(errors) // 2]
    lines = [
        f"{len(found.chunks)} chunks: depths of common frames differ by {_percent(median)} (AbsRel, median of the seams), "
        f"at worst by {_percent(errors[worst])} at {where}; the scale drifts by "
        f"{_percent(math.expm1(sum(drift) / len(drift)))} per seam, at most by {_percent(math.expm1(max(drift)))}"
        + (f"; {cameras} of {len(found.seams)} are aligned by cameras alone" if cameras else "")
    ]
    if found.loops:
        gaps = ", ".join(f"{loop.first} and {loop.second} ({before:.2g} -> {after:.2g})" for loop, before, after in found.loops[:4])
        more = f" and {len(found.loops) - 4} more" if len(found.loops) > 4 else ""
        lines.append(f"loops: closed between frames {gaps}{more}; in brackets the residual before and after")
    elif found.loops is not None:
        lines.append("loops: none found")
    return lines


def _common(chunk: Chunk) -> list[int]:
    """The first and the last frame that a chunk shares with the one before."""
    return [chunk.start, chunk.start + chunk.overlap - 1]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _percent(share: float) -> str:
    return "an unknown amount" if not math.isfinite(share) else f"{share:.0%}" if share >= 0.1 else f"{100 * share:.2g}%"
