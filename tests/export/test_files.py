"""Output files appear whole, all together, or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from page4d.data import InputError
from page4d.data.frames import Frames
from page4d.export import export
from page4d.files import AtomicFiles, SharedArrays, check_writable, on_disk, open_shared
from page4d.prediction import Prediction


def files_under(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_tensors_on_disk_work_as_others_and_leave_nothing_behind(tmp_path: Path) -> None:
    """If the folder does not exist, the nearest existing parent is used."""
    allocate = on_disk(tmp_path / "not" / "yet")
    tensor = allocate("depth", (5, 7))
    tensor[:] = torch.arange(35.0).view(5, 7)
    assert tensor.dtype == torch.float32 and tensor.sum() == 595 and not list(tmp_path.iterdir())
    copy = (tensor * 2).sum()
    assert copy == 1190


def test_shared_arrays_are_found_by_their_place(tmp_path: Path) -> None:
    """Parts of an array without a copy, other tensors with one. Files go when they are told to, what is mapped stays."""
    arrays = SharedArrays(tmp_path / "not" / "yet")
    whole = arrays.allocate("images", (6, 4)).copy_(torch.arange(24.0).view(6, 4))
    part = arrays.place(whole[2:5])
    assert part["first"] == 8 and part["shape"] == [3, 4]
    there = open_shared(part)
    there += 100
    assert torch.equal(whole[2:5], torch.arange(8.0, 20).view(3, 4) + 100) and whole[1, 3] == 7
    for other in (whole[[0, 3]], whole[:, 1:3], torch.ones(2, dtype=torch.float64)):
        assert torch.equal(open_shared(arrays.place(other)), other.float())
    assert len(list(tmp_path.iterdir())) == 4
    arrays.unlink(part)
    assert arrays.place(whole)["path"] == part["path"] and len(list(tmp_path.iterdir())) == 3
    with pytest.raises(InputError, match="not the same folder here as on rank 0"):
        open_shared(part)
    arrays.close()
    assert not list(tmp_path.iterdir()) and torch.equal(there, whole[2:5])


def test_a_disk_that_cannot_reserve_space_gives_ordinary_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*args: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    assert on_disk(tmp_path)("depth", (5, 10)).shape == (5, 10)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match=r"has no room for depth, 0.2 GB \(No space left on device\): make room, or choose another --out"):
        on_disk(tmp_path)("depth", (50, 10**6))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "new" / "deeper"):
        check_writable(folder)
    assert not list(tmp_path.iterdir()), "nothing is left"
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for folder in (
        tmp_path / "file",
        tmp_path / "file" / "below",
        tmp_path / "loop",
        tmp_path / ("n" * 300),
        tmp_path / "new" / ("n" * 300),
    ):
        with pytest.raises(InputError, match=r"cannot write into the folder .*: choose another") as error:
            check_writable(folder)
        assert "\n" not in str(error.value) and repr(str(folder)) in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "loop"} and (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="Linux")
def test_proc_cannot_be_written(prediction: Prediction, frames: Frames) -> None:
    for folder in ("/proc", "/proc/page4d", "/proc/page4d/out"):
        with pytest.raises(InputError, match="cannot write into the folder"):
            check_writable(Path(folder))
        with pytest.raises(InputError, match="cannot write into the folder"):
            export(prediction, frames, folder)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everything")
def test_a_folder_without_permission_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    for folder in (tmp_path / "locked", tmp_path / "locked" / "new"):
        with pytest.raises(InputError, match="Permission denied"):
            check_writable(folder)


def test_atomic_files_replace_on_success_and_keep_on_failure(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), AtomicFiles() as files:
        files.add(path).write_text("half")
        files.add(tmp_path / "new" / "b.txt").write_text("half")
        raise RuntimeError
    assert files_under(tmp_path) == {"a.txt"} and path.read_text() == "old" and not (tmp_path / "new").exists()
    with AtomicFiles() as files:
        files.add(path).write_text("new")
        assert path.read_text() == "old"
    assert files.paths == [path] and path.read_text() == "new"


def test_atomic_files_refuse_the_same_path_twice(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="twice"), AtomicFiles() as files:
        files.add(tmp_path / "a").write_text("one")
        files.add(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_atomic_files_clean_up_when_renaming_fails(tmp_path: Path) -> None:
    with pytest.raises(OSError), AtomicFiles() as files:
        for name in ("a", "new/b", "new/c"):
            files.add(tmp_path / name).write_text(name)
        (tmp_path / "new" / "b").mkdir()  # another process is faster
    assert files_under(tmp_path) == {"a"} and (tmp_path / "new" / "b").is_dir()
