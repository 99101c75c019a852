"""How much memory is free on this machine, and how many processes share it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

USABLE_SHARE = 0.9  # of the free memory: allocators round up


def budget_of(device: torch.device) -> int | None:
    """Bytes to plan for: 0.9 of the free memory of the GPU, the system or the container. None if it is unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(USABLE_SHARE * (free + reusable))
    free_here = [x for x in (_free_of_system(), free_of_container(Path("/sys/fs/cgroup"))) if x is not None]
    return int(USABLE_SHARE * min(free_here)) if free_here else None


def _free_of_system() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    except (OSError, StopIteration):
        pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names else 0
        return pages * os.sysconf("SC_PAGE_SIZE") // 2 if pages else None


def free_of_container(group: Path) -> int | None:
    """What the control group at this path may still allocate; its page cache counts as free. None if it has no limit."""
    for limit, usage, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, used = int((group / limit).read_text()), int((group / usage).read_text())
            stat = dict(line.split() for line in (group / limit).with_name("memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such group, or "max"
            continue
        return max(0, most - used + int(stat.get(cache, 0)))
    return None


def ranks_of_a_node() -> int | None:
    """As torchrun tells it."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(text) if text.isdecimal() and int(text) > 0 else None
