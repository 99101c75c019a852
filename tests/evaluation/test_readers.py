from __future__ import annotations

import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.transform import Rotation

from page4d.cli.eval import build_parser
from page4d.errors import InputError
from page4d.evaluation import open_dataset
from page4d.evaluation.readers import READERS, SPECS
from page4d.evaluation.readers.tum import nearest

ROOT = Path(__file__).parents[2]
SIZE = (20, 30)


def write_image(path: Path, seed: int) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*SIZE, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def write_sintel(root: Path, sequence: str, frames: int = 3) -> dict[str, np.ndarray]:
    """Write the three folders of one sequence in the formats of the dataset, and return their contents."""
    generator = np.random.default_rng(0)
    truth: dict[str, list] = {"pixels": [], "depth": [], "intrinsics": [], "extrinsics": []}
    for i in range(1, frames + 1):
        name = f"frame_{i:04d}"
        truth["pixels"].append(write_image(root / "training/final" / sequence / f"{name}.png", i))
        depth = generator.uniform(1, 100, SIZE).astype("<f4")
        depth[0, 0] = 0
        camera = generator.normal(size=21)
        for folder in ("depth", "camdata_left"):
            (root / "training" / folder / sequence).mkdir(parents=True, exist_ok=True)
        header = struct.pack("<fii", 202021.25, SIZE[1], SIZE[0])
        (root / "training/depth" / sequence / f"{name}.dpt").write_bytes(header + depth.tobytes())
        (root / "training/camdata_left" / sequence / f"{name}.cam").write_bytes(struct.pack("<f21d", 202021.25, *camera))
        truth["depth"].append(depth)
        truth["intrinsics"].append(camera[:9].reshape(3, 3))
        truth["extrinsics"].append(camera[9:].reshape(3, 4))
    return {name: np.stack(values) for name, values in truth.items()}


def write_tum(folder: Path, frames: int = 8, poses: int = 400) -> dict[str, np.ndarray]:
    """Write a sequence whose files have different times, as in the dataset. Depth image i holds i + 1 metres."""
    folder.mkdir(parents=True)
    times, depth_times = 100 + 0.033 * np.arange(frames), 100.005 + 0.033 * np.arange(frames)
    pose_times = 99.9 + 0.01 * np.arange(poses)
    quaternions, centres = Rotation.random(poses, random_state=0).as_quat(), np.random.default_rng(1).normal(size=(poses, 3))
    for i in range(frames):
        write_image(folder / f"rgb/{times[i]:.6f}.png", i)
        (folder / "depth").mkdir(exist_ok=True)
        values = np.full(SIZE, 5000 * (i + 1), np.uint16)
        values[3, 4] = 0
        Image.fromarray(values).save(folder / f"depth/{depth_times[i]:.6f}.png")
    for name, stamps in (("rgb", times), ("depth", depth_times)):
        lines = [f"{t:.6f} {name}/{t:.6f}.png" for t in stamps]
        (folder / f"{name}.txt").write_text("# timestamp filename\n" + "\n".join(lines) + "\n")
    rows = [" ".join(map(str, row)) for row in np.c_[pose_times, centres, quaternions]]
    (folder / "groundtruth.txt").write_text("# timestamp tx ty tz qx qy qz qw\n" + "\n".join(rows) + "\n")
    return {"times": times, "pose_times": pose_times, "centres": centres, "quaternions": quaternions}


def test_sintel_is_read_exactly(tmp_path, caplog):
    truth = write_sintel(tmp_path, "alley_2")
    write_sintel(tmp_path, "bandage_1", frames=1)
    data = open_dataset(f"sintel:{tmp_path}")
    assert data.sequences == ("alley_2", "bandage_1") and len(data) == 2
    sample = next(iter(data))
    assert sample.name == "alley_2" and sample.images.shape == (3, 3, *SIZE) and sample.images.dtype == torch.float32
    assert np.allclose(sample.images.permute(0, 2, 3, 1) * 255, truth["pixels"])
    assert np.array_equal(sample.depth, truth["depth"]) and np.array_equal(sample.valid, truth["depth"] > 0)
    assert np.allclose(sample.intrinsics, truth["intrinsics"]) and np.allclose(sample.extrinsics, truth["extrinsics"])
    assert not caplog.records
    assert open_dataset(f"sintel:{tmp_path}", tasks={"pose"}).sequences == ("alley_2",)
    assert "temple_3" in caplog.text  # the mean would be over fewer sequences than the protocol's
    assert len(next(iter(open_dataset(f"sintel:{tmp_path}", frames=2))).images) == 2
    assert len(open_dataset(f"sintel:{tmp_path}", sequences=1)) == 1


def test_sintel_has_the_rules_of_its_protocol(tmp_path):
    write_sintel(tmp_path, "market_5", frames=1)
    rules = open_dataset(f"sintel:{tmp_path}").rules
    assert rules.counts("depth", "market_5") and not rules.counts("depth", "market_5", official=True)
    assert rules.counts("mono", "market_5", official=True)
    assert rules.counts("pose", "market_5") and not rules.counts("pose", "alley_1") and rules.counts("depth", "alley_1")
    assert rules.max_depth == rules.official_clip == 70


def test_tum_is_read_with_the_nearest_poses(tmp_path):
    truth = write_tum(tmp_path / "rgbd_dataset_freiburg3_walking_xyz")
    data = open_dataset(f"tum:{tmp_path}")
    sample = data.read(data.sequences[0])
    chosen = [0, 3, 6]  # every third
    assert sample.name == "rgbd_dataset_freiburg3_walking_xyz" and sample.images.shape == (3, 3, *SIZE)
    assert (
        sample.depth.amax((1, 2)).tolist() == pytest.approx([1, 4, 7]) and not sample.valid[:, 3, 4].any() and sample.valid[:, 0, 0].all()
    )
    for row, i in enumerate(chosen):
        j = np.abs(truth["pose_times"] - truth["times"][i]).argmin()
        world = np.eye(4)
        world[:3, :3], world[:3, 3] = Rotation.from_quat(truth["quaternions"][j]).as_matrix(), truth["centres"][j]
        assert np.allclose(sample.extrinsics[row], np.linalg.inv(world)[:3], atol=1e-6)
    assert torch.allclose(sample.intrinsics[0], torch.tensor([[535.4, 0, 320.1], [0, 539.2, 247.6], [0, 0, 1]]))
    assert len(open_dataset(f"tum:{tmp_path}", frames=2).read(data.sequences[0]).images) == 2


def test_tum_frames_without_a_pose_are_left_out(tmp_path):
    folder = tmp_path / "rgbd_dataset_freiburg3_sitting_static"
    write_tum(folder, poses=15)  # ends at 100.04: frames 0 and 1 have a pose near enough
    assert len(open_dataset(f"tum:{tmp_path}").read(folder.name).images) == 1
    lines = (folder / "groundtruth.txt").read_text().splitlines()
    (folder / "groundtruth.txt").write_text("\n".join(lines[:3]) + "\n")
    with pytest.raises(InputError, match=r"within 0\.02 seconds"):
        open_dataset(f"tum:{tmp_path}").read(folder.name)


def test_the_nearest_time_within_the_gap_is_found():
    others = np.array([0.0, 1.0, 2.0])
    assert nearest(np.array([-0.1, 0.4, 0.6, 1.5, 2.4, 9.0]), others, max_gap=0.5).tolist() == [0, 0, 1, 1, 2, -1]
    assert nearest(np.array([0.1, 1.0]), np.array([0.0]), max_gap=0.5).tolist() == [0, -1]


def test_bonn_is_read_for_depth_only(tmp_path, caplog):
    write_tum(tmp_path / "rgbd_bonn_crowd2")
    write_tum(tmp_path / "rgbd_bonn_static")  # not of the protocol
    data = open_dataset(f"bonn:{tmp_path}", tasks={"depth", "pose"})
    assert data.sequences == ("rgbd_bonn_crowd2",) and "balloon2" in caplog.text
    sample = next(iter(data))
    assert sample.depth.amax((1, 2)).tolist() == pytest.approx(list(range(1, 9)))  # stride 1, 5000 per metre
    assert not data.rules.counts("pose", "rgbd_bonn_crowd2") and data.rules.counts("mono", "rgbd_bonn_crowd2")
    with pytest.raises(InputError, match="bonn has no ground truth for points, pose"):
        open_dataset(f"bonn:{tmp_path}", tasks={"pose", "points"})


def test_synthetic_scenes_follow_the_options(monkeypatch, scene):
    made = []

    class SyntheticScenes:
        def __init__(self, kind, **options):
            made.append((kind, options))

        def __getitem__(self, i):
            return scene(seed=i)

    monkeypatch.setitem(sys.modules, "page4d.data.synthetic", types.SimpleNamespace(SyntheticScenes=SyntheticScenes))
    data = open_dataset("synthetic:dynamic", frames=5, size=(28, 42), seed=7, sequences=3)
    kind, options = made[0]
    assert kind == "dynamic" and options["frames"] == 5 and options["size"] == (28, 42) and options["seed"] == 7
    assert [sample.name for sample in data] == ["scene-0", "scene-1", "scene-2"]
    open_dataset("synthetic:static", size=56)
    assert made[1][1]["size"] == (42, 56)


def test_help_and_docs_list_every_reader():
    assert all(spec in build_parser(None).format_help() for spec in SPECS)
    rows = []
    for name, reader in READERS.items():
        specs = ", ".join(f"`{name}:{place}`" for place in reader.places)
        rows.append(f"| {specs} | {reader.needs} | {reader.truth} |")
    table = "\n".join(["| data | needs | truth |", "|---|---|---|", *rows])
    assert f"\n{table}\n\n" in (ROOT / "docs" / "evaluation.md").read_text()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("kitti:somewhere", "unknown data 'kitti:somewhere': use one of synthetic:static"),
        ("sintel", "unknown data 'sintel'"),
        ("synthetic:moving", "use synthetic:static, synthetic:dynamic, synthetic:walk"),
        ("sintel:{}/none", "expected MPI Sintel with training/final"),
        ("sintel:{}", r"'.*training/final' is not a folder: expected MPI Sintel"),
        ("tum:{}", r"expected TUM RGB-D with folders with rgb\.txt"),
        ("bonn:{}", "expected the Bonn RGB-D dynamic dataset .*rgbd_bonn_balloon2"),
    ],
)
def test_missing_data_is_an_error_of_one_line(tmp_path, spec, message):
    with pytest.raises(InputError, match=message) as error:
        open_dataset(spec.format(tmp_path))
    assert "\n" not in str(error.value)


def test_numbers_must_be_positive(tmp_path):
    for name in ("frames", "sequences"):
        with pytest.raises(InputError, match=f"number of {name} must be at least 1, not 0"):
            open_dataset("synthetic:static", **{name: 0})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (("training/depth/alley_2/frame_0002.dpt", lambda data: data[:-4]), "cut off"),
        (("training/depth/alley_2/frame_0002.dpt", lambda data: data[:6]), "cut off"),
        (("training/depth/alley_2/frame_0001.dpt", lambda data: b"FLOW" + data[4:]), "is not a file of MPI Sintel"),
        (("training/camdata_left/alley_2/frame_0003.cam", lambda data: data[:20]), "cut off: 20 bytes instead of 172"),
        (("training/camdata_left/alley_2/frame_0003.cam", None), "dataset is incomplete"),
        (("training/final/alley_2/frame_0001.png", lambda data: b"no picture"), "cannot read the image"),
    ],
)
def test_damaged_sintel_files_are_named(tmp_path, damage, message):
    write_sintel(tmp_path, "alley_2")
    name, change = damage
    path = tmp_path / name
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=message) as error:
        list(open_dataset(f"sintel:{tmp_path}"))
    assert path.name in str(error.value) and "\n" not in str(error.value)


def test_damaged_tum_files_are_named(tmp_path):
    folder = tmp_path / "rgbd_dataset_freiburg3_walking_rpy"
    write_tum(folder)
    data = open_dataset(f"tum:{tmp_path}")
    whole = (folder / "groundtruth.txt").read_text()
    for content, message in (("1.0 2.0 3.0\n", "7 more columns"), ("one two\n", "cannot read"), ("# nothing\n", "7 more columns")):
        (folder / "groundtruth.txt").write_text(content)
        with pytest.raises(InputError, match=message):
            data.read(folder.name)
    (folder / "groundtruth.txt").write_text(whole)
    for path in (folder / "depth").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="is missing"):
        data.read(folder.name)
    (folder / "depth.txt").unlink()
    with pytest.raises(InputError, match=r"depth\.txt' is missing"):
        data.read(folder.name)


def test_an_unknown_camera_is_an_error(tmp_path):
    write_tum(tmp_path / "walking")
    with pytest.raises(InputError, match="should contain one of freiburg1"):
        list(open_dataset(f"tum:{tmp_path}"))
