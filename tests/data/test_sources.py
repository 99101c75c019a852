"""What an input names: folders with more than pictures in them, patterns, URLs, pipes and links."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from page4d.data import InputError, load_frames


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in (1, 2, 10):
        Image.new("RGB", (28, 28)).save(tmp_path / f"{i}.png")
    return tmp_path


def refusal(*inputs: object) -> str:
    with pytest.raises(InputError) as error:
        load_frames(list(inputs), size=28)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_pattern_stands_for_its_files_in_natural_order(folder: Path) -> None:
    assert load_frames([f"{folder}/*.png"], size=28).names == ["1", "2", "10"]
    assert "no file matches it as a pattern" in refusal(f"{folder}/*.jpg")
    assert load_frames([f"{folder.parent}/{folder.name[:-1]}?"], size=28).names == ["1", "2", "10"]
    (folder / "a[1].png").write_bytes((folder / "1.png").read_bytes())
    assert load_frames([folder / "a[1].png"], size=28).names == ["a[1]"]


@pytest.mark.parametrize("url", ["https://example.com/a//b.mp4?x=1", "s3://bucket/key", "file:///tmp/a.mp4"])
def test_a_url_is_named_whole(url: str) -> None:
    assert refusal(url) == f"{url!r} is a URL, not a path: download it first"


def test_paths_of_any_type_and_nothing_else(folder: Path) -> None:
    path = folder / "1.png"
    assert all(load_frames(given, size=28).names == ["1"] for given in (path, str(path), os.fsencode(path), [os.fsencode(path)]))
    for wrong in (None, 3, [3], [None]):
        with pytest.raises(InputError, match="inputs must be paths, not"):
            load_frames(wrong, size=28)  # type: ignore[arg-type]


@pytest.mark.parametrize("empty", ["", " ", "\t"])
def test_an_empty_input_is_not_the_current_folder(empty: str) -> None:
    assert "an input is empty" in refusal(empty)


def test_names_that_no_file_can_have() -> None:
    assert "\\x00" in refusal("a\0b")
    assert "~nobody-of-this-name" in refusal("~nobody-of-this-name/a.mp4")
    assert "does not exist" in refusal("x" * 5000 + ".mp4") or "usable path" in refusal("x" * 5000 + ".mp4")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("name", ["pipe", "pipe.mp4", "pipe.png"])
def test_a_pipe_is_refused_at_once(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    assert "is a pipe, not a file: save what it gives to a file first" in refusal(tmp_path / name)
    if os.path.exists("/dev/null"):
        assert "is a device or socket" in refusal("/dev/null")


def test_entries_that_are_no_files_are_left_out_and_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "3.png").mkdir()
    (folder / "4.png").symlink_to(folder / "nowhere.png")
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "5.png")
    assert load_frames([folder], size=28).names == ["1", "2", "10"]
    assert "3.png: left out, as it is a folder" in caplog.text and "4.png: left out, as it is a dangling link" in caplog.text
    assert "is a link to" in refusal(folder / "4.png")


def test_pictures_and_videos_that_are_not_read_are_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.dng", "b.DNG", "c.mp4", "notes.txt", ".hidden.mp4"):
        (folder / name).touch()
    assert len(load_frames([folder], size=28)) == 3
    (record,) = caplog.records
    assert "not read are 2 .dng, 1 .mp4" in record.getMessage()


def test_folders_are_not_searched(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    assert "folders in it are not searched" in refusal(tmp_path)


def test_a_folder_of_videos_names_the_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("10.mov", "2.MP4", "raw.dng"):
        (tmp_path / name).touch()
    message = f"the folder {str(tmp_path)!r} holds 2 videos and no images: give one of them, such as {str(tmp_path / '2.MP4')!r}"
    assert refusal(tmp_path) == message
    (tmp_path / "10.mov").unlink()
    assert refusal(tmp_path) == f"the folder {str(tmp_path)!r} holds a video and no images: give {str(tmp_path / '2.MP4')!r}"
    (tmp_path / "2.MP4").unlink()
    assert "(1 .dng are not read): it should hold files of the types" in refusal(tmp_path)
    assert not caplog.records
