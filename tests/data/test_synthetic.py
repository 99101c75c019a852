"""Synthetic scenes: the ground truth against itself, against formulas of its own, and the data set around it."""

from __future__ import annotations

import math

import pytest
import torch

from page4d.data.synthetic import SyntheticScenes, random_scene, render, stream
from page4d.data.synthetic.__main__ import main
from page4d.data.synthetic.camera import CameraPath, look_at
from page4d.data.synthetic.render import _pixels, _rays, trace
from page4d.data.synthetic.scene import BOX, CYLINDER, ROOM, SHEET, SPHERE, Scene
from page4d.data.synthetic.texture import make_textures
from page4d.errors import InputError
from page4d.geometry import unproject

SIZE = (42, 56)


def project(points, extrinsics, intrinsics):
    """Pixels and depth of world points (..., 3), by the textbook."""
    camera = torch.einsum("ij,...j->...i", extrinsics[:, :3], points) + extrinsics[:, 3]
    image = torch.einsum("ij,...j->...i", intrinsics, camera)
    return image[..., :2] / image[..., 2:], camera[..., 2]


def one_shape(shape, linear, offset, centre, target, light=(0.0, 0.0, 50.0)) -> Scene:
    camera = CameraPath(
        torch.tensor([centre]), look_at(torch.tensor([centre]), torch.tensor([target]), torch.zeros(1)), torch.tensor([1.0]), "static"
    )
    return Scene(
        shape=torch.tensor([shape]), linear=linear[None, None], offset=offset[None, None], extent=torch.ones(1, 3),
        object_id=torch.tensor([1]), moves=torch.tensor([False]), texture=torch.tensor([0]), tile=torch.ones(1),
        textures=make_textures(1, torch.Generator().manual_seed(0)), camera=camera, light=torch.tensor(light), ambient=0.4,
        sky=torch.full((2, 3), 0.5),
    )  # fmt: skip


def scenes(kind="dynamic", **options):
    return SyntheticScenes(kind, frames=5, size=SIZE, seed=3, **options)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_depth_points_and_cameras_agree(kind):
    for i in range(4):
        sample = scenes(kind)[i]
        lifted = unproject(sample.depth, sample.extrinsics, sample.intrinsics)
        gap = (lifted - sample.world_points).norm(dim=-1)[sample.valid]
        assert gap.max() < 1e-3 and sample.valid.float().mean() > 0.3
        assert (sample.depth[~sample.valid] == 0).all() and (sample.depth[sample.valid] > 0).all()
        identity = sample.extrinsics[:, :, :3] @ sample.extrinsics[:, :, :3].transpose(1, 2)
        assert torch.allclose(identity, torch.eye(3).expand_as(identity), atol=1e-5)
        assert torch.linalg.det(sample.extrinsics[:, :, :3]).sub(1).abs().max() < 1e-5


def test_a_point_seen_from_another_frame_lies_on_the_same_surface():
    """A ray from frame s to what frame 0 saw, where that is then, ends there or at something in front of it, never behind."""
    for kind in ("static", "dynamic"):
        for seed in range(4):
            scene = random_scene(kind, 4, torch.Generator().manual_seed(seed))
            origin, intrinsics = scene.camera.centers, scene.camera.intrinsics(SIZE)
            first = trace(scene, 0, *_rays(scene, 0, _pixels(SIZE, torch.device("cpu")), intrinsics[0]))
            hit = first.depth < scene.far
            seen = 0
            for s in range(1, 4):
                points = scene.at(first.local[hit], first.index[hit], s)
                depth = ((points - origin[s]) @ scene.camera.rotation[s].T)[:, 2]
                ahead = depth > 0.1
                direction = (points - origin[s])[ahead] / depth[ahead, None]
                there = trace(scene, s, origin[s], direction).depth / depth[ahead]
                assert (there > 1 + 2e-3).float().mean() < 2e-3  # rays that touch an outline may miss by rounding
                seen += int((there > 1 - 2e-3).sum())
            assert seen > 0.3 * 3 * int(hit.sum())


def test_flow_agrees_with_depth_and_pose_where_nothing_moves():
    for i in range(3):
        sample = scenes("static")[i]
        y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in SIZE), indexing="ij")
        for s in range(4):
            pixels, _ = project(sample.world_points[s], sample.extrinsics[s + 1], sample.intrinsics[s + 1])
            gap = (pixels - torch.stack([x, y], -1) - sample.flow[s]).norm(dim=-1)[sample.valid[s] & (sample.flow[s].norm(dim=-1) < 100)]
            assert gap.max() < 2e-2


def test_flow_carries_objects_along():
    """Where a moving surface goes, the same object is seen, unless it is hidden or leaves; and it goes where no camera motion would."""
    same = moved = found = 0
    for i in range(6):
        sample = scenes("dynamic")[i]
        for s in range(4):
            rows, columns = sample.dynamic[s].nonzero(as_tuple=True)
            flow = sample.flow[s, rows, columns]
            to = torch.stack([columns, rows], -1) + flow
            x, y = to.round().long().unbind(-1)
            inside = (x >= 0) & (x < SIZE[1]) & (y >= 0) & (y < SIZE[0])
            before = sample.object_id[s, rows, columns][inside]
            after = sample.object_id[s + 1, y[inside], x[inside]]
            same += (before == after).float().sum()
            still, _ = project(sample.world_points[s, rows, columns], sample.extrinsics[s + 1], sample.intrinsics[s + 1])
            moved += ((still - to).norm(dim=-1)[inside] > 0.05).float().sum()
            found += inside.sum()
    assert found > 500 and same / found > 0.75 and moved / found > 0.9


def test_tracks_agree_with_points_depth_and_pose():
    seen = hidden = 0
    for i in range(6):
        sample = scenes("dynamic", tracks=40)[i]
        assert sample.tracks.shape == (5, 40, 2) and sample.track_visible[0].all()
        for s in range(5):
            pixels, depth = project(sample.track_points[s], sample.extrinsics[s], sample.intrinsics[s])
            assert torch.allclose(pixels, sample.tracks[s], atol=1e-2, rtol=1e-3) or (depth < 0.1).any()
            visible = sample.track_visible[s]
            x, y = sample.tracks[s][visible].round().long().unbind(-1)
            assert (x >= 0).all() and (x < SIZE[1]).all() and (y >= 0).all() and (y < SIZE[0]).all()
            ratio = sample.depth[s, y, x] / depth[visible]
            seen += ((ratio - 1).abs() < 0.1).sum()
            hidden += visible.sum()
        x, y = sample.tracks[0].round().long().unbind(-1)
        assert torch.allclose(sample.track_points[0], sample.world_points[0, y, x], atol=1e-3)
    assert seen / hidden > 0.93  # the rest: half a pixel beside an edge


def test_a_sphere_by_formula():
    """A ball of radius 2 at the origin seen from 7 away: the middle is 5 away, the outline where the angle's sine is 2/7."""
    scene = one_shape(SPHERE, 2 * torch.eye(3), torch.zeros(3), (7.0, 0.0, 0.0), (0.0, 0.0, 0.0))
    sample = render(scene, (101, 101))
    focal = sample.intrinsics[0, 0, 0]
    y, x = torch.meshgrid(torch.arange(101.0), torch.arange(101.0), indexing="ij")
    radius = ((x - 50.5).square() + (y - 50.5).square()).sqrt() / focal
    inside = radius.atan().sin() < 2 / 7
    assert (inside == sample.valid[0]).float().mean() > 0.999
    cosine = radius.atan().cos()
    length = 7 * cosine - (4 - 49 * (1 - cosine.square())).clamp_min(0).sqrt()
    gap = (length * cosine - sample.depth[0]).abs()[inside & sample.valid[0]]
    assert gap.max() < 1e-4


def test_the_other_shapes_by_formula():
    cases = {
        BOX: (torch.diag(torch.tensor([1.0, 2.0, 3.0])), 7 - 1.0),
        CYLINDER: (torch.diag(torch.tensor([1.5, 1.5, 3.0])), 7 - 1.5),
        ROOM: (torch.diag(torch.tensor([9.0, 9.0, 9.0])), 7 + 9.0),
        SHEET: (torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]) * 3, 7.0),
    }
    for shape, (linear, depth) in cases.items():
        sample = render(one_shape(shape, linear, torch.zeros(3), (7.0, 0.0, 0.0), (0.0, 0.0, 0.0)), (30, 30))
        assert sample.valid[0, 15, 15] and abs(float(sample.depth[0, 15, 15]) - depth) < 1e-4, shape


def test_shadow_and_shading():
    """The far side of a ball from the light shows the ambient share only, and the floor behind it is dark."""
    lit = render(one_shape(SPHERE, torch.eye(3), torch.zeros(3), (5.0, 0.0, 0.0), (0.0, 0.0, 0.0), light=(50.0, 0.0, 0.0)), (30, 30))
    dark = render(one_shape(SPHERE, torch.eye(3), torch.zeros(3), (5.0, 0.0, 0.0), (0.0, 0.0, 0.0), light=(-50.0, 0.0, 0.0)), (30, 30))
    ratio = dark.images[0, :, 15, 15] / lit.images[0, :, 15, 15]
    assert torch.allclose(ratio, torch.full((3,), 0.4 / 1.15), atol=0.02)


def test_sequences_are_what_their_number_says():
    again, other = scenes()[2], scenes()[3]
    assert torch.equal(scenes()[2].images, again.images) and torch.equal(scenes()[2].extrinsics, again.extrinsics)
    assert not torch.equal(again.images, other.images)
    assert not torch.equal(again.images, SyntheticScenes("dynamic", frames=5, size=SIZE, seed=4)[2].images)
    streamed = stream(scenes(), start=2)
    assert torch.equal(next(streamed).images, again.images) and torch.equal(next(streamed).images, other.images)
    with pytest.raises(IndexError):
        scenes(length=2)[2]


@pytest.mark.parametrize("moving", [0, 3])
def test_number_of_moving_objects(moving):
    scene = random_scene("dynamic", 4, torch.Generator().manual_seed(0), moving=moving)
    assert len(scene.object_id[scene.moves].unique()) == moving
    still = ~scene.moves
    assert (scene.linear[:, still] == scene.linear[:1, still]).all() and (scene.offset[:, still] == scene.offset[:1, still]).all()


def test_blur_noise_and_supersampling_leave_the_truth_alone():
    plain = scenes()[1]
    for options in ({"noise": 0.05}, {"supersample": 2}):
        other = scenes(**options)[1]
        assert torch.equal(plain.depth, other.depth) and not torch.equal(plain.images, other.images)
        assert (plain.images - other.images).abs().mean() < 0.1
    blurred = scenes(motion_blur=3)[1]
    assert blurred.images.shape == plain.images.shape and torch.isfinite(blurred.images).all()


def test_photographs(tmp_path):
    from PIL import Image

    Image.new("RGB", (60, 40), (255, 0, 0)).save(tmp_path / "red.png")
    sample = SyntheticScenes("static", frames=1, size=SIZE, seed=0, photographs=tmp_path)[0]
    red = (sample.images[:, 0] > 0.15) & (sample.images[:, 1] < 0.05) & (sample.images[:, 2] < 0.05)
    assert red.float().mean() > 0.02
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"broken\.jpg cannot be read as a photograph"):
        for i in range(20):
            SyntheticScenes("static", frames=1, size=SIZE, seed=0, photographs=tmp_path)[i]


def test_errors(tmp_path):
    with pytest.raises(InputError, match="unknown kind of scene 'moving': choose one of static, dynamic, mixed"):
        SyntheticScenes("moving", frames=1, size=SIZE, seed=0)
    with pytest.raises(InputError, match="no photographs in"):
        SyntheticScenes("static", frames=1, size=SIZE, seed=0, photographs=tmp_path)
    with pytest.raises(InputError, match="frames, size, length"):
        SyntheticScenes("static", frames=0, size=SIZE, seed=0)


def test_preview(tmp_path, capsys):
    options = ["--preview", "--sequences", "2", "--frames", "3", "--size", "28x42", "--out", str(tmp_path / "new")]
    assert main(options) == 0
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"preview.png", "preview.mp4"}
    assert "6 frames in" in capsys.readouterr().out
    import av

    with av.open(str(tmp_path / "new" / "preview.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 6
    assert main(["--preview", "--size", "112", "--out", str(tmp_path)]) == 2
    assert "give HEIGHTxWIDTH" in capsys.readouterr().err


def test_look_at():
    rotation = look_at(torch.tensor([[0.0, -5.0, 0.0]]), torch.zeros(1, 3), torch.zeros(1))[0]
    assert torch.allclose(rotation, torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]]), atol=1e-6)
    rolled = look_at(torch.tensor([[0.0, -5.0, 0.0]]), torch.zeros(1, 3), torch.tensor([math.pi / 2]))[0]
    assert torch.allclose(rolled[2], rotation[2]) and torch.allclose(rolled[0], rotation[1], atol=1e-6)
