"""The original pictures of frames: the same as were read, at their own size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from page4d.data import InputError, bundled_clip, load_frames
from page4d.data.images import Page
from page4d.data.originals import each_original, link_suffix
from page4d.data.preprocess import preprocess
from page4d.data.video import write_video


def originals(frames) -> list[Image.Image]:
    found: dict[int, Image.Image] = {}
    each_original(frames, lambda index, picture: found.setdefault(index, picture.copy()))
    assert list(found) == list(range(len(frames)))
    return list(found.values())


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def test_a_video_gives_the_frames_that_were_chosen():
    frames = load_frames([bundled_clip()], size=(28, 42), max_frames=5)
    assert [page.index for page in frames.pages] == [int(name.removeprefix("frame_")) for name in frames.names]
    for i, found in enumerate(originals(frames)):
        assert found.size == frames.original_sizes[i][::-1] and found.mode == "RGB"
        again = torch.from_numpy(preprocess(found, size=(28, 42)).pixels).permute(2, 0, 1).float() / 255
        assert torch.equal(again, frames.images[i])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture().save(tmp_path / "a.png", exif=exif)
    frames = load_frames([tmp_path / "a.png"], size=(28, 42))
    (found,) = originals(frames)
    assert found.size == ((40, 30) if orientation < 5 else (30, 40)) == frames.original_sizes[0][::-1]
    assert np.array_equal(preprocess(found, size=(28, 42)).pixels, (frames.images[0].permute(1, 2, 0) * 255).round().byte().numpy())
    assert link_suffix(frames.pages[0]) == (".png" if orientation == 1 else "")


def test_deep_pictures_keep_the_range_of_the_clip(tmp_path):
    values = np.random.default_rng(0).integers(100, 900, (2, 30, 40)).astype(np.uint16)
    for name, value in zip("ab", values, strict=True):
        Image.fromarray(value).save(tmp_path / f"{name}.png")
    frames = load_frames([tmp_path], size=(28, 42))
    found = originals(frames)
    assert all(np.asarray(image).max() > 200 for image in found), "stretched as for the network"
    assert not link_suffix(frames.pages[0])


def test_which_files_can_be_linked(tmp_path):
    picture().save(tmp_path / "a.jpg")
    picture().save(tmp_path / "b.png")
    picture().save(tmp_path / "c.webp")
    picture().convert("RGBA").save(tmp_path / "d.png")
    picture().convert("P").save(tmp_path / "e.png")
    picture().save(tmp_path / "f.png", save_all=True, append_images=[picture(seed=1)])
    picture().convert("L").save(tmp_path / "g.jpg")  # some tools want three channels
    names = ("a.jpg", "b.png", "c.webp", "d.png", "e.png", "f.png", "g.jpg")
    assert [link_suffix(Page(tmp_path / name)) for name in names] == [".jpg", ".png", "", "", "", "", ""]
    assert not link_suffix(Page(bundled_clip())) and not link_suffix(Page(tmp_path / "none.png"))
    (tmp_path / "a.jpg").rename(tmp_path / "0001")
    (tmp_path / "b.png").rename(tmp_path / "B.PNG")
    assert link_suffix(Page(tmp_path / "0001")) == ".jpg" and link_suffix(Page(tmp_path / "B.PNG")) == ".PNG"


def test_frames_made_in_memory_are_their_own_originals(tmp_path):
    frames = replace(load_frames([bundled_clip()], size=(28, 42), max_frames=2), pages=())
    with pytest.raises(InputError, match="made in memory and resized"):
        originals(frames)
    plain = replace(frames, scale=torch.ones(2, 2), offset=torch.zeros(2, 2), original_sizes=[(28, 42)] * 2)
    assert np.array_equal(np.asarray(originals(plain)[1]), (plain.images[1].permute(1, 2, 0) * 255).round().byte().numpy())


def test_files_that_changed_are_named(tmp_path):
    for name in "ab":
        picture().save(tmp_path / f"{name}.png")
    frames = load_frames([tmp_path], size=(28, 42))
    picture(44).save(tmp_path / "b.png")
    with pytest.raises(InputError, match="'b' has another size"):
        originals(frames)
    (tmp_path / "b.png").unlink()
    with pytest.raises(InputError, match=r"b\.png"):
        originals(frames)
    video = Path(write_video(tmp_path / "v.mp4", torch.rand(6, 3, 32, 48), 10))
    frames = load_frames([video], size=(28, 42))
    write_video(video, torch.rand(3, 3, 32, 48), 10)
    with pytest.raises(InputError, match="'frame_000003' cannot be read any more"):
        originals(frames)


def test_one_frame_of_a_clip():
    frames = load_frames([bundled_clip()], size=(28, 42), max_frames=3)
    one = frames.frame(1)
    assert len(one) == 1 and one.names == frames.names[1:2] and one.pages == frames.pages[1:2]
    assert torch.equal(one.images[0], frames.images[1]) and torch.equal(one.scale, frames.scale[1:2])
    assert torch.equal(one.inside()[0], frames.inside()[1])
