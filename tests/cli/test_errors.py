"""A user's mistake: one clear line on stderr, exit code 2, nothing half-written."""

from __future__ import annotations

import os

import av
import numpy as np
import pytest
import torch
from PIL import Image

from page4d.cli.infer import main
from page4d_kernels.backends.mask_attention import BACKENDS


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(np.full((60, 80, 3), 99, np.uint8)).save(path)
    return path


def refuse(capsys, *args) -> str:
    """The line."""
    try:
        code = main([str(arg) for arg in args])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2, error
    assert "Traceback" not in error and "usage:" not in error
    line = error.strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line


BAD_OPTIONS = [
    (["--size", "100"], "multiples of 14"),
    (["--size", "0"], "multiples of 14"),
    (["--size", "28x30"], "multiples of 14"),
    (["--size", "big"], "not a size"),
    (["--size", "1x2x3"], "not a size"),
    (["--size", "9" * 400], "sides are at most 65534 pixels"),
    (["--size", "9" * 5000], "999... (5000 characters)' is not a size"),
    (["--range", "some"], "invalid choice"),
    (["--frames", "0"], "1 or more"),
    (["--frames", "many"], "invalid int"),
    (["--stride", "0"], "1 or more"),
    (["--stride", "2", "--fps", "3"], "exclude each other"),
    (["--fps", "2"], "fps needs a video"),
    (["--device", "gpu"], "device 'gpu' cannot be used"),
    (["--device", "meta"], "device 'meta' cannot be used"),
    (["--fit", "squeeze"], "invalid choice"),
    (["--weights", "small"], "random:small gives that preset random weights"),
    (["--dtype", "int8"], "invalid choice"),
    (["--attn", "tritn"], "unknown backend 'tritn' for mask_attention: choose one of auto, reference"),
    (["--export", "obj"], "unknown format 'obj'"),
    (["--export", ""], "unknown format"),
    (["--export", "tracks"], "--export tracks needs track: give --query-points"),
    (["--query-points", "5"], "give pixels as X,Y"),
    (["--query-points", "5,6,7"], "give pixels as X,Y"),
    (["--query-points", "a,b"], "give pixels as X,Y"),
    (["--query-points", "5,6", "900,6"], "query point 900,6 is outside the first frame of 60 x 80"),
    (["--query-points", "5,nan"], "outside the first frame"),
    (["--track-grid", "0"], "at least 1"),
    (["--track-grid", "2", "--query-points", "1,1"], "not allowed with"),
    (["--track-grid", "2", "--size", "112"], "tracking needs images of at least 140 x 140"),
    (["--weights", "random:huge"], "unknown preset 'huge'"),
    (["--weights", "nowhere.pt"], "does not exist"),
    (["--mask-strength", "-1"], "at least 0"),
    (["--mask-strength", "1e308"], "at most 1e+09"),
    (["--memory-budget", "lots"], "'lots' is not an amount of memory: give bytes, or a number with K, M or G such as 6G"),
    (["--memory-budget", "0"], "not an amount of memory"),
    (["--memory-budget", "-1G"], "expected one argument"),
    (["--memory-budget", "infG"], "not an amount of memory"),
    (["--no-such-option"], "unrecognized arguments: --no-such-option; see"),
]


@pytest.mark.parametrize(("options", "words"), BAD_OPTIONS, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_option(options, words, image, tmp_path, capsys):
    arguments = [image, "--out", tmp_path / "out", "--weights", "random:tiny", *options]
    if "--size" not in options:
        arguments += ["--size", "56"]
    assert words in refuse(capsys, *arguments)
    assert not (tmp_path / "out").exists()


def test_single_patch(image, tmp_path, capsys):
    line = refuse(capsys, image, "--size", "14x14", "--weights", "random:tiny", "--out", tmp_path / "out")
    assert "at least two patches" in line and not (tmp_path / "out").exists()


def test_tracks_without_a_head_for_them(image, tmp_path, capsys):
    line = refuse(capsys, image, "--track-grid", "2", "--out", tmp_path / "out")
    assert "these weights have no track head: for tracks use weights that have one, such as --weights vggt" in line
    assert not (tmp_path / "out").exists()


class TestInputs:
    def refuse(self, capsys, tmp_path, *inputs):
        line = refuse(capsys, *inputs, "--out", tmp_path / "out", "--weights", "random:tiny")
        assert not (tmp_path / "out").exists()
        return line

    def test_missing(self, capsys, tmp_path):
        assert "does not exist" in self.refuse(capsys, tmp_path, tmp_path / "nothing.mp4")

    def test_empty_folder(self, capsys, tmp_path):
        assert "no images in the folder" in self.refuse(capsys, tmp_path, tmp_path)

    @pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root can read every folder")
    def test_unreadable_folder(self, capsys, tmp_path):
        folder = tmp_path / "closed"
        folder.mkdir(mode=0)
        assert "permissions" in self.refuse(capsys, tmp_path, folder)

    def test_unreadable_folder_reported_by_the_system(self, capsys, tmp_path, monkeypatch):
        folder = tmp_path / "closed"
        folder.mkdir()

        def refuse_listing(path):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("page4d.data.sources.os.listdir", refuse_listing)
        assert "Permission denied" in self.refuse(capsys, tmp_path, folder)

    @pytest.mark.parametrize("content", [b"", b"hello", b"\x00\x00\x00\x18ftypmp42" + b"\x00" * 50])
    def test_corrupt_video(self, capsys, tmp_path, content):
        path = tmp_path / "clip.mp4"
        path.write_bytes(content)
        self.refuse(capsys, tmp_path, path)

    def test_video_without_frames(self, capsys, tmp_path):
        path = tmp_path / "clip.mp4"
        with av.open(str(path), "w") as container:
            container.add_stream("mpeg4", rate=10).width = 64
        self.refuse(capsys, tmp_path, path)

    def test_corrupt_image(self, capsys, tmp_path, image):
        broken = tmp_path / "broken.png"
        broken.write_bytes(image.read_bytes()[:60])
        assert "broken.png" in self.refuse(capsys, tmp_path, image, broken)

    def test_output_folder_is_a_file(self, capsys, image):
        assert "cannot write into the folder" in refuse(capsys, image, "--out", image / "deeper")


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("PAGE4D_ATTN", "typo", "PAGE4D_ATTN: unknown backend 'typo'"),
        ("PAGE4D_MASK_HEAD", "typo", "PAGE4D_MASK_HEAD: unknown backend 'typo'"),
        ("PAGE4D_NVTX", "maybe", "PAGE4D_NVTX='maybe' is not a switch"),
        ("PAGE4D_DEBUG", "maybe", "PAGE4D_DEBUG='maybe' is not a switch"),
    ],
)
def test_bad_variable(variable, value, words, image, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr("page4d.pipeline.inputs.load_frames", None)  # said before any work
    assert words in refuse(capsys, image, "--out", tmp_path / "out")


def test_a_backend_that_is_not_there(image, tmp_path, capsys):
    if not BACKENDS.get("flash").unavailable():
        pytest.skip("flash-attn is installed")
    line = refuse(capsys, image, "--size", "56", "--weights", "random:tiny", "--attn", "flash", "--out", tmp_path / "out")
    assert "'flash' cannot serve this: no flash-attn package could be imported" in line


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("tried to allocate 99 GiB\nmore detail"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: tried to allocate 99 GiB"),
        MemoryError("tried to allocate 99 GiB"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory(capsys, image, tmp_path, monkeypatch, error):
    def give_up(*args, **kwargs):
        raise error

    monkeypatch.setattr("page4d.model.Page4D.forward", give_up)
    assert main([str(image), "--out", str(tmp_path / "out"), "--weights", "random:tiny"]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: out of memory: use fewer --frames or a smaller --size" in line and "99 GiB" in line


def test_interrupted(capsys, image, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("page4d.model.Page4D.forward", interrupt)
    assert main([str(image), "--out", str(tmp_path / "out"), "--weights", "random:tiny"]) == 130
    assert capsys.readouterr().err.strip().endswith("interrupted") and not (tmp_path / "out").exists()


def test_an_error_of_ours_is_not_hidden(image, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr("page4d.model.Page4D.forward", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main([str(image), "--out", str(tmp_path / "out"), "--weights", "random:tiny"])


def test_memory_of_preprocessing_is_refused_before_it_is_taken(image, tmp_path, capsys):
    line = refuse(capsys, image, "--size", "65534x65534", "--out", tmp_path / "out", "--weights", "random:tiny")
    assert "1 frame(s) of 65534 x 65534 pixels need 48.0 GiB of memory" in line


@pytest.mark.parametrize("folder", ["", "depth", "depth/preview", "mask", "mask/raw", "tracks"])
def test_results_never_go_among_the_input(folder, image, tmp_path, capsys):
    out = tmp_path / "out"
    (out / folder).mkdir(parents=True)
    image.rename(out / folder / "picture.png")
    assert "choose another --out" in refuse(capsys, out / folder, "--out", out)
    assert "choose another --out" in refuse(capsys, out / folder / "picture.png", "--out", tmp_path / "x" / ".." / "out")
    assert [path.name for path in out.rglob("*") if path.is_file()] == ["picture.png"]


def test_links_to_pictures_count_where_they_lie_and_where_they_point(image, tmp_path, capsys):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a.png").symlink_to(image)
    for out in (tmp_path / "links", image.parent):
        assert "choose another --out" in refuse(capsys, tmp_path / "links", "--out", out)


def test_an_empty_output_folder_is_an_error(image, capsys):
    assert "argument --out: it is empty" in refuse(capsys, image, "--out", "")
