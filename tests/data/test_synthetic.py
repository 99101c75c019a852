"""Synthetic scenes: consistency of the ground truth, closed-form solutions, and the dataset."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from page4d.cli.preview import main
from page4d.data.synthetic import SyntheticScenes, random_scene, render, seeded, stream
from page4d.data.synthetic.camera import PATHS, CameraPath, look_at, random_path
from page4d.data.synthetic.render import _normals, _pixels, _rays, trace
from page4d.data.synthetic.scene import BOX, CLEARANCE, CYLINDER, ROOM, SHEET, SPHERE, Random, Scene, _ground_path, solid
from page4d.data.synthetic.texture import make_textures
from page4d.errors import InputError
from page4d.geometry import unproject

SIZE = (42, 56)


def project(points, extrinsics, intrinsics):
    """Pixels (..., 2) and depth (...) of world points (..., 3)."""
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
    """A ray from frame s to the position of a surface point of frame 0 hits that point or an occluder, never something behind it."""
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
            pixels, depth = project(sample.world_points[s], sample.extrinsics[s + 1], sample.intrinsics[s + 1])
            ahead = sample.valid[s] & (depth > 1e-3)
            assert torch.allclose(sample.flow[s][ahead], (pixels - torch.stack([x, y], -1))[ahead], atol=2e-2, rtol=1e-3)
            assert (sample.flow[s][~ahead] == 0).all()


def test_no_flow_to_behind_the_camera():
    """The second camera has passed a ball that the first one saw."""
    first = one_shape(SPHERE, torch.eye(3), torch.zeros(3), (5.0, 0.0, 0.0), (0.0, 0.0, 0.0))
    there = one_shape(SPHERE, torch.eye(3), torch.zeros(3), (-5.0, 0.0, 0.0), (-9.0, 0.0, 0.0)).camera
    camera = CameraPath(
        *(torch.cat([getattr(x, name) for x in (first.camera, there)]) for name in ("centers", "rotation", "fov")), "static"
    )
    scene = replace(first, linear=first.linear.expand(2, -1, -1, -1), offset=first.offset.expand(2, -1, -1), camera=camera)
    sample = render(scene, (20, 20))
    assert sample.valid[0].any() and (sample.flow == 0).all()


def test_flow_carries_objects_along():
    """Flow leads to the same object, unless it is hidden or leaves the image. On moving objects it differs from the flow of the camera."""
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
    """A ball of radius 2 at a distance of 7: its middle is 5 away, and its outline is at the angle with sine 2/7."""
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


def test_what_the_light_does_not_reach_is_ambient():
    """The side of a ball away from the light and the floor behind it."""
    lit = render(one_shape(SPHERE, torch.eye(3), torch.zeros(3), (5.0, 0.0, 0.0), (0.0, 0.0, 0.0), light=(50.0, 0.0, 0.0)), (30, 30))
    dark = render(one_shape(SPHERE, torch.eye(3), torch.zeros(3), (5.0, 0.0, 0.0), (0.0, 0.0, 0.0), light=(-50.0, 0.0, 0.0)), (30, 30))
    ratio = dark.images[0, :, 15, 15] / lit.images[0, :, 15, 15]
    assert torch.allclose(ratio, torch.full((3,), 0.4 / 1.15), atol=0.02)


@pytest.mark.parametrize("light", [(0.0, 0.0, 3.0), (30.0, 0.0, 90.0)])
def test_a_low_box_casts_a_shadow(light):
    """With light from the direction (1, 0, 3), a box 0.2 high has a shadow of length 0.2 / 3, at any distance of the light."""
    box = one_shape(BOX, 0.1 * torch.eye(3), torch.tensor([0.0, 0.0, 0.1]), (-0.4, 0.0, 2.0), (-0.1, 0.0, 0.0), light=light)
    ground = replace(
        box, shape=torch.tensor([BOX, SHEET]), linear=torch.stack([0.1 * torch.eye(3), 50 * torch.eye(3)])[None],
        offset=torch.tensor([[[0.0, 0.0, 0.1], [0.0, 0.0, 0.0]]]), extent=torch.ones(2, 3), object_id=torch.tensor([1, 0]),
        moves=torch.tensor([False, False]), texture=torch.tensor([0, 0]), tile=torch.full((2,), 1e6), ambient=0.0,
    )  # fmt: skip
    sample = render(ground, (80, 80))
    x, y, z = sample.world_points[0].unbind(-1)
    dark = sample.images[0].sum(0) < 1e-3
    beside = (z.abs() < 1e-4) & (y.abs() < 0.08) & (x < -0.105)
    if light[0] == 0:  # over the box
        assert not dark[beside & (x < -0.12)].any()
    else:
        shadow = x > -0.1 - 0.2 / 3
        assert dark[beside & shadow & (x > -0.16)].all() and (beside & shadow).sum() > 3
        assert not dark[beside & (x < -0.18)].any()


@pytest.mark.parametrize("shape", [BOX, SPHERE, CYLINDER])
def test_normals_of_a_turned_and_stretched_shape(shape):
    """Against the axes of the box, and the gradients of the equations of ball and cylinder, in the world."""
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1))).Q
    half = torch.tensor([0.5, 1.0, 2.0])
    scene = one_shape(shape, turn * half, torch.tensor([0.3, 0.2, 0.1]), (7.0, 1.0, 2.0), (0.0, 0.0, 0.0))
    origin, direction = _rays(scene, 0, _pixels((40, 40), torch.device("cpu")), scene.camera.intrinsics((40, 40))[0])
    hits = trace(scene, 0, origin, direction)
    hit = hits.depth.isfinite()
    found = _normals(scene, 0, hits, direction)[hit]
    along = (origin + hits.depth[hit, None] * direction[hit] - scene.offset[0, 0]) @ turn  # in metres along the axes
    gradient = along / half.square()
    flat = (along.abs() / half - 1).abs() < 1e-4
    if shape == BOX:
        gradient = flat * along.sign()
    elif shape == CYLINDER:
        gradient[:, 2] = 0
        gradient = torch.where(flat[:, 2:], along.sign() * torch.tensor([0.0, 0.0, 1.0]), gradient)
    wanted = torch.nn.functional.normalize(gradient @ turn.T, dim=-1)
    assert hit.sum() > 50 and (shape == SPHERE or flat.any())
    assert torch.allclose(found, wanted, atol=1e-3)


def test_far_surfaces_are_seen_and_have_no_truth():
    ball = one_shape(SPHERE, torch.eye(3), torch.zeros(3), (5.0, 0.0, 0.0), (0.0, 0.0, 0.0))
    near = render(ball, (40, 40))
    cut = render(replace(ball, far=4.2), (40, 40))
    assert torch.equal(cut.valid, near.valid & (near.depth < 4.2)) and cut.valid.any() and not torch.equal(cut.valid, near.valid)
    assert torch.equal(cut.images, near.images)
    for name in ("depth", "world_points", "object_id", "dynamic"):
        assert (getattr(cut, name)[~cut.valid] == 0).all()
    assert Scene.far == 25.0


def test_the_level_of_detail_follows_the_texels_of_a_pixel():
    """On a wall at distance 40 and slant 60 degrees a pixel covers 80 / focal metres along its longer side; 128 texels are 2 m."""
    levels = []

    def textures(index, u, v, level):
        levels.append(level)
        return torch.zeros(len(index), 3)

    turn = torch.tensor([[0.5, 0.0, math.sqrt(0.75)], [0.0, 1.0, 0.0], [-math.sqrt(0.75), 0.0, 0.5]])
    wall = one_shape(SHEET, 100 * turn, torch.zeros(3), (0.0, -0.001, 40.0), (0.0, 0.0, 0.0))
    for supersample in (1, 2):
        sample = render(replace(wall, textures=textures, tile=torch.full((1,), 2.0)), (100, 100), supersample=supersample)
        expected = math.log2(80 / float(sample.intrinsics[0, 0, 0]) / supersample / 2 * 128)
        middle = levels[-1].view(100 * supersample, -1)[50 * supersample, 50 * supersample]
        assert float(middle) == pytest.approx(expected, abs=0.05)


def test_half_of_the_tracks_are_on_moving_objects():
    shares = []
    for i in range(12):
        sample = scenes("dynamic", tracks=60)[i]
        moving = sample.dynamic[0].float().mean()
        if 0.05 < moving < 0.3:
            x, y = sample.tracks[0].round().long().unbind(-1)
            shares.append(sample.dynamic[0, y, x].float().mean())
    assert len(shares) >= 3 and torch.stack(shares).mean() == pytest.approx(0.5, abs=0.12)


def test_camera_paths_stay_within_limits_and_face_the_scene():
    """Some zoom, and some do not move."""
    zooms, kinds = 0, {}
    for seed in range(150):
        path = random_path(torch.Generator().manual_seed(seed), torch.linspace(0, 1, 12), radius=2.0, ceiling=1.5)
        x, y, z = path.centers.unbind(-1)
        assert x.abs().max() <= 2.4 and y.abs().max() <= 2.4 and z.min() >= 0.3 and z.max() <= 1.35 + 1e-6
        kinds.setdefault(path.kind, []).append(path)
        degrees = torch.rad2deg(path.fov)
        assert 45 <= degrees[0] <= 85
        change = degrees / degrees[0]
        zooms += int(change[-1] != 1)
        assert torch.allclose(change, torch.linspace(1, float(change[-1]), 12), atol=1e-5) and 0.75 <= change[-1] <= 1.25
    assert 10 < zooms < 40 and set(kinds) == set(PATHS)
    assert all((path.centers == path.centers[:1]).all() for path in kinds["static"])
    assert all((path.centers != path.centers[:1]).any() for kind in PATHS if kind != "static" for path in kinds[kind])
    assert max(float(path.centers[:, 2].max()) for path in kinds["hand-held"]) == pytest.approx(1.35)  # the ceiling is felt


def test_sequences_depend_on_their_number():
    again, other = scenes()[2], scenes()[3]
    assert torch.equal(scenes()[2].images, again.images) and torch.equal(scenes()[2].extrinsics, again.extrinsics)
    assert not torch.equal(again.images, other.images)
    assert not torch.equal(again.images, SyntheticScenes("dynamic", frames=5, size=SIZE, seed=4)[2].images)
    streamed = stream(scenes(), start=2)
    assert torch.equal(next(streamed).images, again.images) and torch.equal(next(streamed).images, other.images)
    with pytest.raises(IndexError):
        scenes(length=2)[2]


@pytest.mark.parametrize("moving", [0, 3])
def test_the_number_of_moving_objects_is_as_asked(moving):
    scene = random_scene("dynamic", 4, torch.Generator().manual_seed(0), moving=moving)
    assert len(scene.object_id[scene.moves].unique()) == moving
    still = ~scene.moves
    assert (scene.linear[:, still] == scene.linear[:1, still]).all() and (scene.offset[:, still] == scene.offset[:1, still]).all()


def test_objects_move_along_their_heading_at_constant_speed():
    path, heading = _ground_path(Random(torch.Generator().manual_seed(0)), torch.zeros(3), torch.linspace(0, 1, 101), 9.0)
    step, middle = path.diff(dim=0), (heading[1:] + heading[:-1]) / 2
    assert (heading[-1] - heading[0]).abs() > 0.1
    assert torch.allclose(step[:, :2] / step.norm(dim=-1, keepdim=True), torch.stack([middle.cos(), middle.sin()], -1), atol=1e-3)
    assert step.norm(dim=-1).std() < 1e-4 * path[-1].norm() and (path[:, 2] == 0).all()


def test_stretching_objects_stand_on_the_floor():
    """They always touch the floor unless they bounce, and never sink in."""
    stands = 0
    for seed in range(40):
        (part,) = solid(Random(torch.Generator().manual_seed(seed)), torch.zeros(3), torch.linspace(0, 1, 6), True, 2.0)
        half = part.linear[:, 2, 2]
        bottom = part.offset[:, 2] - half
        assert bottom.min() > -1e-5
        stands += int(half.std() > 1e-3 and bottom.max() < 1e-5)
    assert stands > 3


@pytest.mark.parametrize("clearance", [CLEARANCE, 2.5])  # houses are seldom near
def test_the_camera_runs_into_nothing(monkeypatch, clearance):
    """No point on an object or house is within the clearance of the camera, and the camera is not inside one."""
    monkeypatch.setattr("page4d.data.synthetic.scene.CLEARANCE", clearance)
    side = torch.linspace(-1, 1, 5)
    box = torch.cartesian_prod(side, side, side)
    box = box[box.abs().amax(-1) == 1]
    houses = things = 0
    for seed in range(24):
        scene = random_scene("dynamic", 4, torch.Generator().manual_seed(seed))
        solid = (scene.shape != ROOM) & (scene.shape != SHEET)
        houses += int((solid & (scene.object_id == 0)).sum())
        things += int((solid & (scene.object_id > 0)).sum())
        for s, centre in enumerate(scene.camera.centers):
            inside = torch.linalg.solve(scene.linear[s, solid], centre - scene.offset[s, solid])
            assert (inside.abs() > 1).any(-1).all()
            surface = torch.einsum("kij,pj->kpi", scene.linear[s, solid], box) + scene.offset[s, solid, None]
            assert (surface - centre).norm(dim=-1).gt(clearance).all()
    assert houses > 10 and things > 40


def test_a_seed_depends_on_every_bit_of_every_part():
    draws = {float(torch.rand((), generator=seeded(*parts))) for parts in (("a", 1), ("a", 2), ("b", 1), ("a", 1 + (1 << 32)), ("a", 1, 0))}
    assert len(draws) == 5 and len({seeded("a", i).initial_seed() for i in range(1000)}) == 1000
    assert torch.equal(torch.rand(3, generator=seeded("a", 1)), torch.rand(3, generator=seeded("a", 1)))


def test_options_do_not_change_the_scene(tmp_path):
    from PIL import Image

    Image.effect_noise((60, 60), 80).save(tmp_path / "noise.png")
    plain, noisy = scenes()[1], scenes(noise=0.1)[1]
    assert torch.equal(plain.images, scenes(tracks=9)[1].images)
    assert torch.equal(noisy.images, scenes(noise=0.1, tracks=9)[1].images)
    assert torch.equal(scenes(tracks=9)[1].tracks, scenes(noise=0.1, photographs=tmp_path, tracks=9)[1].tracks)
    other = scenes(photographs=tmp_path)[1]
    assert torch.equal(plain.depth, other.depth) and torch.equal(plain.object_id, other.object_id)
    assert not torch.equal(plain.images, other.images)
    assert torch.equal(other.images, scenes(photographs=[tmp_path / "noise.png"])[1].images)
    a, b = (random_scene("dynamic", 2, torch.Generator().manual_seed(0), photographs=p) for p in (None, [tmp_path / "noise.png"]))
    assert torch.equal(a.light, b.light) and torch.equal(a.tile, b.tile) and a.ambient == b.ambient
    blurred = scenes(motion_blur=3)[1]
    assert torch.allclose(plain.extrinsics, blurred.extrinsics, atol=1e-5)
    assert torch.isclose(plain.depth, blurred.depth, atol=1e-4).float().mean() > 0.999


def test_the_shutter_is_open_for_half_of_the_time():
    """Two moments for each of two frames: times 0, 1/4, 1 and 5/4; the first three are among those of five frames."""
    blurred = random_scene("dynamic", 2, torch.Generator().manual_seed(1), moving=3, instants=2)
    plain = random_scene("dynamic", 5, torch.Generator().manual_seed(1), moving=3)
    assert len(blurred.offset) == 4
    for name in ("offset", "linear"):
        assert torch.allclose(getattr(blurred, name)[:3], getattr(plain, name)[[0, 1, 4]], atol=1e-5)
    assert torch.allclose(blurred.camera.centers[:3], plain.camera.centers[[0, 1, 4]], atol=1e-5)
    assert (plain.offset[1] - plain.offset[0]).abs().max() > 0.01


def test_blur_noise_and_supersampling_do_not_change_the_truth():
    plain = scenes()[1]
    for options in ({"noise": 0.05}, {"supersample": 2}):
        other = scenes(**options)[1]
        assert torch.equal(plain.depth, other.depth) and not torch.equal(plain.images, other.images)
        assert (plain.images - other.images).abs().mean() < 0.1
    assert (scenes(noise=0.05)[1].images - plain.images).std() == pytest.approx(0.05, rel=0.2)
    blurred = scenes(motion_blur=3)[1]
    moments = random_scene("dynamic", 5, seeded("scene", "dynamic", 3, 1), instants=3)
    mean = sum(render(moments.frames(slice(m, None, 3)), SIZE).images for m in range(3)) / 3
    assert torch.allclose(blurred.images, mean, atol=1e-5) and not torch.allclose(blurred.images, plain.images, atol=0.05)


def test_photographs_become_textures(tmp_path):
    from PIL import Image

    Image.new("RGB", (60, 40), (255, 0, 0)).save(tmp_path / "red.png")
    sample = SyntheticScenes("static", frames=1, size=SIZE, seed=0, photographs=tmp_path)[0]
    red = (sample.images[:, 0] > 0.15) & (sample.images[:, 1] < 0.05) & (sample.images[:, 2] < 0.05)
    assert red.float().mean() > 0.02
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"broken\.jpg cannot be read as a photograph"):
        for i in range(20):
            SyntheticScenes("static", frames=1, size=SIZE, seed=0, photographs=tmp_path)[i]


def test_options_that_cannot_work_are_errors(tmp_path):
    with pytest.raises(InputError, match="unknown kind of scene 'moving': choose one of static, dynamic, mixed"):
        SyntheticScenes("moving", frames=1, size=SIZE, seed=0)
    with pytest.raises(InputError, match="no photographs in"):
        SyntheticScenes("static", frames=1, size=SIZE, seed=0, photographs=tmp_path)
    options = {"frames": 1, "size": SIZE, "seed": 0}
    for wrong, message in (
        ({"frames": 0}, "frames, length"), ({"supersample": 0}, "supersample"), ({"tracks": -1}, "tracks at least 0"),
        ({"size": (1, 1)}, "1 x 1 pixels are too small"), ({"noise": -0.1}, "noise"), ({"noise": math.nan}, "noise must be .* not nan"),
        ({"moving": -1}, "moving objects"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            SyntheticScenes("static", **(options | wrong))


def test_the_preview_writes_a_picture_and_a_video(tmp_path, capsys):
    options = ["--preview", "--sequences", "2", "--frames", "3", "--size", "28x42", "--out", str(tmp_path / "new")]
    assert main(options) == 0
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"preview.png", "preview.mp4"}
    assert "6 frames in" in capsys.readouterr().out
    import av

    with av.open(str(tmp_path / "new" / "preview.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 6
    assert main(["--preview", "--size", "112", "--out", str(tmp_path)]) == 2
    assert "give HEIGHTxWIDTH" in capsys.readouterr().err
    assert main(["--preview", "--size", "1x1", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: images of 1 x 1 pixels are too small")


@pytest.mark.gpu
def test_a_gpu_renders_the_same_scene():
    """Up to rounding: a pixel on an edge may fall on either side."""
    options = {"frames": 3, "size": (56, 84), "seed": 5, "tracks": 16}
    here, there = (SyntheticScenes("dynamic", **options, device=device)[1] for device in ("cpu", "cuda"))
    assert there.images.device.type == "cuda"
    there = there.to("cpu")
    for name in ("images", "depth", "world_points", "object_id", "extrinsics", "tracks"):
        a, b = getattr(here, name).float(), getattr(there, name).float()
        assert ((a - b).abs() < 1e-2).float().mean() > 0.99, name


def test_a_camera_looks_at_its_target():
    rotation = look_at(torch.tensor([[0.0, -5.0, 0.0]]), torch.zeros(1, 3), torch.zeros(1))[0]
    assert torch.allclose(rotation, torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]]), atol=1e-6)
    rolled = look_at(torch.tensor([[0.0, -5.0, 0.0]]), torch.zeros(1, 3), torch.tensor([math.pi / 2]))[0]
    assert torch.allclose(rolled[2], rotation[2]) and torch.allclose(rolled[0], rotation[1], atol=1e-6)


def test_a_walk_closes_its_loop_and_people_walk_before_the_camera():
    still, crowded = (SyntheticScenes("walk", frames=300, size=(14, 21), seed=3, moving=count)[0] for count in (0, 5))
    assert torch.equal(still.extrinsics, crowded.extrinsics), "people change nothing else"
    centres = -(still.extrinsics[:, :, :3].mT @ still.extrinsics[:, :, 3:])[..., 0]
    steps = (centres[1:] - centres[:-1]).norm(dim=1)
    assert steps.max() < 0.15 and steps.sum() > 15
    assert (centres[260:] - centres[:40]).norm(dim=1).mean() < 0.6 < (centres[130] - centres[0]).norm() / 3
    assert (still.depth > 0).all() and still.depth.min() > 0.3, "the camera runs into nothing"
    share = crowded.dynamic.float().flatten(1).mean(1)
    assert not still.dynamic.any() and share.max() > 0.3 and (share > 0).float().mean() > 0.8
    assert crowded.name == "walk-3-0"
    part = SyntheticScenes("walk", frames=30, size=(14, 21), seed=3)[0]
    assert torch.allclose(part.extrinsics, still.extrinsics[:30], atol=1e-4), "a shorter walk is its beginning"


def test_in_a_walk_of_one_frame_people_are_where_they_are_in_a_longer_one():
    for seed in range(6):
        one, two = (SyntheticScenes("walk", frames=count, size=(14, 21), seed=seed, moving=3)[0] for count in (1, 2))
        assert torch.equal(one.dynamic[0], two.dynamic[0])
    with pytest.raises(InputError, match="a walk is made by walking_scene"):
        random_scene("walk", 3, torch.Generator().manual_seed(0))
