from __future__ import annotations

import numpy as np
import pytest
import torch

from page4d.data import bundled_clip, load_frames
from page4d.data.clip import FPS, RenderedClip, render_clip, write_clip
from page4d.geometry import unproject


@pytest.fixture(scope="module")
def clip() -> RenderedClip:
    return render_clip(frames=4, height=84, width=112, supersample=1)


def test_the_bundled_clip_is_readable_and_small() -> None:
    path = bundled_clip()
    assert path.stat().st_size < 400_000
    frames = load_frames([path], size=(252, 336))
    assert frames.images.shape == (28, 3, 252, 336)
    assert frames.timestamps == pytest.approx([i / FPS for i in range(28)], abs=1e-3)


def test_the_bundled_clip_shows_what_the_renderer_draws() -> None:
    frames = load_frames([bundled_clip()], size=(252, 336), max_frames=2)
    drawn = render_clip(frames=2, supersample=1).images  # the same two moments: start and end
    video = (frames.images.permute(0, 2, 3, 1) * 255).numpy()
    assert np.abs(video - drawn).mean() < 6


def test_shapes_and_determinism(clip: RenderedClip) -> None:
    assert clip.images.shape == (4, 84, 112, 3) and clip.depth.shape == clip.dynamic.shape == (4, 84, 112)
    again = render_clip(frames=4, height=84, width=112, supersample=1)
    assert (again.images == clip.images).all()
    assert (render_clip(frames=4, height=84, width=112, supersample=1, seed=1).images != clip.images).any()
    assert np.allclose(clip.extrinsics[0], np.eye(3, 4), atol=1e-12)
    assert np.isfinite(clip.depth).all() and (clip.depth > 0).all()
    assert (clip.dynamic.mean((1, 2)) > 0.02).all() and (clip.dynamic.mean((1, 2)) < 0.3).all()


def project(clip: RenderedClip, into: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (H, W, 2) and depths (H, W) in frame `into` of what frame 0 sees."""
    points = unproject(*(torch.from_numpy(a) for a in (clip.depth[0], clip.extrinsics[0], clip.intrinsics[0]))).double().numpy()
    local = points @ clip.extrinsics[into, :, :3].T + clip.extrinsics[into, :, 3]
    pixels = local @ clip.intrinsics[into].T
    return pixels[..., :2] / pixels[..., 2:], local[..., 2]


@pytest.mark.parametrize("into", [1, 2, 3])
def test_static_pixels_reproject_and_moving_ones_do_not(clip: RenderedClip, into: int) -> None:
    xy, z = project(clip, into)
    u, v = np.rint(xy).astype(int).transpose(2, 0, 1)
    seen = (u >= 0) & (u < 112) & (v >= 0) & (v < 84) & ~clip.dynamic[0]
    error = clip.depth[into, v[seen], u[seen]] / z[seen] - 1
    # Half a pixel of rounding on slanted surfaces; the rest is hidden behind something nearer, never seen through.
    agree = np.abs(error) < 0.03
    assert agree.mean() > 0.85
    assert (error > 0.03).mean() < 0.03
    color = np.abs(clip.images[into, v[seen], u[seen]].astype(int) - clip.images[0][seen])[agree].mean()
    assert color < 20
    box = clip.dynamic[0] & (u >= 0) & (u < 112) & (v >= 0) & (v < 84)
    moved = np.abs(clip.depth[into, v[box], u[box]] / z[box] - 1) > 0.05
    assert moved.mean() > 0.3


def test_write_clip(clip: RenderedClip, tmp_path) -> None:
    frames = load_frames([write_clip(tmp_path / "a.mp4", clip.images)], size=(84, 112))
    assert frames.images.shape == (4, 3, 84, 112)
    assert np.abs((frames.images.permute(0, 2, 3, 1) * 255).numpy() - clip.images).mean() < 8
