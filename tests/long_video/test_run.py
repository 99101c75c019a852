"""A whole run on rendered truth: chunks, seams, loops, joining, and going on after a stop."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from page4d.data.synthetic import SyntheticScenes
from page4d.errors import InputError
from page4d.evaluation.pose import pose_metrics
from page4d.long_video.chunks import Chunking
from page4d.long_video.join import moved
from page4d.long_video.run import run
from page4d.long_video.store import Store

COUNT = 290
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def closed():
    return SyntheticScenes("walk", frames=COUNT, size=(28, 42), seed=5)[0]


class Oracle:
    """In place of the model: the truth with noise and drift, in another world in each pass, and how often it was asked."""

    def __init__(self, sample, truth, random_similarity, noise: float = 0.0, stops_after: int = 10**6):
        self.sample, self.truth, self.random_similarity = sample, truth, random_similarity
        self.noise, self.left, self.calls = noise, stops_after, 0

    def __call__(self, images):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left, self.calls = self.left - 1, self.calls + 1
        frames = [self.numbers[image.numpy().tobytes()] for image in images]
        found = moved(self.truth(self.sample, frames), self.random_similarity(frames[0]))
        generator = torch.Generator().manual_seed(frames[0])
        bent = 1 + self.noise * torch.linspace(-1, 1, len(frames)).view(1, -1, 1, 1, 1)  # the unit drifts within the chunk
        rough = 1 + self.noise * torch.randn(found.depth.shape, generator=generator)
        return replace(found, depth=found.depth * bent * rough), means_of(images)

    @property
    def numbers(self):
        return {image.numpy().tobytes(): number for number, image in enumerate(self.sample.images)}


def means_of(images):
    """A stand-in for the encoder: the coarse picture itself."""
    return torch.nn.functional.avg_pool2d(images, 7).flatten(1)


def in_memory(name, shape):
    return torch.empty(shape)


def error(found, sample) -> float:
    metrics = pose_metrics(found.prediction.cameras.extrinsics[0], sample.extrinsics)
    return metrics["ate"] / metrics["ate_constant"]


def test_exact_chunks_give_the_exact_path(closed, truth, random_similarity, tmp_path):
    oracle = Oracle(closed, truth, random_similarity)
    found = run(closed.images, Chunking(40, 5).divide(COUNT), oracle, Store(tmp_path, {}), in_memory, loops=False)
    assert error(found, closed) < 2e-3 and oracle.calls == len(found.chunks) == len(found.seams) + 1
    assert found.prediction.depth.shape == (1, COUNT, 28, 42, 1) and found.loops is None


def test_loops_take_back_the_drift(closed, truth, random_similarity, tmp_path):
    chunks = Chunking(40, 5).divide(COUNT)
    plain = run(closed.images, chunks, Oracle(closed, truth, random_similarity, 0.02), Store(tmp_path / "a", {}), in_memory, loops=False)
    looped = run(closed.images, chunks, Oracle(closed, truth, random_similarity, 0.02), Store(tmp_path / "b", {}), in_memory)
    assert looped.loops and all(after < before for _, before, after in looped.loops)
    assert error(looped, closed) < error(plain, closed)


@pytest.mark.slow
def test_the_mask_keeps_people_from_bending_the_path(truth, random_similarity, tmp_path):
    """Each pass sees the three people before the camera at a depth of its own."""
    sample = SyntheticScenes("walk", frames=150, size=(56, 84), seed=60, moving=3)[1]

    class Misled(Oracle):
        def __call__(self, images):
            found, means = super().__call__(images)
            first = self.numbers[images[0].numpy().tobytes()]
            factor = float((0.25 * torch.randn((), generator=torch.Generator().manual_seed(first))).exp())
            moves = sample.dynamic[first : first + len(images)][None, ..., None]
            return replace(found, depth=torch.where(moves, factor * found.depth, found.depth)), means

    chunks, errors = Chunking(30, 6).divide(150), []
    for mask in (True, False):
        oracle = Misled(sample, truth, random_similarity)
        errors.append(error(run(sample.images, chunks, oracle, Store(tmp_path / str(mask), {}), in_memory, mask=mask), sample))
    assert errors[0] < errors[1] / 2, errors


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_a_stopped_run_goes_on_and_gives_the_same_bits(closed, truth, random_similarity, tmp_path, stop):
    chunks = Chunking(20, 4).divide(80)
    images = closed.images[:80]
    whole = run(images, chunks, Oracle(closed, truth, random_similarity, 0.01), Store(tmp_path / "whole", {"a": 1}), in_memory)
    with pytest.raises(KeyboardInterrupt):
        run(images, chunks, Oracle(closed, truth, random_similarity, 0.01, stop), Store(tmp_path / "cut", {"a": 1}), in_memory)
    oracle = Oracle(closed, truth, random_similarity, 0.01)
    found = run(images, chunks, oracle, Store(tmp_path / "cut", {"a": 1}, resume=True), in_memory)
    assert oracle.calls == len(chunks) - stop
    assert found.prediction == whole.prediction


def test_a_damaged_chunk_is_made_again(closed, truth, random_similarity, tmp_path):
    chunks, images = Chunking(20, 4).divide(40), closed.images[:40]
    whole = run(images, chunks, Oracle(closed, truth, random_similarity), Store(tmp_path, {}), in_memory)
    path = tmp_path / "chunk_00001.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    oracle = Oracle(closed, truth, random_similarity)
    assert run(images, chunks, oracle, Store(tmp_path, {}, resume=True), in_memory).prediction == whole.prediction
    assert oracle.calls == 1


def test_what_a_store_leaves_alone_and_what_it_does_not_trust(tmp_path, caplog):
    (tmp_path / "mine.txt").write_text("precious")
    store = Store(tmp_path, {"a": 1})
    store.write("chunk_00000", {"a": torch.ones(3)})
    (tmp_path / "run.json").unlink()  # as after a kill in the midst of `remove`
    assert Store(tmp_path, {"a": 2}).read("chunk_00000") is None and "of another run" in caplog.text
    (tmp_path / "run.json").unlink()
    again = Store(tmp_path, {"a": 1})
    assert again.read("chunk_00000") is not None
    again.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_what_a_store_refuses(tmp_path):
    Store(tmp_path, {"size": [28, 42]}, resume=True)  # there is nothing yet, so it starts
    with pytest.raises(InputError, match="a run that was not finished: go on with it with --resume"):
        Store(tmp_path, {"size": [28, 42]})
    for changed in ({"size": (28, 56)}, {}, {"size": (28, 42), "more": 1}):
        with pytest.raises(InputError, match=r"made with other options \((size|more)"):
            Store(tmp_path, changed, resume=True)
    Store(tmp_path, {"size": (28, 42)}, resume=True)
    for damaged in ("{", "[1]"):
        (tmp_path / "run.json").write_text(damaged)
        with pytest.raises(InputError, match="remove the folder"):
            Store(tmp_path, {}, resume=True)


@pytest.mark.parametrize("place", [0.2, 0.6, 0.99])
def test_a_changed_byte_is_seen(tmp_path, caplog, place):
    tensors = {"a": torch.randn(100), "b": torch.randn(3, 4)}
    Store(tmp_path, {}).write("chunk", tensors)
    again = Store(tmp_path, {}, resume=True)
    found = again.read("chunk")
    assert found is not None and all(torch.equal(found[name], tensors[name]) for name in tensors)
    path = tmp_path / "chunk.safetensors"
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)
    assert Store(tmp_path, {}, resume=True).read("chunk") is None
    assert "cannot be used" in caplog.text and "made again" in caplog.text


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
def test_one_process_at_a_time(tmp_path):
    holds = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\nfrom page4d.long_video.store import Store\n"
    holds += f"store = Store(Path({str(tmp_path)!r}), {{}})\nprint('held', flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", holds], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another process works on the run"):
            Store(tmp_path, {}, resume=True)
        process.kill()
    Store(tmp_path, {}, resume=True)
