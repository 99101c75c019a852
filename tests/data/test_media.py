"""Videos from the field: cover art, mirrored and rotated pictures, pixels that are not square, interlaced and damaged files."""

from __future__ import annotations

import io
import random
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from page4d.data import InputError, load_frames
from page4d.data.orientation import of_display_matrix

SIZE = (56, 84)  # height, width


def picture(size: tuple[int, int] = SIZE) -> np.ndarray:
    """Every corner has a colour of its own: white, red / green, blue. The rest is dark."""
    pixels = np.full((*size, 3), 20, np.uint8)
    height, width = size[0] // 2, size[1] // 2
    for rows, columns, color in (
        (slice(0, height), slice(0, width), (240, 240, 240)),
        (slice(0, height), slice(width, None), (230, 20, 20)),
        (slice(height, None), slice(0, width), (20, 220, 20)),
        (slice(height, None), slice(width, None), (20, 20, 230)),
    ):
        pixels[rows, columns] = color
    return pixels


def write(
    path: Path, images: list[np.ndarray], codec: str = "libx264", rate: int = 10, aspect: str = "", index: str = "", **options: str
) -> Path:
    with av.open(str(path), "w", options={"movflags": index} if index else {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        if aspect:
            stream.options = {**options, "aspect": aspect}
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + kind + content


def cover() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (0, 255, 255)).save(file, "JPEG")
    return file.getvalue()


def with_cover_first(data: bytes) -> bytes:
    """The MP4 with cover art as the first box of `moov`, before all tracks. The media data precede `moov`, so that no offset changes."""
    start = data.index(b"moov") - 4
    assert start > data.index(b"mdat")
    length = struct.unpack(">I", data[start : start + 4])[0]
    art = box(b"covr", box(b"data", struct.pack(">II", 13, 0) + cover()))
    handler = box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    udta = box(b"udta", box(b"meta", bytes(4) + handler + box(b"ilst", art)))
    content = data[start + 8 : start + length]
    header = struct.unpack(">I", content[:4])[0]  # mvhd comes first
    return data[:start] + box(b"moov", content[:header] + udta + content[header:]) + data[start + length :]


def test_cover_art_is_not_the_video(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain.mp4", [picture()] * 5)
    (tmp_path / "cover.mp4").write_bytes(with_cover_first(plain.read_bytes()))
    with av.open(str(tmp_path / "cover.mp4")) as container:
        assert container.streams.video[0].disposition & av.stream.Disposition.attached_pic, "the cover is the first stream"
    frames = load_frames([tmp_path / "cover.mp4"], size=SIZE)
    assert len(frames) == 5 and torch.equal(frames.images, load_frames([plain], size=SIZE).images)


def test_sound_with_a_cover_has_no_video(tmp_path: Path) -> None:
    path = tmp_path / "song.m4a"
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        container.mux(stream.encode(silence))
        container.mux(stream.encode(None))
    path.write_bytes(with_cover_first(path.read_bytes()))
    with pytest.raises(InputError, match="has no video in it, only cover art or thumbnails"):
        load_frames([path], size=SIZE)


def test_the_larger_of_two_videos_is_read(tmp_path: Path) -> None:
    path = tmp_path / "two.mkv"
    small, large = picture((28, 42)), picture((112, 168))
    with av.open(str(path), "w") as container:
        streams = []
        for image in (small, large):
            stream = container.add_stream("mpeg4", rate=10)
            stream.height, stream.width, stream.pix_fmt = *image.shape[:2], "yuv420p"
            streams.append(stream)
        for image, stream in zip((small, large), streams, strict=True):
            for _ in range(3):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode(None))
    assert load_frames([path], size=SIZE).original_sizes == [(112, 168)] * 3


# a, b, c, d of x' = a x + c y, y' = b x + d y, by orientation from 1 to 8: upright, mirrored, upside down, ...
ROWS = ["+0 0+", "-0 0+", "-0 0-", "+0 0-", "0+ +0", "0+ -0", "0- -0", "0- +0"]
MATRICES = {number: tuple("-0+".index(sign) - 1 for sign in row.replace(" ", "")) for number, row in enumerate(ROWS, 1)}


def with_matrix(data: bytes, matrix: tuple[float, float, float, float]) -> bytes:
    start = data.index(b"tkhd") + 44  # version 0: the matrix follows 40 bytes of other fields
    a, b, c, d = (round(x * 65536) for x in matrix)
    return data[:start] + struct.pack(">5i", a, b, 0, c, d) + data[start + 20 :]


@pytest.mark.parametrize("orientation", MATRICES)
def test_videos_stand_upright_as_photos_of_the_same_orientation(orientation: int, tmp_path: Path) -> None:
    plain = write(tmp_path / "plain.mp4", [picture()] * 2, codec="mpeg4")
    (tmp_path / "turned.mp4").write_bytes(with_matrix(plain.read_bytes(), MATRICES[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture()).save(tmp_path / "photo.png", exif=exif)
    size = (84, 84)
    video, photo = (load_frames([tmp_path / name], size=size, mode="pad") for name in ("turned.mp4", "photo.png"))
    assert video.original_sizes[0] == photo.original_sizes[0] == (SIZE if orientation < 5 else SIZE[::-1])
    assert (video.images[0] - photo.images[0]).abs().mean() < 0.03
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "photo.png"))
    assert photo.original_sizes[0] == (expected.height, expected.width)


@given(st.sampled_from(sorted(MATRICES)), st.integers(1, 1 << 20), st.integers(1, 1 << 20), st.floats(-0.3, 0.3))
def test_the_nearest_orientation_of_any_matrix(orientation: int, across: int, down: int, turn: float) -> None:
    """Scaled axes change nothing. A small rotation on top has the same nearest orientation, and is not exact."""
    a, b, c, d = MATRICES[orientation]
    matrix = [a * across, b * across, 0, c * down, d * down, 0, 0, 0, 1 << 30]
    assert of_display_matrix(matrix) == (orientation, True)
    cos, sin = np.cos(turn), np.sin(turn)
    turned = [round(65536 * x) for x in (a * cos - b * sin, a * sin + b * cos, 0, c * cos - d * sin, c * sin + d * cos, 0, 0, 0)]
    assert of_display_matrix(turned)[0] == orientation
    assert of_display_matrix(turned)[1] or abs(turn) > 0.01


@given(st.lists(st.integers(-(1 << 31), (1 << 31) - 1), min_size=9, max_size=9))
def test_no_matrix_is_an_error(matrix: list[int]) -> None:
    assert 1 <= of_display_matrix(matrix)[0] <= 8
    assert of_display_matrix([0] * 9) == (1, False)


@pytest.mark.parametrize(("aspect", "width"), [("2:1", 168), ("4:3", 112), ("16:15", 90), ("8:9", 75), ("1:1", 84)])
def test_pixels_become_square(aspect: str, width: int, tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", [picture()] * 2, codec="mpeg4", aspect=aspect)
    frames = load_frames([path], size=140, mode="pad")
    assert frames.original_sizes == [(56, width)] * 2
    centre = torch.tensor([[[100.0, 0, (width - 1) / 2], [0, 100.0, 27.5], [0, 0, 1]]])
    there = frames.points_from_original(torch.tensor([[(width - 1) / 2, 27.5]]))[0].tolist()
    back = frames.intrinsics_in_original(torch.tensor([[[100.0, 0, there[0]], [0, 100.0, there[1]], [0, 0, 1]]] * 2))
    assert torch.allclose(back[0, :2, 2], centre[0, :2, 2], atol=1e-3)


def test_interlaced_video_is_deinterlaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if "libx264" not in av.codecs_available:
        pytest.skip("this FFmpeg has no libx264")
    fields = []
    for i in range(12):
        image = np.zeros((96, 140, 3), np.uint8)
        image[0::2, 8 * i : 8 * i + 24] = 255  # the upper field, and half a frame later the lower one
        image[1::2, 8 * i + 4 : 8 * i + 28] = 255
        fields.append(image)
    path = write(tmp_path / "i.mp4", fields, rate=25, **{"x264-params": "tff=1:qp=1"}, flags="+ildct+ilme")
    frames = load_frames([path], size=(96 // 14 * 14, 140))
    assert len(frames) == 12 and "deinterlaced" in caplog.text
    rough = (frames.images[6, 0, 1:] - frames.images[6, 0, :-1]).abs().mean()
    assert rough < 0.02, "the rows of the two fields do not alternate"
    assert frames.timestamps == pytest.approx([i / 25 for i in range(12)], abs=1e-3)


def textured(count: int = 40, size: tuple[int, int] = (96, 128)) -> list[np.ndarray]:
    big = np.random.default_rng(0).integers(0, 255, (size[0] + count, size[1] + count, 3)).astype(np.uint8)
    return [np.ascontiguousarray(big[i : i + size[0], i : i + size[1]]) for i in range(count)]


@pytest.mark.parametrize(("name", "codec"), [("a.avi", "mpeg4"), ("a.ts", "mpeg2video")])
def test_damage_in_the_middle_is_said(name: str, codec: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = write(tmp_path / name, textured(), codec=codec).read_bytes()
    said = 0
    for seed in range(6):
        damaged, place = bytearray(data), random.Random(seed).randrange(len(data) // 3, 2 * len(data) // 3)
        damaged[place : place + 3000] = bytes(3000)
        (tmp_path / name).write_bytes(damaged)
        caplog.clear()
        frames = load_frames([tmp_path / name], size=SIZE)
        assert len(frames) > 20
        said += "damaged" in caplog.text
        assert all("\n" not in record.getMessage() for record in caplog.records)
    assert said == 6


def test_a_missing_tail_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """MP4 and AVI promise a number of frames, Matroska a duration. A stride that ends before the cut changes nothing."""
    images = textured()
    mkv = write(tmp_path / "a.mkv", images, codec="mpeg4").read_bytes()
    (tmp_path / "a.mkv").write_bytes(mkv[: len(mkv) // 2])
    assert 2 <= len(load_frames([tmp_path / "a.mkv"], size=SIZE, max_frames=30)) <= 30
    assert "the file ends at" in caplog.text and "of 4.00 s" in caplog.text
    caplog.clear()
    write(tmp_path / "a.mp4", images, codec="mpeg4", index="faststart")
    mp4 = (tmp_path / "a.mp4").read_bytes()
    assert mp4.index(b"moov") < mp4.index(b"mdat")
    (tmp_path / "a.mp4").write_bytes(mp4[: len(mp4) * 2 // 3])
    assert len(load_frames([tmp_path / "a.mp4"], size=SIZE, stride=10)) >= 2
    assert "of 40 frames" in caplog.text


@pytest.fixture(scope="module")
def small_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("clip") / "clip.mp4", textured(12))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1 << 30))
def test_flipped_bytes_never_end_in_a_traceback(small_clip: Path, seed: int) -> None:
    data, generator = bytearray(small_clip.read_bytes()), random.Random(seed)
    for _ in range(generator.randrange(1, 40)):
        data[generator.randrange(len(data))] = generator.randrange(256)
    path = small_clip.with_name("damaged.mp4")
    path.write_bytes(data)
    try:
        assert len(load_frames([path], size=SIZE, max_frames=8))
    except InputError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "text", ["#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:2,\nt.ts\n", "ffconcat version 1.0\nfile t.ts\n", "v=0\nm=video 9 RTP/AVP 96\n"]
)
def test_a_playlist_is_refused_at_once(text: str, tmp_path: Path) -> None:
    write(tmp_path / "t.ts", textured(5), codec="mpeg2video")
    (tmp_path / "list.m3u8").write_text(text)
    with pytest.raises(InputError, match="is a playlist, not a video"):
        load_frames([tmp_path / "list.m3u8"], size=SIZE)


def test_gaps_in_steady_timestamps_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuvj420p"
        for i in [*range(20), *range(35, 50)]:
            frame = av.VideoFrame.from_ndarray(picture(), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert len(load_frames([path], size=SIZE)) == 35
    assert "about 15 frames are missing within, by its timestamps" in caplog.text
