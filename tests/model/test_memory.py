"""Memory of a pass without gradients: as planned, within a budget, and what happens when it runs out all the same."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from page4d.config import preset
from page4d.errors import InputError
from page4d.execution.attention_plan import AttentionPlan
from page4d.execution.memory import MemoryPlan, Workload, budget_of, can_offload, free_of_container, make_plan, predicted_bytes
from page4d.execution.runners import StreamedRunner
from page4d.model import Page4D
from page4d_kernels import use_backend
from page4d_kernels.testing import LiveBytes


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    dense = preset("page4d").depth_head
    config = preset("small").replace(embed_dim=256, depth=6, masked_blocks=(2, 4), mask_after=2, kept_layers=(1, 2, 3, 5), track=None)
    config = config.replace(
        depth_head=replace(dense, out_channels=(64, 128, 256, 256)), point_head=replace(dense, out_channels=(64, 128, 256, 256))
    )
    return Page4D(config).eval()


CASES = {
    "camera": (1, 12, (112, 154), {"camera"}),
    "depth": (1, 6, (112, 154), {"camera", "depth"}),
    "all": (1, 4, (112, 154), {"camera", "depth", "points", "mask"}),
    "batch": (2, 5, (112, 154), {"camera", "depth"}),
    "long": (1, 40, (56, 84), {"camera", "depth"}),
}


def case_and_dtype(quick):
    """All cases in both dtypes. Those that are not quick are slow."""
    pairs = [(case, dtype) for case in CASES for dtype in (torch.float32, torch.bfloat16)]
    return [pair if pair in quick else pytest.param(*pair, marks=pytest.mark.slow) for pair in pairs]


@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize(("case", "dtype"), case_and_dtype(quick=[("all", torch.float32), ("depth", torch.float32)]), ids=str)
def test_the_plan_is_what_is_allocated(model, case, dtype, budget, monkeypatch):
    monkeypatch.setattr("page4d.execution.memory.CHUNK_TOKENS", 300)
    batch, frames, size, outputs = CASES[case]
    images = torch.rand(batch, frames, 3, *size)
    model.set_compute_dtype(dtype)
    with torch.no_grad(), use_backend("sdpa"):
        plan = model.plan(images.shape, outputs, budget)
        model(images, outputs=outputs, memory_budget=budget)  # makes the tables
        with LiveBytes(*model.parameters(), *model.buffers()) as live:
            model(images, outputs=outputs, memory_budget=budget)
    measured = live.peak
    print(f"{case} {dtype} {plan}: measured {measured / 2**20:.1f} MiB, planned {plan.bytes / 2**20:.1f}: {plan.bytes / measured:.3f}")
    assert 0.9 <= plan.bytes / measured <= 1.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", ["2x2", "1x2"])
@pytest.mark.parametrize("backend", ["sdpa", "chunked"])
def test_the_plan_with_cells(model, backend, cell, dtype, monkeypatch):
    """`sdpa` copies q, k and v of a few heads at a time."""
    monkeypatch.setattr("page4d.execution.memory.CHUNK_TOKENS", 300)
    monkeypatch.setattr("page4d_kernels.backends.mask_attention.sdpa.ROWS_AT_ONCE", 1)
    images = torch.rand(1, 40, 3, 112, 154)
    model.set_compute_dtype(dtype)
    with torch.no_grad(), use_backend(backend):
        attention = AttentionPlan.of(cell, model.config)
        plan = model.plan(images.shape, ["camera"], attention=attention)
        model(images, outputs=["camera"], attention=attention)  # makes the tables
        with LiveBytes(*model.parameters(), *model.buffers()) as live:
            model(images, outputs=["camera"], attention=attention)
    print(f"{backend} {cell} {dtype}: planned {plan.bytes / 2**20:.1f} MiB, measured {live.peak / 2**20:.1f}: {plan.bytes / live.peak:.3f}")
    assert 0.9 <= plan.bytes / live.peak <= 1.1


@pytest.fixture(scope="module")
def tracker():
    torch.manual_seed(0)
    config = preset("small").replace(depth=4, masked_blocks=(1, 2), mask_after=1, kept_layers=(0, 1, 2, 3), track=preset("page4d").track)
    return Page4D(config).eval()


@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize(
    "case",
    [(2, 5, 1 << 26), *(pytest.param(case, marks=pytest.mark.slow) for case in [(4, 200, 1 << 26), (12, 5, 1), (8, 100, 1)])],
    ids=str,
)
def test_the_plan_with_tracks(tracker, case, budget, monkeypatch):
    """Bound by the extractor, by the sampled windows, by the maps and by the transformer over points."""
    frames, points, samples = case
    for module in ("execution.memory", "model.heads.track"):
        monkeypatch.setattr(f"page4d.{module}.SAMPLES_IN_FLIGHT", samples)
    images, queries = torch.rand(1, frames, 3, 140, 140), torch.rand(1, points, 2) * 100
    with torch.no_grad(), use_backend("sdpa"):
        plan = tracker.plan(images.shape, ["camera"], budget, points=points)
        tracker(images, queries, outputs=["camera"], memory_budget=budget)  # makes the tables
        with LiveBytes(*tracker.parameters(), *tracker.buffers()) as live:
            tracker(images, queries, outputs=["camera"], memory_budget=budget)
    print(f"{case} {plan}: measured {live.peak / 2**20:.1f} MiB, planned {plan.bytes / 2**20:.1f}: {plan.bytes / live.peak:.3f}")
    assert 0.9 <= plan.bytes / live.peak <= 1.1


def work(model, frames=12, size=(112, 154), outputs=("camera", "depth", "points"), **options):
    return Workload(model.config, 1, frames, size, 2, frozenset(outputs), **options)


def test_plans_get_leaner_until_they_fit(model, monkeypatch):
    monkeypatch.setattr("page4d.execution.memory.CHUNK_TOKENS", 1000)
    fast, lean, away = make_plan(work(model), None), make_plan(work(model), 1), make_plan(work(model), 1, can_offload=True)
    assert (fast.trunk_frames, fast.head_frames, fast.offload) == (10, 8, False)
    assert lean.bytes == predicted_bytes(work(model), MemoryPlan(1, 1)) and not lean.offload
    assert away.bytes == predicted_bytes(work(model), MemoryPlan(1, 1, offload=True)) and away.offload
    assert away.bytes < lean.bytes < fast.bytes
    for budget in range(away.bytes, fast.bytes, (fast.bytes - away.bytes) // 50):
        assert make_plan(work(model), budget, can_offload=True).bytes <= budget
    assert make_plan(work(model), fast.bytes) == fast
    assert make_plan(work(model), fast.bytes - 1) != fast


def test_chunks_are_only_made_smaller_where_that_saves_memory():
    """1 000 frames at the official size: what is there for all frames rules, and the host takes some of it off, at any size of chunks."""
    config = preset("page4d-mask")
    long = Workload(config, 1, 1000, (336, 518), 2, frozenset({"camera", "depth"}), images_on_device=False, results_on_device=False)
    whole = make_plan(long, None)
    assert make_plan(long, whole.bytes - 1).trunk_frames == whole.trunk_frames == 9
    away = make_plan(long, whole.bytes - 1, can_offload=True)
    assert (away.trunk_frames, away.head_frames, away.offload) == (9, 8, True) and away.bytes < whole.bytes / 1.8
    assert make_plan(replace(long, batch=64, frames=1), None).trunk_frames == 1


def test_offload_needs_room_on_the_host(model, monkeypatch):
    gpu, kept = torch.device("cuda"), 4 * 2 * 2 * 12 * work(model).per_frame * model.config.embed_dim
    for room, there in ((2 * kept, True), (2 * kept - 1, False), (None, True)):
        monkeypatch.setattr("page4d.execution.memory.budget_of", lambda device, room=room: room)
        assert can_offload(work(model), gpu) is there
    assert not can_offload(work(model), torch.device("cpu"))


def test_what_lies_elsewhere_is_not_counted(model):
    pixels = 12 * 112 * 154 * 4
    here = predicted_bytes(work(model), MemoryPlan(1, 1))
    assert here - predicted_bytes(work(model, images_on_device=False), MemoryPlan(1, 1)) == 3 * pixels
    assert here - predicted_bytes(work(model, images_on_device=False, results_on_device=False), MemoryPlan(1, 1)) > 3 * pixels


def test_memory_grows_linearly_with_frames():
    """Beyond the weights, at the official size in bf16: what 336 x 518 pixels cost per frame in the trunk."""
    config = preset("page4d")

    def trunk(frames, **options):
        plan = MemoryPlan(9, 8, **options)
        outputs = frozenset({"camera", "depth"})
        return predicted_bytes(Workload(config, 1, frames, (336, 518), 2, outputs, images_on_device=False, results_on_device=False), plan)

    per_frame, away = ((trunk(1000, **o) - trunk(500, **o)) / 500 for o in ({}, {"offload": True}))
    print(f"{per_frame / 1e6:.1f} MB per frame, {away / 1e6:.1f} with kept layers on the host")
    assert per_frame <= 40e6 and away <= 20e6
    assert trunk(1000) - trunk(999) == pytest.approx(per_frame)


def test_the_budget_is_what_is_free():
    assert 1 << 28 < budget_of(torch.device("cpu")) < 1 << 50


@pytest.mark.parametrize(
    ("folder", "files", "cache"),
    [("", ("memory.max", "memory.current"), "inactive_file"),
     ("memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_inactive_file")],
)  # fmt: skip
def test_a_container_has_a_limit_of_its_own(folder, files, cache, tmp_path):
    assert free_of_container(tmp_path) is None
    (tmp_path / folder).mkdir(exist_ok=True)
    for name, text in zip((*files, "memory.stat"), ("8000", "3000", f"anon 7\n{cache} 500"), strict=True):
        (tmp_path / folder / name).write_text(text + "\n")
    assert free_of_container(tmp_path) == 5500
    (tmp_path / folder / files[0]).write_text("max\n")
    assert free_of_container(tmp_path) is None


@pytest.mark.parametrize("batch", [1, 2])
def test_chunks_change_nothing(model, batch):
    """A frame at a time, the mask head and the encoder too."""
    images = torch.rand(batch, 5, 3, 56, 84)
    outputs = ["camera", "depth", "mask"]
    model.set_compute_dtype(torch.float32)
    with torch.no_grad():
        whole, chunked = (model(images, outputs=outputs, mask_strength=8.0, memory_budget=budget) for budget in (1 << 40, 0))
    for name, value in whole.tensors().items():
        torch.testing.assert_close(chunked.tensors()[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_out_of_memory_in_spite_of_the_plan(model, frames, error, monkeypatch, caplog):
    """What does not fit is done again in smaller chunks, with the same result; nothing is done twice."""
    images = torch.rand(7, 3, 56, 84)
    model.set_compute_dtype(torch.float32)
    block, most = model.aggregator.global_blocks[3].mlp, frames * 29
    real = block.forward

    def forward(x):
        if x.shape[1] > most:
            raise error
        return real(x)

    with torch.no_grad():
        whole = model(images)
        monkeypatch.setattr(block, "forward", forward)
        with caplog.at_level(logging.WARNING):
            chunked = model(images)
    for name, value in whole.tensors().items():
        torch.testing.assert_close(chunked.tensors()[name], value, rtol=1e-5, atol=1e-5)
    warnings = [record.message for record in caplog.records]
    assert len(warnings) == {1: 2, 2: 2, 3: 1}[frames]  # 7, 3, 1 frames at a time
    assert all(line.startswith("out of memory in spite of the plan: going on with 0.") for line in warnings)
    assert f"beyond the weights, {7 >> len(warnings)} frames at a time" in warnings[-1]


@pytest.mark.parametrize("most", [1, 2])
def test_a_head_without_room_is_tried_again_with_fewer_frames(model, most, monkeypatch, caplog):
    images = torch.rand(5, 3, 56, 84)
    head = model.depth_head
    real = head.forward

    def forward(layers, *rest):
        if len(layers[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(layers, *rest)

    with torch.no_grad():
        whole = model(images)
        monkeypatch.setattr(head, "forward", forward)
        with caplog.at_level(logging.WARNING):
            chunked = model(images)
    for name, value in whole.tensors().items():
        torch.testing.assert_close(chunked.tensors()[name], value, rtol=1e-5, atol=1e-5)
    assert [record.message.split("with ")[1] for record in caplog.records] == [
        f"{frames} frames at a time in this head" for frames in ((2,) if most == 2 else (2, 1))
    ]


def test_a_negative_budget(model):
    with pytest.raises(InputError, match="at least 0, not -1"):
        model(torch.rand(1, 3, 56, 84), memory_budget=-1)


def test_giving_up(model, monkeypatch):
    def forward(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model.aggregator.global_blocks[3].mlp, "forward", forward)
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError):
        model(torch.rand(3, 3, 56, 84))


def test_attention_without_room_is_tried_again_with_kept_layers_on_the_host(model):
    runner = StreamedRunner(MemoryPlan(2, 2), work(model), torch.device("cpu"), torch.float32)
    runner.device = torch.device("meta")  # anything that has a host
    runner.saved, tries = [torch.ones(2)], []

    def attend():
        tries.append(runner.plan.offload)
        if not runner.plan.offload:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.zeros(1)

    runner._retry_with_offload(attend)
    assert tries == [False, True] and runner.plan.trunk_frames == 2

    def broken():
        raise RuntimeError("something else")

    runner.plan = MemoryPlan(2, 2)
    with pytest.raises(RuntimeError, match="something else"):
        runner._retry_with_offload(broken)


def test_results_go_where_they_are_allocated(model):
    asked, images = {}, torch.rand(1, 3, 3, 56, 84)

    def allocate(name, shape):
        asked[name] = torch.full(shape, torch.nan)
        return asked[name]

    with torch.no_grad():
        found = model(images, outputs=["depth", "points"], allocate=allocate)
    assert set(asked) == {"depth", "depth_conf", "world_points", "world_points_conf"}
    for name, value in asked.items():
        assert getattr(found, name).data_ptr() == value.data_ptr() and value.isfinite().all(), name


def test_results_without_room_are_noticed_before_the_trunk(model, monkeypatch):
    def allocate(name, shape):
        raise InputError(f"no room for {name}")

    monkeypatch.setattr(model.aggregator, "forward", None)  # not called
    with torch.no_grad(), pytest.raises(InputError, match="no room for depth"):
        model(torch.rand(3, 3, 56, 84), outputs=["depth"], allocate=allocate)


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [None, 1])
def test_the_plan_is_what_a_gpu_allocates(budget):
    config = preset("page4d-mask").replace(
        depth=4, masked_blocks=(1, 3), mask_after=1, kept_layers=(0, 1, 2, 3), point_head=None, track=None
    )
    model = Page4D(config).to("cuda").eval().set_compute_dtype(torch.bfloat16)
    images = torch.rand(1, 40, 3, 336, 518)
    wanted = {"camera", "depth"}
    found = []
    for device in ("cpu", "cuda"):  # where the images are
        given = images.to(device)
        plan = model.plan(given.shape, wanted, budget, images_on_device=device == "cuda")
        with torch.inference_mode():
            model(given[:, :2], outputs=wanted, memory_budget=budget)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated() - (given.nbytes if device == "cuda" else 0)
            torch.cuda.reset_peak_memory_stats()
            found.append(model(given, outputs=wanted, memory_budget=budget))
            torch.cuda.synchronize()
        measured = torch.cuda.max_memory_allocated() - before
        print(f"{plan}: measured {measured / 2**20:.0f} MiB, planned {plan.bytes / 2**20:.0f}")
        assert 0.9 <= plan.bytes / measured <= 1.1
        assert plan.offload == (budget == 1)
    for name in ("depth", "pose_enc"):
        torch.testing.assert_close(getattr(found[0], name), getattr(found[1], name))


@pytest.mark.gpu
def test_the_camera_head_waits_for_layers_on_their_way_to_the_host():
    """Copies that are late: the device is kept busy on the stream that copies."""
    model = Page4D(preset("small").replace(track=None)).to("cuda").eval()
    images = torch.rand(1, 30, 3, 112, 154, device="cuda")
    with torch.inference_mode():
        expected = model(images, outputs=["camera"])
        real = StreamedRunner._store

        def late(self, half, x):
            real(self, half, x)
            with torch.cuda.stream(self.offload_stream):
                torch.cuda._sleep(200_000_000)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StreamedRunner, "_store", lambda self, half, x: late(self, half.fill_(torch.nan), x))
            found = model(images, outputs=["camera"], memory_budget=0)
    torch.testing.assert_close(found.pose_enc, expected.pose_enc, rtol=1e-3, atol=1e-3)
