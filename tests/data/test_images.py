"""Image files from the field: metadata that is wrong, animations, HEIC, more than 8 bits."""

from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from page4d.data import InputError, images, load_frames
from page4d.data.images import stored_size

SIZE = (56, 84)


def exif_block(entries: list[tuple[int, int, int, bytes]], order: str = "<") -> bytes:
    """A TIFF block with one directory of (tag, type, count, value or offset of 4 bytes)."""
    head = struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, 8)
    rows = b"".join(struct.pack(order + "HHI", tag, kind, count) + value[:4].ljust(4, b"\0") for tag, kind, count, value in entries)
    return b"Exif\0\0" + head + struct.pack(order + "H", len(entries)) + rows + bytes(4)


def photo(path: Path, exif: bytes = b"") -> Path:
    """White at the upper left of 84 x 56 pixels as stored."""
    image = Image.new("RGB", (84, 56))
    image.paste((255, 255, 255), (0, 0, 28, 28))
    image.save(path, **({"exif": exif} if exif else {}))
    return path


ORIENTATION = (0x0112, 3, 1, struct.pack("<HH", 6, 0))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize(
    "entry",
    [
        (0x0100, 2, 4, b"wide"),
        (0x010F, 5, 1, bytes(4)),
        (0x0110, 12, 1, bytes(4)),
        (0x011A, 7, 4, b"\1\2\3\4"),
        (0x8769, 4, 1, b"\xff" * 4),
    ],
    ids=["ImageWidth as ASCII", "Make as RATIONAL", "Model as DOUBLE", "XResolution as bytes", "Exif IFD beyond the end"],
)
def test_photos_are_turned_by_the_orientation_alone(entry: tuple[int, int, int, bytes], suffix: str, tmp_path: Path) -> None:
    block = exif_block(sorted([ORIENTATION, entry]))
    frames = load_frames([photo(tmp_path / f"a.{suffix}", block)], size=(84, 56))
    assert frames.original_sizes == [(84, 56)]
    assert frames.images[0, 0, 5, -5] > 0.9 and frames.images[0, 0, 5, 5] < 0.1


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiffs_are_turned_once(orientation: int, bits: int, tmp_path: Path) -> None:
    """Pillow turns a TIFF while it decodes, and other images not at all."""
    values = np.linspace(0, 255 if bits == 8 else 65535, 56 * 84).reshape(56, 84).astype(np.uint8 if bits == 8 else np.uint16)
    Image.fromarray(values).save(tmp_path / "a.tif", tiffinfo={0x0112: orientation})
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray((values >> (bits - 8)).astype(np.uint8)).save(tmp_path / "b.png", exif=exif)
    tiff, png = (load_frames([tmp_path / name], size=(84, 84), mode="pad") for name in ("a.tif", "b.png"))
    assert tiff.original_sizes == png.original_sizes and (tiff.images - png.images).abs().max() < 0.02


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize(
    "chunks",
    [
        chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * (3 << 20))),
        b"".join(chunk(b"tEXt", b"k%d\0" % i + b"a" * 900_000) for i in range(80)),
        chunk(b"pHYs", b"1") + chunk(b"gAMA", b"") + chunk(b"iTXt", b"\xff\xff") + chunk(b"iCCP", b"x"),
        chunk(b"tEXt", b"k\0v")[:-1] + b"?",
    ],
    ids=["a text that is too long", "too many texts", "chunks of wrong lengths", "a wrong checksum"],
)
def test_a_png_is_read_whatever_its_other_chunks_hold(chunks: bytes, tmp_path: Path) -> None:
    block = exif_block([ORIENTATION])
    data = photo(tmp_path / "a.png", block).read_bytes()
    expected = load_frames([tmp_path / "a.png"], size=(84, 56))
    (tmp_path / "a.png").write_bytes(data[:33] + chunks + data[33:])
    assert load_frames([tmp_path / "a.png"], size=(84, 56)) == expected and expected.original_sizes == [(84, 56)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 65535), st.integers(0, 20), st.integers(0, 1 << 32), st.binary(max_size=4)), max_size=8).map(
        lambda rows: [(tag, kind, count % (1 << 32), value) for tag, kind, count, value in rows]
    ),
    st.sampled_from("<>"),
    st.sampled_from(["jpg", "png", "webp"]),
)
def test_no_metadata_keeps_a_photo_from_being_read(entries, order: str, suffix: str) -> None:
    file = Path(SCRATCH, f"a.{suffix}")
    photo(file, exif_block(entries, order))
    assert len(load_frames([file], size=(56, 56))) == 1


@pytest.fixture(scope="module", autouse=True)
def scratch(tmp_path_factory: pytest.TempPathFactory) -> None:
    global SCRATCH
    SCRATCH = str(tmp_path_factory.mktemp("scratch"))


SCRATCH = ""


def stills(count: int = 4) -> list[Image.Image]:
    return [Image.new("RGB", (84, 56), (60 * i, 60 * i, 60 * i)) for i in range(count)]


def indices(images: torch.Tensor) -> list[int]:
    return [round(float(image.mean()) * 255 / 60) for image in images]


ANIMATIONS = [("gif", {}), ("webp", {"lossless": True}), ("png", {}), ("apng", {"format": "PNG"}), ("tif", {}), ("avif", {"quality": 100})]


@pytest.mark.parametrize(("suffix", "options"), ANIMATIONS, ids=[suffix for suffix, _ in ANIMATIONS])
def test_all_frames_of_an_animation_are_read(suffix: str, options: dict, tmp_path: Path) -> None:
    first, *rest = stills()
    path = tmp_path / f"a.{suffix}"
    first.save(path, save_all=True, append_images=rest, duration=200, **options)
    frames = load_frames([path], size=SIZE)
    assert indices(frames.images) == [0, 1, 2, 3]
    assert frames.names == [f"frame_{i:06d}" for i in range(4)]
    assert frames.timestamps == pytest.approx([0, 1, 2, 3] if suffix == "tif" else [0, 0.2, 0.4, 0.6])
    assert indices(load_frames([path], size=SIZE, max_frames=2).images) == [0, 3]
    if suffix != "tif":
        assert indices(load_frames([path], size=SIZE, fps=2.5).images) == [0, 2]
    stills()[0].save(tmp_path / "b.jpg")
    assert load_frames([tmp_path], size=SIZE).names == ["a_000000", "a_000001", "a_000002", "a_000003", "b"]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif", "avif"])
@pytest.mark.parametrize("name", ["an", "an.dat", "an.jpg"])
def test_an_animation_is_one_whatever_its_name(name: str, suffix: str, tmp_path: Path) -> None:
    first, *rest = stills()
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=rest, duration=200)
    assert len(load_frames([(tmp_path / f"a.{suffix}").rename(tmp_path / name)], size=SIZE)) == 4


def test_the_still_of_an_animated_png_and_previews_are_no_frames(tmp_path: Path) -> None:
    first, *rest = stills()
    first.save(tmp_path / "a.png", save_all=True, append_images=rest, default_image=True)
    assert indices(load_frames([tmp_path / "a.png"], size=SIZE).images) == [1, 2, 3]
    first.save(tmp_path / "a.mpo", "MPO", save_all=True, append_images=rest)
    (tmp_path / "a.mpo").rename(tmp_path / "a.jpg")
    assert len(load_frames([tmp_path / "a.jpg"], size=SIZE)) == 1
    pages = [image.copy() for image in stills(3)]
    pages[1].encoderinfo = {"tiffinfo": {254: 1}}
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    assert indices(load_frames([tmp_path / "a.tif"], size=SIZE).images) == [0, 2]


def noise(height: int = 300, width: int = 400) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 128 + 0 * x], -1).astype(np.uint8))


def test_tiled_heic_is_read_as_a_whole_whatever_its_name(tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    for name in ("a.heic", "a.jpg", "bare", "a.mov"):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        pillow_heif.from_pillow(noise()).save(folder / "a.heic", quality=95, tile_size=256)
        path = (folder / "a.heic").rename(folder / name)
        frames = load_frames([path], size=(210, 280))
        assert frames.original_sizes == [(300, 400)]
        expected = load_frames([_saved(noise(), tmp_path / "a.png")], size=(210, 280))
        assert (frames.images - expected.images).abs().mean() < 0.03


def _saved(image: Image.Image, path: Path) -> Path:
    image.save(path)
    return path


def test_heic_without_its_package_is_one_line_that_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    monkeypatch.setitem(__import__("sys").modules, "pi_heif", None)
    monkeypatch.setattr(Image, "open", lambda *args: pytest.fail("the file was given to Pillow"))
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    with pytest.raises(InputError, match=r"a\.heic' is an HEIC image, which needs the package pi-heif: pip install pi-heif, or convert it"):
        load_frames([tmp_path / "a.heic"])


def test_avif_is_read(tmp_path: Path) -> None:
    noise().save(tmp_path / "a.avif", quality=95)
    assert load_frames([tmp_path], size=(210, 280)).original_sizes == [(300, 400)]


def deep(path: Path, values: np.ndarray) -> Path:
    Image.fromarray(values).save(path)
    return path


def ramp(low: int, high: int, kind: type = np.uint16) -> np.ndarray:
    return np.linspace(low, high, 56 * 84).astype(kind).reshape(56, 84)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("a.png", ramp(0, 4095)),
        ("a.png", ramp(28000, 31000)),
        ("a.tif", ramp(0, 4095)),
        ("a.tif", ramp(100_000, 200_000, np.int32)),
        ("a.tif", ramp(-500, 500, np.int32)),
        ("a.tif", ramp(0, 1, np.float32) + 20.5),
    ],
    ids=["12 bits in 16", "thermal", "12 bits in 16, TIFF", "more than 16 bits", "negative", "fractions"],
)
def test_a_part_of_a_deep_range_is_stretched_and_said(
    name: str, values: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = load_frames([deep(tmp_path / name, values)], size=SIZE).images
    expected = torch.from_numpy((values - values.min()) / (values.max() - values.min())).float()
    if np.ptp(values) > 10:
        assert (images[0, 0] - expected).abs().max() < 0.012, "percentiles 0.1 and 99.9 are black and white"
    assert caplog.text.count("stretched from black to white") == 1


def test_a_clip_shares_one_range(tmp_path: Path) -> None:
    deep(tmp_path / "0.png", ramp(1000, 2000))
    deep(tmp_path / "1.png", ramp(2000, 3000))
    images = load_frames([tmp_path], size=SIZE).images
    assert images[0].max() == pytest.approx(0.5, abs=0.02) and images[1].min() == pytest.approx(0.5, abs=0.02)
    full = load_frames([tmp_path], size=SIZE, value_range="full").images
    assert full.max() == pytest.approx(3000 / 65535, abs=0.01)


def test_deep_colours_are_stretched_too(tmp_path: Path) -> None:
    values = np.stack([ramp(0, 4095)] * 3, -1)
    with av.open(str(tmp_path / "a.png"), "w", format="image2") as container:
        stream = container.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = 84, 56, "rgb48be"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(values, format="rgb48le").reformat(format="rgb48be")))
        container.mux(stream.encode(None))
    images = load_frames([tmp_path / "a.png"], size=SIZE).images
    assert images[0, 0, -1, -1] > 0.98 and images.shape == (1, 3, *SIZE)
    assert load_frames([tmp_path / "a.png"], size=SIZE, value_range="full").images.max() < 0.07


def test_fractions_without_any_number_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none of its values is finite"):
        load_frames([deep(tmp_path / "a.tif", np.full(SIZE, np.nan, np.float32))], size=SIZE)


def test_a_name_is_never_a_pattern_of_the_decoder(tmp_path: Path) -> None:
    """FFmpeg would read x_0.png for x_%d.png."""
    for name, level in (("x_0.png", 65535), ("x_%d.png", 30000)):
        values = np.full((56, 84, 3), level, np.uint16)
        with av.open(str(tmp_path / "made.png"), "w", format="image2") as container:
            stream = container.add_stream("png", rate=1)
            stream.width, stream.height, stream.pix_fmt = 84, 56, "rgb48be"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(values, format="rgb48le").reformat(format="rgb48be")))
            container.mux(stream.encode(None))
        (tmp_path / "made.png").rename(tmp_path / name)
    assert load_frames([tmp_path / "x_%d.png"], size=SIZE, value_range="full").images.max() < 0.5


def test_unsigned_32_bits_do_not_wrap(tmp_path: Path) -> None:
    values = np.linspace(0, 4.0e9, 56 * 84).astype(np.uint32).reshape(56, 84)
    data = bytearray(deep(tmp_path / "a.tif", values.view(np.int32)).read_bytes())
    data[data.index(struct.pack("<HHI", 339, 3, 1)) + 8] = 1  # SampleFormat: unsigned
    (tmp_path / "a.tif").write_bytes(data)
    images = load_frames([tmp_path / "a.tif"], size=SIZE).images
    assert images[0, 0, 0, 0] < 0.02 and images[0, 0, -1, -1] > 0.98


def test_a_tall_picture_is_cut_before_it_is_resized(tmp_path: Path) -> None:
    y = np.linspace(0, 255, 20_000).astype(np.uint8)
    frames = load_frames([_saved(Image.fromarray(np.repeat(y[:, None], 10, 1)), tmp_path / "tall.png")], size=518)
    assert frames.images.shape == (1, 3, 518, 518) and abs(float(frames.images.mean()) - 0.5) < 0.02
    middle = frames.points_to_original(torch.tensor([[[258.5, 258.5]]], dtype=torch.float64))[0, 0]
    assert middle.tolist() == pytest.approx([4.5, 9999.5], abs=0.02)


def test_an_unknown_range_rule_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown value range 'some': use 'auto' or 'full'"):
        load_frames([deep(tmp_path / "a.png", ramp(0, 5))], value_range="some")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from(["jpg", "png", "webp", "gif", "tif", "avif", "bmp"]))
def test_damaged_images_are_read_or_one_line(seed: int, suffix: str) -> None:
    file, generator = io.BytesIO(), random.Random(seed)
    noise(60, 80).save(file, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()))
    data = bytearray(file.getvalue())
    for _ in range(generator.randrange(1, 30)):
        data[generator.randrange(len(data))] = generator.randrange(256)
    path = Path(SCRATCH, f"damaged.{suffix}")
    path.write_bytes(data[: generator.choice([len(data), len(data) // 2])])
    try:
        load_frames([path], size=SIZE)
    except InputError as error:
        assert "\n" not in str(error)


def test_the_stored_size_of_a_turned_tiff(tmp_path):
    """Pillow reports the size of the upright picture for TIFFs alone."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("tif", "jpg", "png"):
        Image.new("RGB", (40, 30)).save(tmp_path / f"a.{suffix}", exif=exif)
        assert stored_size(tmp_path / f"a.{suffix}") == (40, 30)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_an_animation_is_opened_once_not_once_per_picture(tmp_path, monkeypatch, suffix):
    pictures = [Image.new("RGB", (40, 30), (8 * i, 0, 255 - 8 * i)) for i in range(30)]
    pictures[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=pictures[1:], duration=100)
    opened, count = images._opened, 0

    def counted(path):
        nonlocal count
        count += 1
        return opened(path)

    monkeypatch.setattr(images, "_opened", counted)
    frames = load_frames([tmp_path / f"a.{suffix}"], size=(28, 42))
    assert len(frames) == 30 and count < 6
    for i in (0, 7, 29):
        assert torch.allclose(frames.images[i].mean((1, 2)) * 255, torch.tensor([8.0 * i, 0, 255 - 8 * i]), atol=6)
