"""CUDA graphs of the whole model: which calls share one, and which calls take one by themselves."""

from __future__ import annotations

import functools
import types

import pytest
import torch

from page4d import Page4D, preset
from page4d.model import cuda_graph, graph_worker
from page4d.model import page4d as page4d_module
from page4d_kernels import profiling, use_backend
from page4d_kernels.qualify import record

IMAGES = torch.rand(1, 2, 3, 28, 42, generator=torch.Generator().manual_seed(0))


class TestGraphs:
    """Which calls share a graph; what a graph does needs a GPU, see below."""

    @pytest.fixture
    def captures(self, monkeypatch):
        made = []

        def capture(model, inputs, options):
            made.append((inputs, options))
            return lambda **inputs: "replayed"

        monkeypatch.setattr(cuda_graph, "_capture", capture)
        return made

    class OnCuda:
        """A model of which only where it is matters."""

        def __init__(self):
            where = types.SimpleNamespace(device=torch.device("cuda"))
            self.aggregator = types.SimpleNamespace(camera_token=where, compute_dtype=torch.bfloat16)
            self.config, self.weight, self.hooks = preset("nano"), torch.zeros(1), {}

        training = False

        def parameters(self):
            return [self.weight]

        def buffers(self):
            return []

        def modules(self):
            return [types.SimpleNamespace(_forward_hooks=self.hooks, _forward_pre_hooks={})]

        def __call__(self, images, query_points=None, **options):
            return "run"

    @torch.no_grad()
    def test_one_capture_per_shape_and_options(self, captures):
        graphed = cuda_graph.GraphedPage4D(self.OnCuda(), max_frames=3)
        assert graphed(torch.zeros(3, 3, 28, 42)) == graphed(torch.ones(3, 3, 28, 42)) == "replayed" and len(captures) == 1
        for count, call in enumerate(
            [
                lambda: graphed(torch.zeros(2, 3, 28, 42)),
                lambda: graphed(torch.zeros(1, 3, 3, 28, 42)),
                lambda: graphed(torch.zeros(3, 3, 28, 42, dtype=torch.float64)),
                lambda: graphed(torch.zeros(3, 3, 28, 42), torch.zeros(5, 2)),
                lambda: graphed(torch.zeros(3, 3, 28, 42), outputs=["depth", "camera"]),
                lambda: graphed(torch.zeros(3, 3, 28, 42), mask_strength=1.0),
            ],
            2,
        ):
            assert call() == call() == "replayed" and len(captures) == count
        graphed(torch.zeros(3, 3, 28, 42), outputs=["camera", "depth"])
        assert len(captures) == 7
        with use_backend("reference"):  # a graph is that of the backends it was captured with
            graphed(torch.zeros(3, 3, 28, 42))
        assert len(captures) == 8

    def test_what_goes_to_the_model(self, captures, model):
        graphed = cuda_graph.GraphedPage4D(self.OnCuda(), max_frames=3)
        assert graphed(torch.zeros(3, 3, 28, 42)) == "run"  # gradients
        with torch.no_grad():
            assert graphed(torch.zeros(4, 3, 28, 42)) == graphed(torch.zeros(1, 4, 3, 28, 42)) == "run"  # long
            assert graphed(torch.zeros(3, 28, 42)) == "run"  # the model says what is wrong
            on_cpu = cuda_graph.GraphedPage4D(model)(IMAGES, outputs=["camera"])
            assert torch.equal(on_cpu.pose_enc, model(IMAGES, outputs=["camera"]).pose_enc)
        assert not captures

    @pytest.fixture
    def qualified(self, monkeypatch):
        """A record in which graphs of nano are faster for up to 512 tokens."""
        label = "bfloat16 forward: 128 channels, 6 layers, up to 512 tokens"
        faster = {("cuda_graph", "cuda", label): record.Advice((("graph", 2.0),))}
        monkeypatch.setattr(record, "advice", lambda *question: faster.get(question, record.Advice()))
        monkeypatch.setattr(cuda_graph, "_on_default_stream", lambda: True)

    @torch.no_grad()
    def test_a_graph_is_taken_by_itself_from_the_second_call_on(self, captures, qualified):
        model, options = self.OnCuda(), {"outputs": ["depth"], "mask_strength": 64.0}
        clip = {"images": torch.zeros(1, 3, 3, 28, 42)}
        take = functools.partial(cuda_graph.take_graph, model)
        assert take(clip, options) is None and not captures
        assert take(clip, options) == take(clip, options) == "replayed" and len(captures) == 1
        model.weight = torch.ones(1)  # replaced weights: the graph reads the old ones
        assert take(clip, options) is None and take(clip, options) == "replayed" and len(captures) == 2
        for frames in range(1, 8):  # two more have room
            clip = {"images": torch.zeros(1, frames, 3, 28, 14)}
            assert take(clip, options) is None and take(clip, options) == ("replayed" if frames <= 2 else None)
        assert len(cuda_graph._taken[model].graphs) == cuda_graph.KEPT

    @torch.no_grad()
    def test_what_cannot_be_captured_runs_without_a_graph(self, qualified, monkeypatch, caplog):
        monkeypatch.setattr(cuda_graph, "_capture", lambda *call: (_ for _ in ()).throw(RuntimeError("operation not permitted\nmore")))
        model, clip = self.OnCuda(), {"images": torch.zeros(1, 3, 3, 28, 42)}
        assert [cuda_graph.take_graph(model, clip, {}) for _ in range(4)] == [None] * 4
        assert caplog.text.count("no CUDA graph could be captured") == 1 and "(operation not permitted)" in caplog.text

    def test_where_no_graph_is_taken_by_itself(self, captures, qualified, monkeypatch):
        model, clip = self.OnCuda(), {"images": torch.zeros(1, 3, 3, 28, 42)}

        def taken(clip=clip, model=model):
            return [cuda_graph.take_graph(model, clip, {}) for _ in range(3)][-1]

        assert taken() is None  # gradients
        with torch.no_grad():
            assert taken({"images": torch.zeros(1, 9, 3, 28, 42)}) is None  # long
            assert taken({"images": torch.zeros(1, 3, 3, 280, 420)}) is None  # a class that is not in the record
            with profiling.record("cpu"):
                assert taken() is None
            model.hooks[0] = print
            assert taken() is None
            model.hooks.clear()
            model.aggregator.camera_token.device = torch.device("cpu")
            assert taken() is None
            model.aggregator.camera_token.device = torch.device("cuda")
            assert taken() == "replayed"

    def test_the_model_asks_for_a_graph(self, model, monkeypatch):
        asked = []
        monkeypatch.setattr(page4d_module, "take_graph", lambda *call: asked.append(call) or "a graph's")
        assert model(IMAGES, outputs=["depth", "camera"]) == "a graph's"
        assert asked[0][0] is model and asked[0][2] == {"outputs": ["camera", "depth"], "mask_strength": model.config.mask_strength}
        assert model(IMAGES, outputs=["camera"], memory_budget=1 << 40) != "a graph's"  # as a capture does

    def test_graphs_are_judged_by_their_bits(self, monkeypatch):
        """Without a GPU: what stands for a graph is the model, then a model that is off in the last bit of one output."""
        name, model, images = list(graph_worker.models("cpu", torch.float32))[-1]
        assert name == "nano"
        with torch.inference_mode():
            assert graph_worker.judge(Same(model), images, 1, 0) == ""
            assert "depth of input 2 has other bits" in graph_worker.judge(Same(model, wrong=2), images, 1, 0)


@pytest.fixture
def told(monkeypatch):
    """What the child says about graphs of nano on the CPU, by what it is asked to do more, and the answer to its judge."""
    nano = list(graph_worker.models("cpu", torch.float32))[-1]
    monkeypatch.setattr(graph_worker, "models", lambda device, dtype: [nano])
    monkeypatch.setattr(graph_worker, "GraphedPage4D", Same)
    monkeypatch.setattr(graph_worker, "MAX_FRAMES", 3)
    monkeypatch.setattr(graph_worker, "SECONDS", 0.0)

    def run(seconds=100.0, reason="", **asked):
        said: list[dict] = []
        job = {"seed": 0, "dtypes": ["float32"], "device": "cpu", "judged": [], "passed": [], "timed": []} | asked
        monkeypatch.setattr(graph_worker, "judge", lambda *about: reason)
        monkeypatch.setattr(graph_worker.worker, "channel", lambda: (job, lambda **what: said.append(what)))
        monkeypatch.setattr(graph_worker.worker, "wait", lambda say: str(seconds))
        graph_worker.main()
        return [what for what in said if "at" not in what]

    return run


def test_what_is_said_about_graphs(told):
    name = "float32 forward: 128 channels, 6 layers, up to 512 tokens"
    passed, timed, complete, done = told()
    assert passed == {"passed": "float32 forward", "lengths": []} and timed["timed"] == name and len(timed["seconds"]) == 2
    assert complete == {"complete": "float32 forward"} and done == {"done": True}
    assert told(seconds=-1.0) == [passed, {"untimed": name}, done]
    assert told(judged=["float32 forward"], passed=["float32 forward"], timed=[name]) == [complete, done]
    assert told(judged=["float32 forward"]) == [done]  # it has failed
    assert told(reason="wrong") == [{"failed": "float32 forward", "reason": "wrong"}, done]


class Same:
    """A stand-in for graphs of a model. The depth of call number `wrong` differs in one bit."""

    def __init__(self, model, wrong=0):
        self.model, self.wrong, self.calls = model, wrong, 0

    def __call__(self, images):
        found = self.model(images)
        self.calls += 1
        if self.calls == self.wrong:
            found.depth.view(torch.int32).flatten()[3] += 1
        return found


@pytest.mark.gpu
def test_cuda_graphs_of_the_model():
    torch.manual_seed(0)
    low = Page4D(preset("tiny").replace(track=None)).cuda().eval().set_compute_dtype(torch.bfloat16)
    graphed = cuda_graph.GraphedPage4D(low, max_frames=2)
    with torch.inference_mode():
        for seed, frames in ((0, 2), (1, 2), (2, 1), (3, 2), (4, 3)):
            images = torch.rand(frames, 3, 140, 140, generator=torch.Generator().manual_seed(seed)).cuda()
            found, expected = graphed(images), low(images)
            for name in ("depth", "depth_conf", "pose_enc", "world_points", "mask"):
                assert torch.equal(getattr(found, name), getattr(expected, name)), (name, frames)
            assert len(graphed._graphs) == min(2, 1 + (seed >= 2))
        first = graphed(torch.rand(2, 3, 140, 140, device="cuda"))
        kept = first.depth.clone()
        graphed(torch.rand(2, 3, 140, 140, device="cuda"))
        assert torch.equal(first.depth, kept)  # the caller's own
