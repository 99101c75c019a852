"""What attention plans save in time and by count: `python -m benchmarks.plan_time --frames 16,32`.

`--model page4d`: the bf16 trunk of the official size (336 x 518) with random weights. `--model nano`: the bundled weights from images to
depth (56 x 84), in fp32. Plans take turns, and the best time of each counts. The last column is how much of the factor promised by the
count the time keeps.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from page4d import Page4D
from page4d.execution.attention_plan import CHECKED_ROWS, PRESETS, AttentionPlan
from page4d.layers.attention import rope
from page4d_kernels import TokenLayout, mask_attention
from page4d_kernels.timing import Clock

from .formulas import heads_flops, trunk_flops
from .measure import provenance
from .model import make_inputs, our_model
from .sizes import GRID, PER_FRAME, SPECIAL

COMMAND = "python -m benchmarks.plan_time"


def best_of(runs: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Seconds of each, the least of some rounds in which they take turns."""
    clock = Clock(device)
    rows = [{name: clock.seconds(run) for name, run in runs.items()} for _ in range(rounds)]
    return {name: min(row[name] for row in rows) for name in runs}


def opened(name: str, frames: int, device: str) -> tuple[Page4D, Tensor, list[str] | None]:
    """A model, images for it, and the outputs that are timed (None: all)."""
    if name == "page4d":
        inputs = make_inputs("trunk", frames, torch.bfloat16, device, small=False)
        return our_model(inputs), inputs.images, ["camera"]
    model = Page4D.from_pretrained(name, device=device).eval()
    assert model.config.image_size is not None
    images = torch.rand(1, frames, 3, *model.config.image_size, generator=torch.Generator().manual_seed(0))
    return model, images.to(device), None


def passes(name: str, frames: int, rounds: int, device: str) -> list[dict[str, Any]]:
    """A row for each preset."""
    model, images, outputs = opened(name, frames, device)
    plans = {preset: AttentionPlan.preset(preset, model.config) for preset in PRESETS}
    size = (images.shape[-2], images.shape[-1])

    def run(plan: AttentionPlan) -> Callable[[], object]:
        return lambda: model(images, outputs=outputs, attention=plan)

    with torch.inference_mode():
        seconds = best_of({preset: run(plan) for preset, plan in plans.items()}, rounds, device)
    heads = sum(heads_flops(model.config, frames, size).values()) if outputs is None else 0.0
    flops = {preset: heads + sum(trunk_flops(model.config, frames, size, plan).values()) for preset, plan in plans.items()}
    rows = []
    for preset in plans:
        by_time, by_count = seconds["exact"] / seconds[preset], flops["exact"] / flops[preset]
        row = {"model": name, "frames": frames, "plan": preset, "seconds": seconds[preset]}
        rows.append(row | {"factor": by_time, "factor by count": by_count, "kept": by_time / by_count})
    return rows


def check(frames: int, rounds: int, device: str) -> dict[str, float]:
    """Seconds of a global block of the official size with cells of 2 x 2, and of its dense rows without and with the checked ones."""
    model, _, _ = opened("page4d", 1, device)
    block, heads = model.aggregator.global_blocks[0], model.config.num_heads
    layout = TokenLayout(frames, PER_FRAME, SPECIAL)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, layout.tokens, model.config.embed_dim, generator=generator).to(device)
    q, k, v = (torch.randn(1, heads, layout.tokens, 64, generator=generator).to(device, torch.bfloat16) for _ in range(3))
    table = rope(GRID, SPECIAL, 64, model.config.rope_base, x.device, torch.float32)
    sparse = AttentionPlan(((2, 2),)).sparsity(0, layout, GRID, CHECKED_ROWS, x.device)
    special = layout.special(q, 2)
    more = torch.cat([special, q[:, :, :CHECKED_ROWS]], 2)
    runs: dict[str, Callable[[], object]] = {
        "block": lambda: block(x, table, None, sparse),
        "special rows": lambda: mask_attention(special, k, v),
        "special and checked rows": lambda: mask_attention(more, k, v),
    }
    with torch.inference_mode():
        return best_of(runs, 3 * rounds, device)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="page4d", choices=["page4d", "nano"])
    parser.add_argument("--frames", default="16,32", help="numbers of frames (default: 16,32)")
    parser.add_argument("--rounds", type=int, default=2, help="how often each plan runs (default: 2)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, help="write the results here")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    numbers = [int(part) if part.isdecimal() else 0 for part in args.frames.split(",")]
    if min(numbers) < 2:
        parser.error(f"--frames {args.frames}: give numbers of at least 2, with a single frame there is nothing to save")
    rows: list[dict[str, Any]] = []
    print("| frames | plan | seconds | factor | by count | kept |\n|---:|---|---:|---:|---:|---:|", flush=True)
    for frames in numbers:
        measured = passes(args.model, frames, args.rounds, args.device)
        rows += measured
        for row in measured:
            factors = f"{row['factor']:.2f} | {row['factor by count']:.2f} | {row['kept']:.0%}"
            print(f"| {frames} | `{row['plan']}` | {row['seconds']:.1f} | {factors} |", flush=True)
        if args.model == "page4d":
            cost = check(frames, args.rounds, args.device)
            rows.append({"frames": frames} | cost)
            print(
                f"{frames} frames: the check takes {cost['with check'] / cost['block'] - 1:.2%} of a global block with cells of 2 x 2",
                flush=True,
            )
    if args.json is not None:
        args.json.write_text(json.dumps({**provenance(args.device, COMMAND), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
