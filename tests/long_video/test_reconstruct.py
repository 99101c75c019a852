"""`reconstruct` in chunks: when, what it writes, known cameras, and what is refused."""

from __future__ import annotations

import errno
import json
import os

import pytest
import safetensors.torch
import torch

from page4d import Page4D, preset
from page4d.data.synthetic import SyntheticScenes
from page4d.data.video import write_video
from page4d.errors import InputError
from page4d.geometry import Similarity, quaternion_to_matrix
from page4d.long_video.align import AlignmentError
from page4d.long_video.chunks import Chunking
from page4d.long_video.passes import chosen_chunking
from page4d.model.checkpoint import save_pretrained
from page4d.pipeline import reconstruct

COUNT = 20
SMALL = {"weights": "random:tiny", "size": (28, 42)}


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "walk.mp4"
    return write_video(path, SyntheticScenes("walk", frames=COUNT, size=(56, 84), seed=3, moving=1)[0].images, 10)


@pytest.fixture(scope="module")
def scene(video):
    return reconstruct(video, chunk="8,2", **SMALL)


def test_the_result_is_of_the_same_kind_as_that_of_one_pass(scene, video):
    whole = reconstruct(video, frames=COUNT, chunk="off", **SMALL)
    assert {name: value.shape for name, value in scene.prediction.tensors().items()} == {
        name: value.shape for name, value in whole.prediction.tensors().items() if name != "pose_enc_list"
    }
    assert scene.frames == whole.frames and torch.equal(scene.prediction.images, whole.prediction.images)
    assert [(chunk.start, chunk.end) for chunk in scene.long_video.chunks] == [(0, 8), (6, 14), (12, 20)]
    assert whole.long_video is None and len(scene.long_video.seams) == 2 and scene.long_video.loops is not None
    without = reconstruct(video, chunk=(8, 2), loops=False, **SMALL)
    assert without.long_video.loops is None and without.prediction == scene.prediction, "there is no loop to close"


def test_files_report_and_no_rest(scene, video, tmp_path):
    words = []
    found = reconstruct(video, tmp_path, chunk=(8, 2), formats=["trajectory", "npz"], say=words.append, **SMALL)
    assert {path.name for path in tmp_path.iterdir()} == {
        "trajectory.tum",
        "cameras.json",
        "predictions.npz",
        "chunks.json",
        "manifest.json",
    }
    assert torch.equal(found.prediction.depth, scene.prediction.depth)
    assert "chunks: 20 frames in 3 passes over 8 frames, 2 of them in common with the chunk before" in words
    report = json.loads((tmp_path / "chunks.json").read_text())
    assert report["chunks"] == [
        {"start": 0, "end": 8, "overlap": 0},
        {"start": 6, "end": 14, "overlap": 2},
        {"start": 12, "end": 20, "overlap": 2},
    ]
    assert [seam["frames"] for seam in report["seams"]] == [[6, 7], [12, 13]] and report["loops"] == []
    times = [float(line.split()[0]) for line in (tmp_path / "trajectory.tum").read_text().splitlines()[1:]]
    assert times == pytest.approx([frame / 10 for frame in range(COUNT)]), "each frame once, in order"
    reconstruct(video, tmp_path, frames=2, formats=["trajectory"], **SMALL)
    assert not (tmp_path / "chunks.json").exists(), "what an earlier run said of its chunks goes with them"


def test_a_pass_that_does_not_fit_runs_in_chunks_by_itself(video):
    model = Page4D(preset("tiny"))
    half = model.plan((1, 10, 3, 28, 42), memory_budget=0).bytes
    words = []
    options = {"frames": COUNT, "memory_budget": half, "say": words.append, **SMALL}
    found = reconstruct(video, **options)
    assert found.long_video is not None and 2 <= len(found.long_video.chunks[0]) < COUNT
    assert sum("one pass does not fit the memory; --chunk off forbids it" in line for line in words) == 1
    assert reconstruct(video, chunk="off", **options).long_video is None
    assert reconstruct(video, **options | {"memory_budget": 1 << 30}).long_video is None


def test_which_chunks_are_chosen():
    nano, other = preset("nano"), preset("page4d")
    assert chosen_chunking(nano, 127, lambda n: True) is None
    assert chosen_chunking(nano, 128, lambda n: True) == Chunking(24, 6)
    assert chosen_chunking(other, 10**6, lambda n: True) is None, "nothing was measured"
    assert chosen_chunking(other, 300, lambda n: n <= 50) == Chunking(48, 12), "eight chunks, as with 50"
    assert chosen_chunking(other, 300, lambda n: n <= 299) == Chunking(120, 30)
    assert chosen_chunking(other, 30, lambda n: n <= 28) == Chunking(17, 4)
    assert chosen_chunking(other, 300, lambda n: n <= 2) == Chunking(2, 1) and chosen_chunking(other, 2, lambda n: n < 2) is None
    assert chosen_chunking(other, 300, lambda n: False) is None, "nothing helps"
    assert nano.replace(depth=7, kept_layers=(1, 2, 4, 6)).chunk is None


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("x", "give a number of frames such as 60"),
        ("", "give a number of frames"),
        ("1", "at least 2 frames, not 1"),
        ("8,8", "can overlap by 1 to 7 frames, not 8"),
        ("8,2,1", "give a number of frames"),
        (8.5, "give a number of frames"),
        (True, "give a number of frames"),
        ([8, "2"], "give a number of frames"),
        (-3, "at least 2 frames"),
    ],
)
def test_chunks_that_cannot_be(value, words):
    with pytest.raises(InputError, match=words):
        Chunking.of(value)


def test_chunks_in_all_forms():
    assert Chunking.of("60") == Chunking.of(60) == Chunking.of((60, 15)) == Chunking.of(" 60 , 15 ") == Chunking(60, 15)
    assert Chunking.of(2) == Chunking(2, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chunk": 8, "track_grid": 2}, "points are tracked in one pass"),
        ({"resume": True}, "only a run in chunks with an output folder can be resumed"),
        ({"chunk": "8;2"}, "does not work"),
        ({"cameras": "no_such_file.json"}, "no_such_file.json"),
    ],
)
def test_mistakes_are_said_before_the_work(options, words):
    with pytest.raises(InputError, match=words) as error:
        reconstruct("no_such_video.mp4", **options, **SMALL)
    assert "\n" not in str(error.value)


def test_a_full_disk_loses_nothing(scene, video, tmp_path, monkeypatch):
    save, left = safetensors.torch.save_file, [2]

    def full(*args):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(*args)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    options = {"chunk": 8, "formats": ["npz"], **SMALL}
    with pytest.raises(InputError, match=r"chunk_00002 cannot be written \(No space left on device\): make room, then go on with --resume"):
        reconstruct(video, tmp_path, **options)
    monkeypatch.undo()
    with pytest.raises(InputError, match="a run that was not finished"):
        reconstruct(video, tmp_path, **options)
    with pytest.raises(InputError, match=r"other options \(chunk"):
        reconstruct(video, tmp_path, **options | {"chunk": 9}, resume=True)
    with pytest.raises(InputError, match=r"other options \(mask_strength: "):
        reconstruct(video, tmp_path, **options, mask_strength=1.0, resume=True)
    record = (tmp_path / "chunks" / "run.json").read_text()
    for damaged in ("{}", "[]", "{", '{"chunk": 8, "memory_budget": null}', '{"chunk": [8, 2], "memory_budget": "x"}'):
        (tmp_path / "chunks" / "run.json").write_text(damaged)
        with pytest.raises(InputError, match="remove the folder"):
            reconstruct(video, tmp_path, **options, resume=True)
    (tmp_path / "chunks" / "run.json").write_text(record)
    with pytest.raises(InputError, match=r"other options \(backends"):
        reconstruct(video, tmp_path, **options, attn="reference", resume=True)
    words = []
    found = reconstruct(video, tmp_path, **options, resume=True, say=words.append)
    assert found.prediction == scene.prediction and any("going on with the run" in line for line in words)
    assert {path.name for path in tmp_path.iterdir()} == {"predictions.npz", "chunks.json", "manifest.json"}
    reconstruct(video, tmp_path, **options, resume=True, say=words.append)
    assert any("starting from the beginning" in line for line in words)


def test_weights_without_depth_cannot_run_in_chunks(video, tmp_path):
    path = tmp_path / "no_depth.safetensors"
    save_pretrained(Page4D(preset("tiny").replace(depth_head=None)), path)
    with pytest.raises(InputError, match="no head for depth: use --chunk off"):
        reconstruct(video, weights=str(path), size=(28, 42), chunk=8)


TURN = Similarity(
    torch.tensor(2.5, dtype=torch.float64),
    quaternion_to_matrix(torch.tensor([0.1, -0.5, 0.3, 0.8], dtype=torch.float64)),
    torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64),
)


def write_known(path, extrinsics, scene, focal):
    """cameras.json of other cameras: as `known_cameras` would get it from another tool."""
    intrinsics = scene.cameras.intrinsics[0].double().clone()
    intrinsics[:, 0, 0] *= focal
    entries = [
        {"name": name, "extrinsics": e.tolist(), "intrinsics": k.tolist()}
        for name, e, k in zip(scene.frames.names, extrinsics, intrinsics, strict=True)
    ]
    path.write_text(json.dumps({"frames": entries}))
    return path


NANO = {"weights": "nano", "size": (56, 84)}  # whose cameras move


@pytest.mark.parametrize("chunk", ["off", "8,2"])
def test_known_cameras_give_world_unit_and_intrinsics(video, tmp_path, chunk):
    options = {"frames": COUNT, "chunk": chunk, **NANO}
    own = reconstruct(video, **options)
    there = TURN.cameras(own.prediction.cameras.extrinsics[0].double())
    path = write_known(tmp_path / "cameras.json", there, own, 1.2)
    found = reconstruct(video, tmp_path / "out", cameras=path, formats=["trajectory", "npz"], **options)
    written = json.loads((tmp_path / "out" / "cameras.json").read_text())["frames"]
    assert torch.allclose(torch.tensor(written[3]["intrinsics"]), found.cameras.intrinsics[0, 3], rtol=1e-4), "files say the same"
    assert found.known["after"] < 1e-3, "a chunk is aligned by the frames that are taken from it"
    near = 1e-3 if chunk == "off" else 0.1  # chunks do not say quite the same of the frames that they share
    assert (found.prediction.cameras.extrinsics[0] - there).abs().max() < near
    assert (found.prediction.depth / own.prediction.depth / 2.5 - 1).abs().max() < near
    assert torch.allclose(found.cameras.intrinsics[0, :, 0, 0], 1.2 * own.cameras.intrinsics[0, :, 0, 0], rtol=1e-5)
    assert found.known["frames"] == COUNT and found.known["ate"] < 1e-3 and found.known["focal"] == pytest.approx(0.0909, abs=0.02)
    points = found.prediction.points("depth")[0][0, 3, 5, 7]
    rows, k = found.prediction.depth[0, 3, 5, 7, 0], found.prediction.cameras.intrinsics[0, 3]
    seen = torch.stack([(7 - k[0, 2]) * rows / k[0, 0], (5 - k[1, 2]) * rows / k[1, 1], rows])
    e = found.prediction.cameras.extrinsics[0, 3]
    assert (e[:, :3] @ points + e[:, 3] - seen).abs().max() < 1e-3, "known intrinsics unproject"


def test_known_cameras_of_some_frames_carry_the_others(video, tmp_path):
    """Each chunk is brought to the cameras that it has, the others follow their neighbours."""
    options = {"chunk": "8,2", **NANO}
    own = reconstruct(video, **options)
    there = TURN.cameras(own.prediction.cameras.extrinsics[0].double())
    path = write_known(tmp_path / "cameras.json", there, own, 1.0)
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({"frames": whole["frames"][:6]}))
    found = reconstruct(video, cameras=path, **options)
    assert found.known["frames"] == 6
    assert (found.prediction.cameras.extrinsics[0] - there).abs().max() < 1e-2
    for entry in whole["frames"]:
        entry["extrinsics"] = whole["frames"][0]["extrinsics"]
    path.write_text(json.dumps(whole))
    with pytest.raises(InputError, match="stand in one place"):
        reconstruct(video, cameras=path, **options)
    generator = torch.Generator().manual_seed(0)
    path = write_known(
        path,
        TURN.cameras(
            own.prediction.cameras.extrinsics[0].double() + 9 * torch.rand(20, 3, 4, generator=generator) * torch.tensor([0, 0, 0, 1.0])
        ),
        own,
        1.0,
    )
    with pytest.raises(AlignmentError, match="stand still or go another way"):
        reconstruct(video, cameras=path, frames=COUNT, chunk="off", **NANO)


def test_padding_does_not_align(video):
    """White bars above and below fill a third of the picture."""
    found = reconstruct(video, weights="nano", chunk="8,2", size=84, fit="pad", loops=False)
    inside = found.frames.inside()
    assert 0.5 < inside.float().mean() < 0.9
    pieces = found.long_video
    assert all(seam.static <= 1 and seam.error > 0 for seam in pieces.seams)


def test_a_run_of_more_frames_is_not_forgotten(video, tmp_path):
    (tmp_path / "chunks").mkdir()
    (tmp_path / "chunks" / "run.json").write_text('{"chunk": [60, 15], "memory_budget": null}')
    with pytest.raises(InputError, match="had more frames: resume with the same options"):
        reconstruct(video, tmp_path, resume=True, **SMALL)


def test_a_folder_of_ones_own_is_left_alone(video, tmp_path):
    (tmp_path / "chunks").mkdir()
    (tmp_path / "chunks" / "mine.txt").write_text("precious")
    reconstruct(video, tmp_path, chunk=(8, 2), formats=["trajectory"], **SMALL)
    assert [path.name for path in (tmp_path / "chunks").iterdir()] == ["mine.txt"]
