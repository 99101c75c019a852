"""One sequence on several processes against one process: `python -m benchmarks run --ranks N`.

Every process computes with one thread, or on a GPU of its own. In turn, process 0 runs the pass alone while the others wait, and all run it
together; a round's time is that of the slowest. The bytes that each process sends are counted and compared with the formula.
"""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from page4d.config import preset
from page4d.execution.across import Mesh, shares
from page4d.execution.memory import Workload
from page4d.execution.ranks import Ranks
from page4d.execution.traffic import sent_bytes
from page4d.model import Page4D

from .model import random_model
from .sizes import SIZE

ROUNDS = 3  # at least
CASES: dict[str, tuple[str, int, tuple[int, int]]] = {  # model, frames, size
    "nano-16x112x154": ("nano", 16, (112, 154)),
    "nano-64x112x154": ("nano", 64, (112, 154)),
    "wide-2x336x518": ("wide", 2, SIZE),
    "official-100x336x518": ("official", 100, SIZE),
    "official-500x336x518": ("official", 500, SIZE),
}
ON_CPU = ("nano-16x112x154", "nano-64x112x154", "wide-2x336x518")
OUTPUTS = ("camera",)


def make_model(name: str, device: str) -> Page4D:
    """nano; four layers of the official width with random weights; or the official size."""
    if name == "nano":
        return Page4D.from_pretrained("nano", device=device, dtype=torch.bfloat16 if device != "cpu" else torch.float32)
    if name == "official":
        return random_model("page4d-mask", torch.bfloat16, torch.float32, device)
    config = preset("page4d-mask").replace(depth=4, masked_blocks=(1, 3), mask_after=1, kept_layers=(0, 1, 2, 3), track=None)
    torch.manual_seed(0)
    return Page4D(config).to(device).eval()


def run(ranks: int, device: str, seconds: float, names: list[str]) -> list[dict[str, Any]]:
    """Rows of the cases. The processes are started here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_process, (ranks, port, device, seconds, names, queue), nprocs=ranks)
    return queue.get()


def _process(rank: int, size: int, port: int, device: str, seconds: float, names: list[str], queue: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", rank=rank, world_size=size)
    own = f"cuda:{rank}" if device == "cuda" else device
    rows = [row for name in names for row in _measure(name, own, seconds)]
    if rank == 0:
        queue.put(rows)
    dist.barrier()
    dist.destroy_process_group()


def _measure(name: str, device: str, seconds: float) -> list[dict[str, Any]]:
    model_name, frames, size = CASES[name]
    model, group = make_model(model_name, device), dist.group.WORLD
    assert group is not None
    ranks = Ranks.of(group, torch.device(device))
    images = torch.rand(1, frames, 3, *size, generator=torch.Generator().manual_seed(0))
    counts = shares(frames, ranks.size)
    start = sum(counts[: ranks.rank])
    part = images[:, start : start + counts[ranks.rank]].to(device)
    whole = images.to(device) if ranks.rank == 0 else images

    def together() -> Tensor | None:
        return model(part, outputs=OUTPUTS, group=group).pose_enc

    def alone() -> Tensor | None:
        return model(whole, outputs=OUTPUTS).pose_enc

    with torch.inference_mode():
        found, expected = together(), alone() if ranks.rank == 0 else None
        ranks.traffic.clear()
        together()
        sent = {kind: traffic.bytes for kind, traffic in ranks.traffic.items() if traffic.bytes}
        workload = Workload(model.config, 1, counts[ranks.rank], size, model.aggregator.compute_dtype.itemsize, frozenset(OUTPUTS))
        mesh = Mesh.of(ranks.size, model.config.num_heads)
        formula = sent_bytes(workload, counts, mesh, ranks.rank, model.config.mask_strength > 0)
        times: dict[str, list[float]] = {"1 process": [], f"{ranks.size} processes": [], "exchange": []}
        begin = time.perf_counter()
        enough = False
        while not enough:
            times["1 process"].append(_slowest(alone if ranks.rank == 0 else None, device))
            before = sum(traffic.seconds for traffic in ranks.traffic.values())
            times[f"{ranks.size} processes"].append(_slowest(together, device))
            times["exchange"].append(_largest(sum(traffic.seconds for traffic in ranks.traffic.values()) - before, device))
            late = _largest(float(time.perf_counter() - begin > seconds), device)  # all decide alike
            enough = bool(late) and len(times["exchange"]) >= ROUNDS
    error = float((found[:, :1] - expected[:, :1]).norm() / expected[:, :1].norm()) if ranks.rank == 0 else 0.0  # type: ignore[index]
    rows: list[dict[str, Any]] = []
    for variant in ("1 process", f"{ranks.size} processes"):
        lower, median, upper = statistics.quantiles(times[variant], n=4)
        rows.append({"case": name, "variant": variant, "median": median, "lower": lower, "upper": upper, "reason": ""})
    waited = statistics.median(times["exchange"])
    rows[1] |= {
        "mesh": str(mesh),
        "exchange_seconds": waited,
        "sent_bytes": sent,
        "formula_bytes": formula,
        "error": error,
        "speedup": rows[0]["median"] / rows[1]["median"],
    }
    return rows


def _slowest(call: Callable[[], object] | None, device: str) -> float:
    """Seconds of a call on the slowest process. None: this one waits."""
    dist.barrier()
    start = time.perf_counter()
    if call is not None:
        call()
        if device != "cpu":
            torch.cuda.synchronize()
    return _largest(time.perf_counter() - start if call is not None else 0.0, device)


def _largest(value: float, device: str) -> float:
    found = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| case | variant | ms (quartiles) | speed-up | waiting in exchanges | sent by process 0 | by formula |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        times = f"{row['median'] * 1e3:.1f} ({row['lower'] * 1e3:.1f} to {row['upper'] * 1e3:.1f})"
        if "mesh" not in row:
            lines.append(f"| {row['case']} | {row['variant']} | {times} | | | | |")
            continue
        sent, formula = (f"{sum(row[key].values()) / 1e6:.3f} MB" for key in ("sent_bytes", "formula_bytes"))
        shares_of = f"{row['exchange_seconds'] / row['median']:.0%}" if row["exchange_seconds"] else "not measured"
        lines.append(
            f"| {row['case']} | {row['variant']}: {row['mesh']} | {times} | {row['speedup']:.2f} | {shares_of} | {sent} | {formula} |"
        )
    return "\n".join(lines)
