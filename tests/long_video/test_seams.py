"""What the mask does for the alignment: movers of which two chunks disagree."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from page4d.long_video.chunks import Chunking
from page4d.long_video.seams import seam

OVERLAP = 4


def error(found, true) -> float:
    """The sum of the errors of scale (relative), rotation (radians) and translation (in units of the scene, about 3 m)."""
    angle = torch.linalg.matrix_norm(found.rotation - true.rotation) / math.sqrt(2)
    return float((found.scale / true.scale - 1).abs() + angle + (found.translation - true.translation).norm() / (3 * true.scale))


def noisy(prediction, seed: int, noise: float = 0.02):
    generator = torch.Generator().manual_seed(seed)
    return replace(prediction, depth=prediction.depth * (1 + noise * torch.randn(prediction.depth.shape, generator=generator)))


def with_movers(prediction, share: float, factor: float):
    """Things before the camera that cover a share of the picture, and whose depth is wrong by a factor. The mask knows them."""
    width = prediction.images.shape[-1]
    columns = torch.arange(width) < round(share * width / 7) * 7
    depth = torch.where(columns[None, None, None, :, None], prediction.depth * factor, prediction.depth)
    mask = torch.where(columns[::7], -0.5, 0.5).expand_as(prediction.mask)
    return replace(prediction, depth=depth, mask=mask)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_the_true_mask_keeps_movers_from_pulling(pieces, random_similarity, share):
    first, second = (noisy(piece, number) for number, piece in enumerate(pieces(Chunking(12, OVERLAP).divide(20))))
    first, second = with_movers(first, share, 1.0), with_movers(second, share, 1.4)
    true = random_similarity(0).after(random_similarity(1).inverse())
    masked, blind = (error(seam(first, second, OVERLAP, mask).similarity, true) for mask in (True, False))
    assert masked < 0.02 and masked < blind / 3, f"{masked:.4f} with the mask, {blind:.4f} without"


def test_without_a_mask_all_pixels_count(pieces):
    first, second = pieces(Chunking(12, OVERLAP).divide(20))
    plain = seam(replace(first, mask=None), second, OVERLAP)
    assert plain.static == 1 and plain.similarity.scale == seam(first, second, OVERLAP, mask=False).similarity.scale


def test_pixels_of_no_confidence_do_not_count(pieces, random_similarity):
    first, second = pieces(Chunking(12, OVERLAP).divide(20))
    wrong = torch.rand(second.depth_conf.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    second = replace(
        second,
        depth=torch.where(wrong[..., None], second.depth * 9, second.depth),
        depth_conf=torch.where(wrong, 0.05, 1.0),
    )
    true = random_similarity(0).after(random_similarity(1).inverse())
    found = seam(first, second, OVERLAP)
    assert error(found.similarity, true) < 1e-3 and found.error < 1e-3


def test_padding_does_not_count(pieces, random_similarity):
    """Its depth is whatever the network makes of white bars, with high confidence."""
    first, second = pieces(Chunking(12, OVERLAP).divide(20))
    valid = torch.ones(first.depth_conf.shape, dtype=torch.bool)
    valid[:, :, :20] = valid[:, :, -20:] = False
    first, second = (
        replace(part, depth=torch.where(valid[..., None], part.depth, d), depth_conf=torch.where(valid, 1.0, 9.0), valid=valid)
        for part, d in ((first, 1.0), (second, 4.0))
    )
    true = random_similarity(0).after(random_similarity(1).inverse())
    found = seam(first, second, OVERLAP)
    assert error(found.similarity, true) < 1e-3 and found.error < 1e-3
    wrong = seam(replace(first, valid=None), replace(second, valid=None), OVERLAP)
    assert error(wrong.similarity, true) > 0.05
