"""Pictures whose cameras are known: COLMAP models that COLMAP itself has written, and damaged ones."""

from __future__ import annotations

import codecs
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from page4d.data import Frames, InputError, load_frames
from page4d.data.orientation import MATRIX, upright
from page4d.data.posed import read_posed
from page4d.pipeline import reconstruct

WIDTH, HEIGHT = 64, 48
MODELS = {  # parameters of the perspective models of COLMAP; the last ones are of the lens
    "SIMPLE_PINHOLE": [70.5, 30.25, 25.5],
    "PINHOLE": [70.5, 71.5, 30.25, 25.5],
    "SIMPLE_RADIAL": [70.5, 30.25, 25.5, 0.0],
    "RADIAL": [70.5, 30.25, 25.5, 0.0, 0.0],
    "OPENCV": [70.5, 71.5, 30.25, 25.5, 0.0, 0.0, 0.0, 0.0],
    "FULL_OPENCV": [70.5, 71.5, 30.25, 25.5] + [0.0] * 8,
}
FISHEYE = {"OPENCV_FISHEYE": [70, 70, 32, 24, 0, 0, 0, 0], "FOV": [70, 70, 32, 24, 0.1], "SIMPLE_RADIAL_FISHEYE": [70, 32, 24, 0]}
NAMES = ["b/10.png", "b/2.png", "a1.png"]  # COLMAP keeps the order in which they were added
ORDERED = ["a1.png", "b/2.png", "b/10.png"]


def pictures(folder: Path, names: list[str], size: tuple[int, int] = (WIDTH, HEIGHT), orientation: int = 1) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(folder / name, exif=exif)


def reconstruction(model: str = "PINHOLE", parameters: list[float] | None = None, names: list[str] = NAMES, size=(WIDTH, HEIGHT)):
    """A reconstruction of pycolmap with one camera and random poses."""
    pycolmap = pytest.importorskip("pycolmap")
    made = pycolmap.Reconstruction()
    parameters = MODELS[model] if parameters is None else parameters
    made.add_camera_with_trivial_rig(pycolmap.Camera(camera_id=5, model=model, width=size[0], height=size[1], params=parameters))
    numbers = np.random.default_rng(0)
    for identity, name in enumerate(names, 1):
        quaternion = numbers.normal(size=4)
        pose = pycolmap.Rigid3d(pycolmap.Rotation3d(quaternion / np.linalg.norm(quaternion)), numbers.normal(size=3))
        points = [pycolmap.Point2D(numbers.uniform(0, 40, 2)) for _ in range(identity)]
        image = pycolmap.Image(name=name, camera_id=5, image_id=identity, points2D=pycolmap.Point2DList(points))
        made.add_image_with_trivial_frame(image, pose)
    return made


def write(made, folder: Path, form: str = "bin") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (made.write_binary if form == "bin" else made.write_text)(str(folder))
    return folder


def project(folder: Path, model: str = "sparse/0", **options: Any) -> Path:
    """A project folder with a model and its pictures."""
    write(reconstruction(**options), folder / model)
    pictures(folder / "images", options.get("names", NAMES))
    return folder


def load(*inputs: object, **options: Any) -> Frames:
    return load_frames(list(inputs), size=28, **options)  # type: ignore[arg-type]


def refusal(*inputs: object, **options: Any) -> str:
    with pytest.raises(InputError) as error:
        load(*inputs, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("form", ["bin", "txt"])
@pytest.mark.parametrize("model", MODELS)
def test_a_model_is_what_colmap_wrote(model: str, form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Poses to 1e-9, and a point that COLMAP projects to a pixel lands on the same one. COLMAP counts from the corner of a pixel."""
    made = reconstruction(model)
    found = read_posed(write(made, tmp_path / "sparse", form))
    assert [posed.name for posed in found] == ORDERED
    images = {image.name: image for image in made.images.values()}
    for posed in found:
        pose = images[posed.name].cam_from_world().matrix()
        assert np.abs(posed.extrinsics - pose).max() < 1e-9 and (posed.width, posed.height) == (WIDTH, HEIGHT)
        assert posed.extrinsics.dtype == posed.intrinsics.dtype == np.float64
        point = np.linalg.inv(np.vstack([pose, [0, 0, 0, 1]]))[:3] @ [0.2, -0.1, 2, 1]
        x, y, z = posed.intrinsics @ posed.extrinsics @ [*point, 1]
        expected = made.cameras[5].img_from_cam(np.array([[0.2, -0.1, 2.0]]))[0]
        assert np.abs([x / z + 0.5, y / z + 0.5] - expected).max() < 1e-9
    assert not caplog.records


@pytest.mark.parametrize("form", ["bin", "txt"])
def test_rigs_of_several_cameras(form: str, tmp_path: Path) -> None:
    """COLMAP keeps their poses per frame of the rig, and writes that of each image too."""
    pycolmap = pytest.importorskip("pycolmap")
    options = pycolmap.SyntheticDatasetOptions(num_rigs=2, num_cameras_per_rig=3, num_frames_per_rig=2, num_points3D=5)
    made = pycolmap.synthesize_dataset(options)
    found = {posed.name: posed for posed in read_posed(write(made, tmp_path, form))}
    assert len(found) == len(made.images) == 12
    for image in made.images.values():
        assert np.abs(found[image.name].extrinsics - image.cam_from_world().matrix()).max() < 1e-9


@pytest.mark.parametrize("form", ["bin", "txt"])
def test_distortion_is_left_out_with_one_warning(form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parameters = [*MODELS["OPENCV"][:6], 0.0, 1e-3]
    found = read_posed(write(reconstruction("OPENCV", parameters), tmp_path, form))
    assert found[0].intrinsics.tolist() == [[70.5, 0, 29.75], [0, 71.5, 25], [0, 0, 1]]
    (record,) = caplog.records
    assert "the lens distortion is left out" in record.getMessage()


@pytest.mark.parametrize("form", ["bin", "txt"])
@pytest.mark.parametrize("model", FISHEYE)
def test_other_lenses_are_refused(model: str, form: str, tmp_path: Path) -> None:
    write(reconstruction(model, FISHEYE[model]), tmp_path, form)
    assert f"the camera model {model} is no pinhole camera: undistort the pictures first" in refusal(tmp_path)


@pytest.mark.parametrize("model", ["sparse/0", "sparse", "colmap/sparse/0"])
def test_what_a_folder_means(model: str, tmp_path: Path) -> None:
    """The model folder, or the project folder around it. The pictures may lie beside `sparse` or one level above."""
    project(tmp_path, model)
    for given in (tmp_path, tmp_path / model):
        frames = load(given)
        assert frames.names == ["a1", "2", "10"] and frames.known is not None
        assert frames.known.extrinsics.shape == (3, 3, 4) and frames.known.intrinsics.shape == (3, 3, 3)
        assert frames.known.extrinsics.dtype == frames.known.intrinsics.dtype == torch.float64


def test_an_output_folder_is_a_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project(tmp_path / "out" / "colmap")
    assert [len(load(tmp_path / given)) for given in ("out", "out/colmap", "out/colmap/sparse/0")] == [3, 3, 3]
    monkeypatch.chdir(tmp_path / "out/colmap/sparse")
    assert [len(load(given)) for given in ("0", "..", ".")] == [3, 3, 3]


def test_frames_keep_the_cameras_of_those_that_are_sampled(tmp_path: Path) -> None:
    project(tmp_path)
    posed = read_posed(tmp_path)
    frames = load(tmp_path, stride=2)
    assert frames.names == ["a1", "10"] and frames.timestamps == [0, 2] and frames.known is not None
    for index, camera in enumerate((posed[0], posed[2])):
        assert frames.known.extrinsics[index].tolist() == camera.extrinsics.tolist()
        assert frames.known.intrinsics[index].tolist() == camera.intrinsics.tolist()
    one = frames.frame(1).known
    assert one is not None and torch.equal(one.extrinsics, frames.known.extrinsics[1:]) and one.intrinsics.shape == (1, 3, 3)
    assert load(tmp_path / "images/b").known is None and load(tmp_path / "images/b").frame(0).known is None
    assert frames == load(tmp_path, max_frames=2)
    assert "fps needs a video" in refusal(tmp_path, fps=2)


def test_the_pipeline_keeps_them_too(tmp_path: Path) -> None:
    project(tmp_path)
    scene = reconstruct(tmp_path, size=(56, 84), formats=["trajectory"], frames=2)
    assert scene.frames.known is not None and len(scene.frames.known.extrinsics) == 2
    with pytest.raises(InputError, match="among the input's pictures"):
        reconstruct(tmp_path, tmp_path / "images", size=(56, 84), formats=["trajectory"])


def test_pictures_without_a_camera_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    project(tmp_path)
    pictures(tmp_path / "images", ["new.png", "b/11.png", "c/1.png"])
    (tmp_path / "images/notes.txt").touch()
    assert load(tmp_path).names == ["a1", "2", "10"]
    (record,) = caplog.records
    assert "pictures in the same folders that have no camera are left out (3)" in record.getMessage()


def test_missing_pictures_are_counted(tmp_path: Path) -> None:
    project(tmp_path)
    (tmp_path / "images/b/2.png").unlink()
    (tmp_path / "images/b/10.png").unlink()
    assert f"2 of the 3 pictures that it lists cannot be found, first {str(tmp_path / 'images/b/2.png')!r}" in refusal(tmp_path)
    shutil.rmtree(tmp_path / "images")
    assert f"3 of the 3 pictures that it lists cannot be found, first {str(tmp_path / 'a1.png')!r}" in refusal(tmp_path)
    assert len(read_posed(tmp_path)) == 3  # cameras alone need no pictures


def test_a_source_of_cameras_stands_alone(tmp_path: Path) -> None:
    project(tmp_path)
    for others in ([tmp_path / "images/a1.png"], [tmp_path]):
        assert "cannot be mixed with other inputs: give it alone" in refusal(tmp_path / "sparse/0", *others)


def test_more_models_and_pictures_that_are_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    project(tmp_path)
    write(reconstruction(), tmp_path / "sparse/1")
    assert len(load(tmp_path)) == 3 and "other models beside it are not read (1)" in caplog.text
    (tmp_path / "images/film.mp4").write_bytes(b"film")
    write(reconstruction(names=["film.mp4"]), tmp_path / "sparse/1")
    assert "which is not an image file: give pictures" in refusal(tmp_path / "sparse/1")


def test_a_file_with_several_pages_gives_the_first(tmp_path: Path) -> None:
    project(tmp_path, names=["a.gif"])
    first, second = (Image.new("RGB", (WIDTH, HEIGHT), color) for color in ("black", "white"))
    first.save(tmp_path / "images/a.gif", save_all=True, append_images=[second], duration=100)
    frames = load(tmp_path)
    assert frames.names == ["a"] and frames.images.max() == 0


# Sizes and orientations


def only_known(frames: Frames) -> tuple[np.ndarray, np.ndarray]:
    assert frames.known is not None and len(frames) == 1
    return frames.known.extrinsics[0].numpy(), frames.known.intrinsics[0].numpy()


def test_intrinsics_follow_the_size_of_the_picture(tmp_path: Path) -> None:
    project(tmp_path, names=["a.png"], size=(1000, 751), parameters=[900, 901, 480, 380])
    pictures(tmp_path / "images", ["a.png"], (250, 187))  # a quarter, rounded down
    _, intrinsics = only_known(load(tmp_path))
    y = 187 / 751
    expected = [[225, 0, 119.5], [0, 901 * y, 380 * y - 0.5], [0, 0, 1]]
    assert np.abs(intrinsics - expected).max() < 1e-9
    pictures(tmp_path / "images", ["a.png"], (250, 180))
    message = refusal(tmp_path)
    assert "a.png" in message and "the picture has 250 x 180 pixels and its camera 1000 x 751 (width x height)" in message


@pytest.mark.parametrize("orientation", range(1, 9))
def test_cameras_turn_with_their_pictures(orientation: int, tmp_path: Path) -> None:
    """A point of the scene that shows as a white pixel of the stored picture is that pixel of the upright one too."""
    project(tmp_path, names=["a.png"])
    pictures(tmp_path / "images", ["a.png"], orientation=orientation)
    a, b, c, d = MATRIX[orientation]
    if a * d - b * c < 0:
        assert f"the picture is stored mirrored (EXIF orientation {orientation})" in refusal(tmp_path)
        return
    stored = Image.new("L", (WIDTH, HEIGHT))
    stored.putpixel((11, 7), 255)
    shown = np.asarray(upright(stored, orientation))
    (row,), (column,) = shown.nonzero()
    (posed,) = read_posed(tmp_path)
    point = np.linalg.inv(posed.intrinsics) @ [11, 7, 1] * 3 - posed.extrinsics[:, 3]
    extrinsics, intrinsics = only_known(load(tmp_path))
    x, y, z = intrinsics @ extrinsics @ [*(posed.extrinsics[:, :3].T @ point), 1]
    assert np.abs([x / z - column, y / z - row]).max() < 1e-9
    assert np.abs(extrinsics[:, :3] @ extrinsics[:, :3].T - np.eye(3)).max() < 1e-12 and np.linalg.det(extrinsics[:, :3]) > 0
    assert intrinsics[0, 1] == intrinsics[1, 0] == 0 and intrinsics[0, 0] > 0 < intrinsics[1, 1]


@pytest.mark.parametrize("factor", [1, 2])
def test_a_camera_of_the_upright_picture_is_not_turned(factor: int, tmp_path: Path) -> None:
    project(tmp_path, names=["a.png"])
    (posed,) = read_posed(tmp_path)
    for orientation in (5, 6):
        pictures(tmp_path / "images", ["a.png"], (HEIGHT * factor, WIDTH * factor), orientation)
        extrinsics, intrinsics = only_known(load(tmp_path))
        assert np.array_equal(extrinsics, posed.extrinsics) and intrinsics[0, 0] == posed.intrinsics[0, 0] * factor


# Damaged models


@pytest.mark.parametrize("name", ["cameras.bin", "images.bin"])
def test_every_cut_of_a_binary_file_is_refused(name: str, tmp_path: Path) -> None:
    write(reconstruction(), tmp_path)
    whole = (tmp_path / name).read_bytes()
    for end in range(len(whole)):
        (tmp_path / name).write_bytes(whole[:end])
        with pytest.raises(InputError, match="cut off or damaged"):
            read_posed(tmp_path)
    (tmp_path / name).write_bytes(whole + b"\0")
    with pytest.raises(InputError, match="longer than it should be"):
        read_posed(tmp_path)


@pytest.mark.parametrize("name", ["cameras.bin", "images.bin", "cameras.txt", "images.txt"])
def test_damage_anywhere_ends_in_one_line(name: str, tmp_path: Path) -> None:
    """Each byte in turn is replaced: the model is read, or refused with the name of the file."""
    write(reconstruction(), tmp_path, name[-3:])
    whole = (tmp_path / name).read_bytes()
    for place in range(len(whole)):
        for value in (0, 0xFF, whole[place] ^ 0x10):
            (tmp_path / name).write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            try:
                found = read_posed(tmp_path)
            except InputError as error:
                assert str(tmp_path) in str(error) and "\n" not in str(error)
            else:
                assert all(np.isfinite(posed.extrinsics).all() and np.isfinite(posed.intrinsics).all() for posed in found)


CAMERAS = "5 PINHOLE 64 48 70 70 32 24\n"
IMAGES = "1 1 0 0 0 0 0 0 5 a.png\n\n"


@pytest.mark.parametrize(
    ("cameras", "images", "message"),
    [
        ("5 PINHOLE 64 48 70 70 32", IMAGES, "line 1: it does not have the form ID PINHOLE WIDTH HEIGHT and 4 parameters"),
        ("5 PINHOLE", IMAGES, "line 1: it does not have the form"),
        ("5 LENS 64 48 70", IMAGES, "there is no camera model 'LENS'"),
        ("5 PINHOLE 64.5 48 70 70 32 24", IMAGES, "'64.5' is not a whole number"),
        ("5 PINHOLE 0 48 70 70 32 24", IMAGES, "a picture of 0 x 48 pixels cannot be"),
        ("5 PINHOLE 64 48 x 70 32 24", IMAGES, "'x' is not a number"),
        ("5 PINHOLE 64 48 nan 70 32 24", IMAGES, "are no camera"),
        ("5 PINHOLE 64 48 70 70 inf 24", IMAGES, "are no camera"),
        ("5 PINHOLE 64 48 -70 70 32 24", IMAGES, "are no camera"),
        ("5 SIMPLE_RADIAL 64 48 70 32 24 nan", IMAGES, "a distortion parameter is not finite"),
        (CAMERAS, "1 1 0 0 0 0 0 0 a.png\n\n", "line 1: it does not have the form ID QW"),
        (CAMERAS, "1 1 0 0 0 0 0 0 6 a.png\n\n", "its camera 6 is not in cameras.txt"),
        (CAMERAS, "1 2 0 0 0 0 0 0 5 a.png\n\n", "the length of its quaternion is 2 and not 1"),
        (CAMERAS, "1 nan 0 0 0 0 0 0 5 a.png\n\n", "the length of its quaternion is nan"),
        (CAMERAS, "1 1 0 0 0 0 inf 0 5 a.png\n\n", "its pose has a number that is not finite"),
        (CAMERAS, IMAGES + IMAGES, "lists the picture 'a.png' 2 times"),
        (CAMERAS, IMAGES.strip() + "\n" + IMAGES, "line 2: it should be empty or hold points"),
        (CAMERAS, "# empty\n", "lists no pictures"),
        (CAMERAS, b"1 1 0 0 0 0 0 0 5 \xff\n\n", "cannot be found"),
        (CAMERAS, "1 1 0 0 0 0 0 0 5 " + "1" * 5000 + ".png\n\n", "the only picture that it lists cannot be found"),
    ],
)
def test_wrong_text_is_refused(cameras: str, images: str | bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "cameras.txt").write_text(cameras)
    (tmp_path / "images.txt").write_bytes(images if isinstance(images, bytes) else images.encode())
    assert message in refusal(tmp_path)


def test_text_by_hand(tmp_path: Path) -> None:
    """Comments, Windows line ends, a space in a name, and no line of points at the end."""
    (tmp_path / "cameras.txt").write_bytes(b"# cameras\r\n\r\n" + CAMERAS.encode())
    (tmp_path / "images.txt").write_bytes(b"# images\r\n" + IMAGES.replace("\n", "\r\n").encode() + b"2 1 0 0 0 1 2 3 5 b 1.png")
    found = read_posed(tmp_path)
    assert [posed.name for posed in found] == ["a.png", "b 1.png"] and found[1].extrinsics[:, 3].tolist() == [1, 2, 3]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    pictures(tmp_path / "images", ["a.png"])
    (tmp_path / "sparse").mkdir()
    for name, text in (("cameras", CAMERAS), ("images", IMAGES)):
        (tmp_path / "sparse" / f"{name}.txt").write_bytes(codecs.BOM_UTF8 + text.encode())
    assert load_frames([tmp_path], size=28).names == ["a"]


def test_counts_and_models_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "cameras.bin").write_bytes(struct.pack("<Q", 2**64 - 1) + bytes(100))
    (tmp_path / "images.bin").write_bytes(struct.pack("<Q", 0))
    assert "camera 0: a picture of 0 x 0 pixels cannot be" in refusal(tmp_path)
    (tmp_path / "cameras.bin").write_bytes(struct.pack("<QIiQQ", 1, 1, 99, 64, 48))
    assert "there is no camera model 99" in refusal(tmp_path)
    (tmp_path / "cameras.bin").write_bytes(struct.pack("<QIiQQ4d", 1, 1, 1, 64, 48, 70, 70, 32, 24))
    (tmp_path / "images.bin").write_bytes(struct.pack("<QI7dI2sQ", 1, 1, 1, 0, 0, 0, 0, 0, 0, 1, b"a", 2**64 - 1))
    assert "cut off or damaged" in refusal(tmp_path)


def test_a_path_without_cameras(tmp_path: Path) -> None:
    pictures(tmp_path, ["a.png"])
    for given in (tmp_path, tmp_path / "a.png", tmp_path / "nowhere"):
        with pytest.raises(InputError, match="has no cameras: give a COLMAP model folder"):
            read_posed(given)
