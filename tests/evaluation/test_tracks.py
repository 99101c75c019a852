from __future__ import annotations

import math

import pytest
import torch

from page4d.evaluation.tracks import track_metrics


def by_loops(predicted, predicted_visible, true, true_visible, size) -> dict[str, float]:
    frames, points = true_visible.shape
    deltas, jaccards = [], []
    for threshold in (1, 2, 4, 8, 16):
        near = seen = true_positive = positive = false_positive = right = total = 0
        for n in range(points):
            if not true_visible[0, n]:
                continue
            for t in range(1, frames):
                dx, dy = (float(predicted[t, n, i] - true[t, n, i]) * 256 / side for i, side in ((0, size[1]), (1, size[0])))
                close = math.hypot(dx, dy) < threshold
                total += 1
                right += bool(predicted_visible[t, n]) == bool(true_visible[t, n])
                if true_visible[t, n]:
                    seen += 1
                    near += close
                    positive += 1
                if predicted_visible[t, n]:
                    if true_visible[t, n] and close:
                        true_positive += 1
                    else:
                        false_positive += 1
        deltas.append(near / seen)
        jaccards.append(true_positive / (positive + false_positive))
    return {"delta_avg": sum(deltas) / 5, "occlusion_accuracy": right / total, "average_jaccard": sum(jaccards) / 5}


def tracks(frames: int = 6, points: int = 30, size=(120, 200)):
    generator = torch.Generator().manual_seed(0)
    true = torch.rand(frames, points, 2, generator=generator) * torch.tensor([size[1], size[0]])
    visible = torch.rand(frames, points, generator=generator) > 0.3
    predicted = true + torch.randn(frames, points, 2, generator=generator) * (torch.rand(frames, points, 1, generator=generator) * 12)
    return predicted, torch.rand(frames, points, generator=generator) > 0.4, true, visible, size


def test_metrics_are_those_of_loops():
    arguments = tracks()
    expected = by_loops(*arguments)
    assert track_metrics(*arguments) == pytest.approx(expected)
    assert 0.1 < expected["delta_avg"] < 0.9 and 0.1 < expected["average_jaccard"] < 0.9


def test_perfect_tracks_score_one_whatever_the_query_frame_says():
    _, _, true, visible, size = tracks()
    perfect = {"delta_avg": 1, "occlusion_accuracy": 1, "average_jaccard": 1}
    assert track_metrics(true, visible, true, visible, size) == perfect
    elsewhere, seen = true.clone(), visible.clone()
    elsewhere[0] += 50  # the query frame is given
    seen[0] = ~seen[0]
    elsewhere[:, ~visible[0]] = math.nan  # points that are not visible in the first frame do not count
    assert track_metrics(elsewhere, seen, true, visible, size) == perfect


def test_thresholds_are_in_pixels_at_256():
    true, visible = torch.zeros(2, 1, 2), torch.ones(2, 1, dtype=torch.bool)
    shifted = true + torch.tensor([3.0, 0.0])
    shares = [track_metrics(shifted, visible, true, visible, (256, width))["delta_avg"] for width in (128, 256, 1024)]
    assert shares == pytest.approx([2 / 5, 3 / 5, 5 / 5])  # 6, 3 and 0.75 pixels


def test_metrics_are_nan_without_anything_to_count():
    predicted, guess, true, visible, size = tracks()
    assert all(math.isnan(x) for x in track_metrics(predicted[:1], guess[:1], true[:1], visible[:1], size).values())
    predicted[1, visible[0].nonzero()[0]] = math.nan
    assert all(math.isnan(x) for x in track_metrics(predicted, guess, true, visible, size).values())
