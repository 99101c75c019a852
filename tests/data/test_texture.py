"""The textures of the synthetic scenes."""

from __future__ import annotations

import torch

from page4d.data.synthetic.texture import make_textures


def test_levels_of_a_texture_are_averages():
    textures = make_textures(2, torch.Generator().manual_seed(0))

    def level(n):
        centres = (torch.arange(128 >> n) + 0.5) / (128 >> n)
        v, u = torch.meshgrid(centres, centres, indexing="ij")
        return textures(torch.ones(u.numel(), dtype=torch.long), u.flatten(), v.flatten(), torch.full((u.numel(),), float(n))).view(
            *u.shape, 3
        )

    finest = level(0)
    for n in (1, 3, 5):
        side = 1 << n
        assert torch.allclose(level(n), finest.unflatten(0, (-1, side)).unflatten(2, (-1, side)).mean((1, 3)), atol=1e-5)
    assert finest.std() > 0.05
