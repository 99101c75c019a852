from __future__ import annotations

import os
import struct
import wave
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from page4d.data import Frames, InputError, load_frames, video

SIZE = (28, 42)  # height, width
COUNT = 30


def write_video(path: Path, count: int = COUNT, rate: int = 10, codec: str = "mpeg4", size: tuple[int, int] = SIZE) -> Path:
    """Grey frames, each brighter by 8, so that the grey value gives the index."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for i in range(count):
            frame = np.full((*size, 3), 8 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "clip.mp4")


def indices(frames: Frames) -> list[int]:
    """The indices by grey value. The names must agree."""
    found = [round(float(image.mean()) * 255 / 8) for image in frames.images]
    assert frames.names == [f"frame_{i:06d}" for i in found]
    return found


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, list(range(COUNT))),
        ({"stride": 7}, [0, 7, 14, 21, 28]),
        ({"fps": 2.0}, [0, 5, 10, 15, 20, 25]),
        ({"fps": 100.0}, list(range(COUNT))),
        ({"max_frames": 1}, [0]),
        ({"max_frames": 2}, [0, 29]),
        ({"max_frames": 4}, [0, 10, 19, 29]),
        ({"max_frames": 99}, list(range(COUNT))),
        ({"stride": 10, "max_frames": 2}, [0, 20]),
        ({"fps": 2.0, "max_frames": 3}, [0, 10, 25]),
    ],
)
def test_stride_fps_and_max_frames_select_frames(clip: Path, options: dict, expected: list[int]) -> None:
    frames = load_frames([clip], size=SIZE, **options)
    assert indices(frames) == expected
    assert frames.timestamps == pytest.approx([i / 10 for i in expected])
    assert frames.original_sizes == [SIZE] * len(expected)
    assert frames.images.shape == (len(expected), 3, *SIZE) and frames.images.dtype == torch.float32


@pytest.mark.parametrize(("name", "codec"), [("a.avi", "mpeg4"), ("a.mkv", "libx264"), ("a.mp4", "libx264"), ("a.ts", "mpeg2video")])
def test_containers_with_and_without_b_frames_are_read(tmp_path: Path, name: str, codec: str) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec}")
    path = write_video(tmp_path / name, rate=25, codec=codec, size=(56, 84))
    frames = load_frames([path], size=(56, 84), max_frames=4)
    assert indices(frames) == [0, 10, 19, 29]
    assert frames.timestamps == pytest.approx([0, 0.4, 0.76, 1.16], abs=2e-3)


def test_a_video_without_extension_and_a_gif_are_read(clip: Path, tmp_path: Path) -> None:
    bare = tmp_path / "recording"
    bare.write_bytes(clip.read_bytes())
    assert len(load_frames([bare], size=SIZE)) == COUNT
    stills = [Image.new("RGB", (42, 28), (60 * i, 0, 0)) for i in range(4)]
    stills[0].save(tmp_path / "a.GIF", save_all=True, append_images=stills[1:], duration=100)
    assert len(load_frames([tmp_path / "a.GIF"], size=SIZE)) == 4


def test_frames_that_are_not_chosen_are_never_converted(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted: list[int] = []

    class Spy:
        def __init__(self, index: int, frame: av.VideoFrame) -> None:
            self.index, self.frame = index, frame
            self.time, self.side_data = frame.time, frame.side_data  # any other attribute is an error

        def to_image(self) -> Image.Image:
            converted.append(self.index)
            return self.frame.to_image()

    decode = video.frames

    def spied(*args) -> Iterator[Spy]:
        for index, frame in enumerate(decode(*args)):
            yield Spy(index, frame)

    monkeypatch.setattr(video, "frames", spied)
    load_frames([clip], size=SIZE, max_frames=3)
    assert converted == [0, 14, 29]


@pytest.mark.parametrize("angle", [90, 180, 270])
def test_rotated_videos_stand_upright(tmp_path: Path, angle: int) -> None:
    """The track header of a phone's video has a rotation matrix."""
    half = np.zeros((*SIZE, 3), np.uint8)
    half[:14] = 255  # white on top
    path = tmp_path / "phone.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(half, format="rgb24")))
        container.mux(stream.encode(None))
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40  # version 0: the matrix follows 40 bytes of other fields
    a, b, c, d = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[angle]  # clockwise
    data[start : start + 20] = struct.pack(">5i", a << 16, b << 16, 0, c << 16, d << 16)
    path.write_bytes(data)
    frames = load_frames([path], size=(28, 28), mode="pad")
    assert frames.original_sizes == [SIZE if angle == 180 else SIZE[::-1]]
    image = frames.images[0, 0]
    bright = {90: image[8:20, 17], 180: image[20, 8:20], 270: image[8:20, 10]}[angle]
    dark = {90: image[8:20, 10], 180: image[7, 8:20], 270: image[8:20, 17]}[angle]
    assert bright.mean() > 0.9 and dark.mean() < 0.1


def test_folders_are_read_in_natural_order_with_unique_names(tmp_path: Path) -> None:
    for name in ("img10.png", "img2.PNG", "img1.jpg", "notes.txt", ".hidden.png"):
        Image.new("RGB", (28, 28)).save(tmp_path / name, format="png")
    frames = load_frames([tmp_path], size=28)
    assert frames.names == ["img1", "img2", "img10"] and frames.timestamps == [0, 1, 2]
    assert load_frames([tmp_path], size=28, stride=2).names == ["img1", "img10"]
    assert load_frames([tmp_path], size=28, stride=2).timestamps == [0, 2]
    given = load_frames([tmp_path / "img10.png", tmp_path / "img1.jpg"], size=28)
    assert given.names == ["img10", "img1"]
    (tmp_path / "b").mkdir()
    Image.new("RGB", (28, 28)).save(tmp_path / "b" / "IMG1.jpg")
    assert load_frames([tmp_path / "img1.jpg", tmp_path / "b" / "IMG1.jpg"], size=28).names == ["000000_img1", "000001_IMG1"]


def test_only_chosen_images_are_opened(tmp_path: Path) -> None:
    for i in range(5):
        Image.new("RGB", (28, 28)).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"broken")
    assert load_frames([tmp_path], size=28, stride=2).names == ["0", "2", "4"]


def test_broken_inputs_give_one_line(tmp_path: Path, clip: Path) -> None:
    def file(name: str, content: bytes) -> list[Path]:
        (tmp_path / name).write_bytes(content)
        return [tmp_path / name]

    noise, sound, nothing = tmp_path / "noise.png", tmp_path / "sound.wav", tmp_path / "nothing"
    Image.effect_noise((64, 64), 50).save(noise)
    with wave.open(str(sound), "wb") as writer:
        writer.setparams((1, 2, 8000, 0, "NONE", ""))
        writer.writeframes(bytes(1600))
    nothing.mkdir()
    cases = [
        ("is empty (0 bytes)", file("empty.mp4", b"")),
        ("cannot read", file("text.mp4", b"this is not a video\n" * 50)),
        ("cannot read", file("cut.mp4", clip.read_bytes()[:2000])),  # an mp4's index is at its end
        ("has no video in it", file("text.nfo", b"\x1b[31mhello\x1b[0m\n" * 50)),
        ("has no video in it", [sound]),
        ("is not an image", file("broken.png", b"not a png")),
        ("cannot read the image", file("truncated.png", noise.read_bytes()[:1500])),
        ("does not exist", [tmp_path / "miss\ning.mp4"]),
        ("no images in the folder", [nothing]),
        ("nothing to read", []),
        ("is not an image file", [noise, clip]),
    ]
    for part, inputs in cases:
        with pytest.raises(InputError) as error:
            load_frames(inputs, size=SIZE)
        assert part in str(error.value)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_fps_of_images_is_an_error(tmp_path: Path) -> None:
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="fps needs a video"):
        load_frames([tmp_path], fps=2.0)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0)
    with pytest.raises(InputError, match="permissions"):
        load_frames([folder])


def test_a_truncated_video_gives_the_frames_it_has(tmp_path: Path) -> None:
    """The header of a truncated AVI still promises all frames. The frames are selected again from those that decode."""
    whole = write_video(tmp_path / "whole.avi").read_bytes()
    movie = whole.index(b"movi")
    (tmp_path / "cut.avi").write_bytes(whole[: movie + (whole.index(b"idx1") - movie) // 2])
    got = load_frames([tmp_path / "cut.avi"], size=SIZE)
    last = len(got) - 1
    assert 5 < last < COUNT - 5
    assert indices(load_frames([tmp_path / "cut.avi"], size=SIZE, max_frames=3)) == [0, round(last / 2), last]


def test_a_wrong_frame_count_is_corrected(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "_list", lambda path: ([i / 10 for i in range(60)], ""))
    assert indices(load_frames([clip], size=SIZE, max_frames=3)) == [0, 14, 29]
    monkeypatch.setattr(video, "_list", lambda path: ([], ""))
    assert indices(load_frames([clip], size=SIZE, max_frames=3)) == [0, 14, 29]
