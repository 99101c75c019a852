"""Errors of depth maps, and the alignments that make up for the unknown scale. Everything on valid pixels alone, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-5  # of predictions where a logarithm or a ratio needs a positive one
METRICS = ("abs_rel", "sq_rel", "rmse", "log_rmse", "delta1", "delta2", "delta3")


def depth_metrics(predicted: Tensor, true: Tensor) -> dict[str, float]:
    """Errors of predicted depths (N,) against true ones (N,), which are positive.

    abs_rel = mean |p - g| / g, sq_rel = mean (p - g)^2 / g, rmse = sqrt(mean (p - g)^2), log_rmse = sqrt(mean (ln p - ln g)^2),
    delta_k = share of max(p / g, g / p) < 1.25^k; in log_rmse and delta_k, p is at least 1e-5. NaN if N is 0.
    """
    p, g = predicted.double(), true.double()
    if not len(g) or not p.isfinite().all():
        return dict.fromkeys(METRICS, float("nan"))
    error, floored = p - g, p.clamp_min(FLOOR)
    ratio = torch.maximum(floored / g, g / floored)
    found = [
        (error.abs() / g).mean(),
        (error.square() / g).mean(),
        error.square().mean().sqrt(),
        (floored.log() - g.log()).square().mean().sqrt(),
        *((ratio < 1.25**k).double().mean() for k in (1, 2, 3)),
    ]
    return {name: float(value) for name, value in zip(METRICS, found, strict=True)}


def align_median(predicted: Tensor, true: Tensor) -> tuple[float, float]:
    """Scale median(g) / median(p), shift 0; of two middle values PyTorch's median is the lower."""
    return float(true.double().median() / predicted.double().median()), 0.0


def align_scale(predicted: Tensor, true: Tensor, steps: int = 10) -> tuple[float, float]:
    """Scale towards the least sum |s p - g|, shift 0.

    From mean(g) / mean(p), `steps` of iteratively reweighted least squares, s = sum(w p g) / sum(w p^2) with
    w = 1 / (|s p - g| + 1e-8); at least 1e-3 in the end.
    """
    p, g = predicted.double(), true.double()
    scale = g.mean() / p.mean()
    for _ in range(steps):
        weight = 1 / ((scale * p - g).abs() + 1e-8)
        scale = (weight * p * g).sum() / (weight * p * p).sum()
    return float(scale.clamp_min(1e-3)), 0.0


def align_scale_shift(predicted: Tensor, true: Tensor, steps: int = 60) -> tuple[float, float]:
    """Scale and shift of the least sum |s p + t - g|.

    Iteratively reweighted least squares, with weights 1 / sqrt(r^2 + e^2) whose e falls by a third per step, from the mean error of the
    plain least squares by ten orders of magnitude: each step starts close to the minimum of a slightly smoother sum. The sum that is
    reached is the least one to 0.1 %, mostly to far less.
    """
    p, g = predicted.double(), true.double()
    weight, smooth = torch.ones_like(p), None
    scale, shift = p.new_tensor(1.0), p.new_tensor(0.0)
    for _ in range(steps):
        total = weight.sum()
        mean_p, mean_g = (weight * p).sum() / total, (weight * g).sum() / total
        spread = (weight * (p - mean_p) ** 2).sum()
        if spread > 0:  # otherwise all predictions are equal and any scale does
            scale = (weight * (p - mean_p) * (g - mean_g)).sum() / spread
        shift = mean_g - scale * mean_p
        error = scale * p + shift - g
        smooth = error.abs().mean() if smooth is None else smooth / 1.5
        if smooth == 0:
            break
        weight = (error.square() + smooth * smooth).rsqrt()
    return float(scale), float(shift)


def align_scale_shift_adam(predicted: Tensor, true: Tensor, steps: int = 1000, tolerance: float = 1e-6) -> tuple[float, float]:
    """Scale and shift as the official script fits them: Adam with learning rate 1e-4 on sum |s p + t - g|, from the ratio of medians.

    Adam moves by about its learning rate per step, so that this ends within 0.1 of where it starts, at a minimum or not. It stops
    when the sum changes by less than `tolerance`.
    """
    p, g = predicted.double(), true.double()
    with torch.inference_mode(False), torch.enable_grad():
        p, g = p.clone(), g.clone()  # tensors made in inference mode take no part in a gradient
        line = torch.tensor(align_median(p, g), dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.Adam([line], lr=1e-4)
        before = float("inf")
        for _ in range(steps):
            optimiser.zero_grad()
            loss = (line[0] * p + line[1] - g).abs().sum()
            loss.backward()
            optimiser.step()
            now = float(loss.detach())
            if abs(before - now) < tolerance:
                break
            before = now
    scale, shift = line.tolist()
    return scale, shift


def align_metric(predicted: Tensor, true: Tensor) -> tuple[float, float]:
    """No alignment: for predictions that claim to be in the unit of the truth."""
    return 1.0, 0.0


ALIGNMENTS = {"scale": align_scale, "scale&shift": align_scale_shift, "median": align_median, "metric": align_metric}
OFFICIAL_ALIGNMENTS = {**ALIGNMENTS, "scale&shift": align_scale_shift_adam}
