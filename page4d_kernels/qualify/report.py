"""A record in words."""

from __future__ import annotations

from collections.abc import Sequence

from .record import ENTIRE, MARGIN, Entry, OpRecord


def describe(entry: Entry, ops: Sequence[str] | None = None) -> str:
    """Per op (default: all): who passed, who failed and why; per class: the factors against the safe backend, and whom "auto" takes."""
    lines = [f"record of {entry.environment['device']}, made {entry.made}"]
    for op, found in entry.ops.items():
        if ops and op not in ops:
            continue
        lines.append(op)
        for name, verdict in found.backends.items():
            if verdict.passed:
                lengths = f" (lengths drawn: {', '.join(map(str, verdict.lengths))})" if verdict.lengths else ""
                lines.append(f"  {name} passed: {'; '.join(verdict.passed)}{lengths}")
            for part, reason in verdict.failed.items():
                if part != ENTIRE and reason == verdict.failed.get(ENTIRE):  # the same
                    continue
                lines.append(f"  {name} failed{'' if part == ENTIRE else f' in {part}'}: {reason}")
            if verdict.skipped and not verdict.passed and not verdict.failed:
                lines.append(f"  {name} was not judged: {'; '.join(dict.fromkeys(verdict.skipped.values()))}")
        lines += [f"    {name}: {_factors(found, name)}" for name in found.times]
    return "\n".join(lines)


def _factors(found: OpRecord, name: str) -> str:
    factors = sorted(found.factors(name).items(), key=lambda item: -item[1])
    words = ", ".join(f"{backend} {factor:.2f}x" for backend, factor in factors)
    best = factors[0][0] if factors and factors[0][1] >= MARGIN else "the safe backend"
    return f"auto takes {best}" + (f" ({words})" if words else "")
