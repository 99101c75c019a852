"""The trained parameters, their optimizer groups, and the schedules of learning rate and mask strength."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from ..errors import ConfigError
from ..model import Page4D
from .config import OptimizerConfig
from .muon import Muon


def choose_trainable(model: Page4D, which: str) -> int:
    """Freeze all parameters except those that `which` names, and return the number of trained parameters.

    `which` is "all", "middle" (the masked blocks and the mask head) or "dense" (the depth and point heads, which leaves cameras and mask
    unchanged). Frozen modules go to eval mode, the others to training mode.

    Raises:
        ConfigError: "middle" for a model without masked blocks.
    """
    aggregator = model.aggregator
    first, end = model.config.masked_blocks
    if which == "all":
        chosen: list[nn.Module | None] = [model]
    elif which == "dense":
        chosen = [model.depth_head, model.point_head]
    elif first == end:
        raise ConfigError("trainable: middle needs a model with masked blocks, and this one has none: use all")
    else:
        chosen = [*aggregator.frame_blocks[first:end], *aggregator.global_blocks[first:end], aggregator.spatial_mask_head]
    model.requires_grad_(False).eval()
    for module in (module for module in chosen if module is not None):
        module.requires_grad_(True).train()
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def make_optimizers(named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """AdamW for the parameters that require gradients; with kind "muon", Muon for the weight matrices of transformer blocks.

    AdamW has separate groups for the mask head and for vectors (biases, norms, layer scales). Vectors have no weight decay.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    matrices: list[nn.Parameter] = []
    for name, parameter in named:
        if parameter.requires_grad:
            mask_head = name.startswith("aggregator.spatial_mask_head.")
            if config.kind == "muon" and parameter.dim() == 2 and ("blocks." in name or "trunk." in name):
                matrices.append(parameter)
            else:
                groups.setdefault((mask_head, parameter.dim() > 1), []).append(parameter)
    adamw = torch.optim.AdamW(
        {
            "params": parameters,
            "lr": config.mask_lr if mask_head else config.lr,
            "peak": config.mask_lr if mask_head else config.lr,
            "warmup": config.mask_warmup if mask_head else config.warmup,
            "weight_decay": (config.mask_weight_decay if mask_head else config.weight_decay) if decays else 0.0,
        }
        for (mask_head, decays), parameters in groups.items()
    )
    if not matrices:
        return [adamw]
    schedule = {"lr": config.lr, "peak": config.lr, "warmup": config.warmup, "weight_decay": config.weight_decay}
    return [adamw, Muon([{"params": matrices, **schedule}])]


def learning_rate(progress: float, peak: float, warmup: float, floor: float) -> float:
    """Linear from `floor` to `peak` over the fraction `warmup` of the run, then a half cosine back to `floor`; progress in [0, 1]."""
    if progress < warmup:
        return floor + (peak - floor) * progress / warmup
    return floor + (peak - floor) * (1 + math.cos(math.pi * (progress - warmup) / max(1 - warmup, 1e-9))) / 2


def set_learning_rates(optimizers: Iterable[torch.optim.Optimizer], progress: float, floor: float) -> None:
    """Set every group's learning rate at the fraction `progress` of the run."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = learning_rate(progress, group["peak"], group["warmup"], floor)


def mask_schedule(step: float, hold_start: float, hold_end: float, strength: float = 64.0) -> float:
    """Mask strength at a training step: `strength` before `hold_start`, 0 from `hold_end` on, a half cosine in between."""
    if step < hold_start:
        return strength
    if step >= hold_end:
        return 0.0
    return strength * (1 + math.cos(math.pi * (step - hold_start) / (hold_end - hold_start))) / 2
