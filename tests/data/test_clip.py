"""The bundled clip shows what its renderer renders."""

from __future__ import annotations

import pytest
import torch

from page4d.data import bundled_clip, load_frames
from page4d.data.clip import FPS, FRAMES, SIZE, render_clip
from page4d.data.video import write_video


def test_the_bundled_clip_is_readable_and_small():
    path = bundled_clip()
    assert path.stat().st_size < 700_000
    frames = load_frames([path], size=SIZE)
    assert frames.images.shape == (FRAMES, 3, *SIZE)
    assert frames.timestamps == pytest.approx([i / FPS for i in range(FRAMES)], abs=1e-3)


def test_the_bundled_clip_shows_the_rendered_scene():
    half = (SIZE[0] // 2, SIZE[1] // 2)  # for speed
    video = load_frames([bundled_clip()], size=half).images
    rendered = render_clip(half, supersample=1)
    assert (video - rendered.images).abs().mean() < 0.04  # another scene: 0.26
    moving = rendered.dynamic.float().mean((1, 2))
    assert moving.min() > 0.02 and moving.max() < 0.3


def test_written_videos_are_read_back(tmp_path):
    images = torch.linspace(0, 1, 5)[:, None, None, None].expand(5, 3, 43, 65)
    path = write_video(tmp_path / "grey.mp4", images, 10)
    frames = load_frames([path], size=(42, 56)).images
    assert frames.shape[0] == 5 and (frames.mean((1, 2, 3)) - images.mean((1, 2, 3))).abs().max() < 0.03
