"""TAP-Vid metrics of point tracks that start in the first frame.

Source: C. Doersch et al., TAP-Vid: A Benchmark for Tracking Any Point in a Video, NeurIPS 2022 ("first" queries).
"""

from __future__ import annotations

import torch
from torch import Tensor

THRESHOLDS = (1, 2, 4, 8, 16)  # in pixels of an image scaled to 256 x 256
METRICS = ("delta_avg", "occlusion_accuracy", "average_jaccard")


def track_metrics(
    predicted: Tensor, predicted_visible: Tensor, true: Tensor, true_visible: Tensor, size: tuple[int, int]
) -> dict[str, float]:
    """Metrics of tracks (S, N, 2), x and y in pixels of images of `size` (H, W), and their visibilities (S, N) bool.

    Only points that are visible in frame 0 count, as the queries are there. Only frames 1 to S - 1 count, as frame 0 is given.

    delta_avg: fraction of visible true positions with a prediction within the threshold, averaged over 1, 2, 4, 8, 16 px of an image
      scaled to 256 x 256.
    occlusion_accuracy: fraction of positions whose visibility is predicted correctly.
    average_jaccard: TP / (P + FP), averaged over the thresholds. TP: visible, predicted visible and within the threshold; P: visible;
      FP: predicted visible, but occluded or beyond the threshold.
    NaN if there is nothing to count or a prediction is not finite.
    """
    queried = true_visible[0]
    if not predicted[:, queried].isfinite().all():
        return dict.fromkeys(METRICS, float("nan"))
    seen, guess = true_visible[1:, queried], predicted_visible[1:, queried]
    to_256 = torch.tensor([256 / size[1], 256 / size[0]], dtype=torch.float64)
    distance = ((predicted[1:, queried].double() - true[1:, queried].double()) * to_256).norm(dim=-1)
    near = distance < torch.tensor(THRESHOLDS, dtype=torch.float64)[:, None, None]  # (5, S - 1, M)
    hits = (near & seen & guess).sum((1, 2)).double()
    false_positives = (guess & ~(near & seen)).sum((1, 2)).double()
    visible = seen.sum().double()
    found = (
        ((near & seen).sum((1, 2)) / visible).mean(),
        (seen == guess).double().mean(),
        (hits / (visible + false_positives)).mean(),
    )
    return {name: float(value) for name, value in zip(METRICS, found, strict=True)}
