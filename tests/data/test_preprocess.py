from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from page4d.cli.preview import main as preview
from page4d.data import InputError, load_frames
from page4d.data.frames import Frames, sample
from page4d.data.preprocess import Processed, Stack, preprocess
from page4d.files import on_disk

sides = st.integers(60, 700)
multiples = st.integers(1, 20).map(lambda k: 14 * k)


def gradient(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


def to_frames(*images: Image.Image, **options) -> Frames:
    processed = [preprocess(image, **options) for image in images]
    count = len(images)
    stack = Stack(count)
    for each in processed:
        stack.add(each)
    stacked, scale, offset = stack.result()
    return Frames(stacked, [str(i) for i in range(count)], [0.0] * count, [p.original_size for p in processed], scale, offset)


@settings(max_examples=40, deadline=None)
@given(sides, sides)
def test_crop_follows_the_formula(width: int, height: int) -> None:
    full = round(height * (518 / width) / 14) * 14
    frames = to_frames(gradient(width, height))
    assert frames.images.shape == (1, 3, min(full, 518), 518)
    start = (full - 518) // 2 if full > 518 else 0
    expected = gradient(width, height).resize((518, full), Image.Resampling.BICUBIC).crop((0, start, 518, start + min(full, 518)))
    assert torch.equal(frames.images[0], torch.from_numpy(np.array(expected)).permute(2, 0, 1) / 255)
    assert frames.scale[0].tolist() == [518 / width, full / height]
    assert frames.offset[0].tolist() == [0, -start]


@settings(max_examples=30, deadline=None)
@given(sides, sides)
def test_pad_follows_the_formula(width: int, height: int) -> None:
    new = [518 if side == max(width, height) else round(side * (518 / max(width, height)) / 14) * 14 for side in (width, height)]
    image = Image.new("RGB", (width, height), (0, 0, 0))
    frames = to_frames(image, mode="pad")
    assert frames.images.shape == (1, 3, 518, 518)
    left, top = (518 - new[0]) // 2, (518 - new[1]) // 2
    inside = torch.zeros(518, 518, dtype=torch.bool)
    inside[top : top + new[1], left : left + new[0]] = True
    assert torch.equal(frames.images[0, 0] == 0, inside) and torch.equal(frames.images[0, 0] == 1, ~inside)
    assert torch.equal(frames.inside()[0], inside)


@settings(max_examples=30, deadline=None)
@given(sides, sides, multiples, multiples)
def test_height_and_width_are_covered_exactly(width: int, height: int, out_height: int, out_width: int) -> None:
    crop = to_frames(gradient(width, height), size=(out_height, out_width))
    assert crop.images.shape == (1, 3, out_height, out_width)
    assert crop.inside().all()
    assert crop.scale[0, 0] == crop.scale[0, 1], "the aspect ratio is kept"
    pad = to_frames(gradient(width, height), size=(out_height, out_width), mode="pad")
    assert pad.images.shape == (1, 3, out_height, out_width)
    assert (pad.images.permute(0, 2, 3, 1)[~pad.inside()] == 1).all()


@settings(max_examples=30, deadline=None)
@given(sides, sides, st.sampled_from(["crop", "pad"]), st.sampled_from([518, 182, (112, 196)]))
def test_coordinate_maps_are_inverse_and_agree_with_intrinsics(width: int, height: int, mode: str, size: int | tuple[int, int]) -> None:
    frames = to_frames(gradient(width, height), mode=mode, size=size)
    points = torch.rand(5, 2, dtype=torch.float64) * 100
    there = frames.points_from_original(points)
    torch.testing.assert_close(frames.points_to_original(there[None])[0], points)
    # A camera ray hits the same spot in both images.
    intrinsics = torch.tensor([[[300.0, 0, 200.5], [0, 310, 100], [0, 0, 1]]], dtype=torch.float64)
    ray = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64)
    processed, original = (intrinsics[0] @ ray)[:2], (frames.intrinsics_in_original(intrinsics)[0] @ ray)[:2]
    torch.testing.assert_close(frames.points_to_original(processed[None, None])[0, 0], original)


@pytest.mark.parametrize("mode", ["crop", "pad"])
@pytest.mark.parametrize("size", [252, (126, 266)])
@pytest.mark.parametrize("shape", [(400, 300), (300, 400)])
def test_a_dot_is_found_where_the_map_says(mode: str, size: int | tuple[int, int], shape: tuple[int, int]) -> None:
    image = Image.new("RGB", shape)
    spot = (170, 160)  # x, y; a blob, so that its centroid survives resampling
    image.paste((255, 255, 255), (spot[0] - 4, spot[1] - 4, spot[0] + 5, spot[1] + 5))
    frames = to_frames(image, mode=mode, size=size)
    weight = (frames.images[0, 0] * frames.inside()[0]).double()
    v, u = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in weight.shape), indexing="ij")
    centroid = torch.stack([(u * weight).sum(), (v * weight).sum()]) / weight.sum()
    expected = frames.points_from_original(torch.tensor([spot], dtype=torch.float64))[0]
    torch.testing.assert_close(centroid, expected, atol=0.1, rtol=0)


def test_infinite_focal_length_stays_infinite_without_nan() -> None:
    frames = to_frames(gradient(100, 80), mode="pad", size=140)
    intrinsics = torch.tensor([[[float("inf"), 0, 70], [0, float("inf"), 70], [0, 0, 1]]])
    assert not frames.intrinsics_in_original(intrinsics).isnan().any()


def test_transparency_shows_white_and_grey_becomes_rgb() -> None:
    clear = to_frames(Image.new("RGBA", (28, 28), (255, 0, 0, 0)), size=28)
    assert (clear.images == 1).all()
    half = to_frames(Image.new("RGBA", (28, 28), (0, 0, 0, 51)), size=28)
    assert torch.allclose(half.images, torch.tensor(0.8), atol=1 / 255)
    assert (to_frames(Image.new("L", (28, 28), 51), size=28).images == 0.2).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_greys_are_scaled(suffix: str, tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 28 * 28).astype(np.uint16).reshape(28, 28)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(values).save(path)
    grey = load_frames([path], size=28).images[0]
    assert torch.allclose(grey, torch.from_numpy(values / 65535).float().expand(3, -1, -1), atol=0.51 / 255)
    wide = to_frames(Image.fromarray(values.astype(np.int32)), size=28)  # the same in the mode "I"
    assert torch.equal(wide.images[0], grey)


@pytest.mark.parametrize("values", [np.full((28, 28), 65536, np.int32), np.full((28, 28), -1, np.int32), np.ones((28, 28), np.float32)])
def test_greys_of_unknown_range_are_refused(values: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=r"a\.tif.*convert it to 8 or 16 bit") as error:
        load_frames([tmp_path / "a.tif"], size=28)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["LA", "PA", "RGBA", "P", "L", "RGB", "1"])
def test_every_kind_of_transparency_shows_white(mode: str, tmp_path: Path) -> None:
    """The left half is transparent black, the right half grey (white in mode 1)."""
    image = Image.new("LA", (28, 28), (0, 0))
    image.paste((255 if mode == "1" else 51, 255), (14, 0, 28, 28))
    if mode in ("P", "L", "RGB", "1"):  # one colour is transparent
        image.convert("L").convert(mode).save(tmp_path / "a.png", transparency=(0, 0, 0) if mode == "RGB" else 0)
        image = Image.open(tmp_path / "a.png")
    elif mode == "PA":
        image, alpha = image.convert("L").convert("P").convert("PA"), image.getchannel("A")
        image.putalpha(alpha)
    else:
        image = image.convert(mode)
    assert image.mode == mode
    pixels = to_frames(image, size=28).images[0]
    assert (pixels[:, :, :14] == 1).all() and torch.allclose(pixels[:, :, 14:], torch.tensor(1.0 if mode == "1" else 0.2), atol=1 / 255)


@pytest.mark.parametrize(("orientation", "white"), [(1, (0, 0)), (3, (-1, -1)), (6, (0, -1)), (8, (-1, 0))])
def test_photos_stand_upright(orientation: int, white: tuple[int, int], tmp_path: Path) -> None:
    """The corner stored at the upper left appears at the (row, column) that the EXIF tag implies."""
    image = Image.new("RGB", (84, 56))
    image.paste((255, 255, 255), (0, 0, 28, 28))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.jpg", exif=exif)
    turned = orientation in (6, 8)
    size = (84, 56) if turned else (56, 84)
    frames = load_frames([tmp_path / "a.jpg"], size=size)
    assert frames.original_sizes == [size]
    corners = {(row, column): float(frames.images[0, 0, row, column]) for row in (0, -1) for column in (0, -1)}
    assert all((value > 0.9) == (corner == white) for corner, value in corners.items())


def test_mixed_sizes_are_centred_on_white_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    black = [Image.new("RGB", shape) for shape in ((56, 28), (56, 56))]
    frames = to_frames(*black, size=56)
    assert frames.images.shape == (2, 3, 56, 56)
    assert "different sizes" in caplog.text and "56 x 56" in caplog.text
    assert (frames.images[0, :, 14:42] == 0).all() and (frames.images[0, :, :14] == 1).all() and (frames.images[0, :, 42:] == 1).all()
    assert frames.offset.tolist() == [[0, 14], [0, 0]]
    assert frames.inside()[0].sum() == 28 * 56


@pytest.mark.parametrize(
    "options", [{"size": 100}, {"size": 0}, {"size": -14}, {"size": (28, 30)}, {"mode": "stretch"}, {"stride": 0}, {"fps": 0.0},
                {"fps": float("nan")}, {"max_frames": 0}, {"stride": 2, "fps": 3.0}, {"size": "84"}, {"size": True}, {"size": (28, 42, 3)},
                {"size": float("nan")}, {"size": 10**400}, {"size": 84.5}, {"stride": "2"}, {"max_frames": 2.5}, {"fps": "x"}]
)  # fmt: skip
def test_options_that_cannot_work_are_errors(options: dict, tmp_path: Path) -> None:
    gradient(40, 30).save(tmp_path / "a.png")
    with pytest.raises(InputError) as error:
        load_frames([tmp_path], **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [84, 84.0, np.int64(84), np.float32(84), torch.tensor(84)])
def test_whole_numbers_of_any_type_are_sizes(size: object, tmp_path: Path) -> None:
    gradient(84, 56).save(tmp_path / "a.png")
    assert load_frames([tmp_path], size=size).images.shape == (1, 3, 56, 84)
    assert load_frames([tmp_path], size=(size, size)).images.shape == (1, 3, 84, 84)


@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_images_that_are_too_elongated_need_a_height_and_a_width(mode: str, tmp_path: Path) -> None:
    gradient(2000, 10).save(tmp_path / "long.png")
    with pytest.raises(InputError, match=r"long\.png.*10 x 2000 pixels \(height x width\) is too elongated"):
        load_frames([tmp_path / "long.png"], mode=mode)
    assert load_frames([tmp_path / "long.png"], mode=mode, size=(28, 56)).images.shape == (1, 3, 28, 56)


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 9))
def test_sampled_frames_are_evenly_spaced(count: int, limit: int, stride: int) -> None:
    times = [i / 25 for i in range(count)]
    chosen = sample(times, max_frames=limit, stride=stride, fps=None)
    strided = list(range(0, count, stride))
    assert len(chosen) == min(limit, len(strided)) and set(chosen) <= set(strided) and sorted(set(chosen)) == chosen
    assert chosen[0] == 0 and (limit == 1 or chosen[-1] == strided[-1])
    gaps = {b // stride - a // stride for a, b in pairwise(chosen)}
    assert not gaps or max(gaps) - min(gaps) <= 1, "evenly spaced"


def test_fps_keeps_the_first_frame_at_or_after_each_tick() -> None:
    at_25 = [i / 25 for i in range(50)]
    assert sample(at_25, max_frames=None, stride=None, fps=5) == list(range(0, 50, 5))
    assert sample(at_25, max_frames=None, stride=None, fps=1000) == list(range(50))
    assert sample([0, 0.1, 0.9, 1.0, 3.4, 3.5], max_frames=None, stride=None, fps=1) == [0, 3, 4], "first frame at or after each tick"
    assert sample([], max_frames=3, stride=None, fps=1) == []


def test_no_progress_bar_in_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The captured stderr is not a terminal."""
    gradient(40, 30).save(tmp_path / "a.png")
    load_frames([tmp_path], size=28, progress=True)
    preview(["--preview", "--sequences", "1", "--frames", "1", "--size", "14x14", "--out", str(tmp_path / "out")])
    assert capsys.readouterr().err == ""


def shade(height: int, width: int, value: int) -> Processed:
    return Processed(np.full((height, width, 3), value, np.uint8), (height, width), (1.0, 1.0), (0.0, 0.0))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_pictures_of_many_sizes_are_centred_in_the_largest_in_any_order(order, tmp_path: Path) -> None:
    sizes = [(14, 28), (28, 14), (42, 42), (14, 56)]
    asked = []

    def allocate(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        asked.append(shape)
        return on_disk(tmp_path)(name, shape)

    stack = Stack(9, allocate)
    for index in order:
        stack.add(shade(*sizes[index], 10 * index))
    images, scale, offset = stack.result()
    assert images.shape == (4, 3, 42, 56) and len(scale) == 4 and asked[-1] == (9, 3, 42, 56)
    for place, index in enumerate(order):
        height, width = sizes[index]
        top, left = (42 - height) // 2, (56 - width) // 2
        expected = torch.ones(3, 42, 56)
        expected[:, top : top + height, left : left + width] = 10 * index / 255
        assert torch.equal(images[place], expected) and offset[place].tolist() == [left, top]


@given(st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_intrinsics_there_and_back(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    frames = Frames(torch.zeros(4, 3, 14, 14), list("abcd"), [0.0] * 4, [(9, 9)] * 4, 0.2 + rand(4, 2), 9 * rand(4, 2))
    original = 100 * rand(4, 3, 3)
    original[:, 2] = torch.tensor([0.0, 0, 1])
    chosen = [3, 0, 2][:count]
    whole = frames.intrinsics_from_original(original, range(4))
    assert torch.allclose(frames.intrinsics_in_original(whole), original, atol=1e-9)
    assert torch.equal(frames.intrinsics_from_original(original[chosen], chosen), whole[chosen])
