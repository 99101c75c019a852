"""The host side of the Triton launches: on which device, with which queries and choices, and what is reused from call to call."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import os
import types

import pytest
import torch

from page4d_kernels import TokenLayout, mask_attention, registries
from page4d_kernels.backends.mask_attention.problem import AttentionArgs
from page4d_kernels.testing import attention_inputs

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter and the compiler cannot share a process", allow_module_level=True)

import triton
import triton.language as tl
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from page4d_kernels.triton import autotune, launcher, mask_attention_launch, target
from page4d_kernels.triton.dryrun import SHARED_MEMORY, DryRunDriver, dry_run, entry_points

LAYOUT = TokenLayout(2, 60, 5)
OPS = [op for op, registry in registries().items() if any(backend.name == "triton" for backend in registry)]


def attention_args(layout: TokenLayout = LAYOUT, **options) -> AttentionArgs:
    inputs = attention_inputs(layout, dtype=torch.bfloat16, packed=True, **options)
    return AttentionArgs(*inputs.tensors(), layout, 0.125)


class FakeDevices:
    """Stands in for `torch.cuda`'s current device. The tensors that it is told to own are on device 1, device 0 is current."""

    def __init__(self, owned):
        self.owned, self.current, self.seen = owned, 0, []

    def device_of(self, tensor):
        return self.Guard(self, 1 if any(tensor is x for x in self.owned) else -1)

    class Guard:
        def __init__(self, devices, index):
            self.devices, self.index = devices, index

        def __enter__(self):
            self.before = self.devices.current
            self.devices.current = self.before if self.index < 0 else self.index

        def __exit__(self, *error):
            self.devices.current = self.before


class TestDevice:
    """Tensors on cuda:1 are served there, while cuda:0 is the current device."""

    @pytest.mark.parametrize("direction", ["forward", "backward"])
    @pytest.mark.parametrize("op", OPS)
    def test_every_launch_is_on_the_device_of_its_tensors(self, op, direction, monkeypatch):
        tensor = torch.zeros(1)
        devices = FakeDevices([tensor])
        monkeypatch.setattr(torch.cuda, "device_of", devices.device_of)
        module = importlib.import_module(f"page4d_kernels.triton.{op}_launch")
        monkeypatch.setattr(module, direction, lambda *args: devices.seen.append(devices.current))
        first = AttentionArgs(tensor, tensor, tensor, None, None, None, 1.0) if op == "mask_attention" else tensor
        getattr(registries()[op].get("triton"), direction)(first)
        assert devices.seen == [1] and devices.current == 0

    def test_triton_sees_that_device(self, monkeypatch):
        args = attention_args()
        devices = FakeDevices([args.q])
        monkeypatch.setattr(torch.cuda, "device_of", devices.device_of)
        monkeypatch.setattr(DryRunDriver, "get_current_device", lambda self: devices.seen.append(devices.current) or devices.current)
        with dry_run(90) as stand_in:
            registries()["mask_attention"].get("triton").forward(args)
        assert "mask_attention_fwd_kernel" in [launch.kernel for launch in stand_in.launches]
        assert set(devices.seen) == {1} and devices.current == 0


class TestTiming:
    """A candidate that cannot be timed is dropped. The user's call never ends because of one."""

    CANDIDATES = tuple({"BLOCK_N": block, "num_warps": 4} for block in (16, 32, 64))
    ERRORS = (
        triton.runtime.errors.OutOfResources(300000, 232448, "shared memory"),
        triton.runtime.errors.PTXASError("`ptxas` failed with error code 255\nRepro command: ptxas -v"),
        RuntimeError("PassManager::run failed"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 256.00 MiB."),
    )

    @pytest.fixture(autouse=True)
    def timer(self, drive, monkeypatch, tmp_path):
        """Stands in for `do_bench`: larger blocks are faster."""
        drive(CountingDriver(90))
        self.ran = []

        def do_bench(function, **options):
            function()
            return 100 / self.ran[-1]["BLOCK_N"]

        self.table = tmp_path / "tiles.json"
        monkeypatch.setattr(triton.testing, "do_bench", do_bench)
        monkeypatch.setattr(autotune, "_chosen", {})
        monkeypatch.setattr(autotune, "_untimed", set())
        monkeypatch.setenv("PAGE4D_AUTOTUNE", "full")
        monkeypatch.setenv("PAGE4D_AUTOTUNE_TABLE", str(self.table))

    def choose(self, error=None, fails=()):
        def run(config):
            self.ran.append(config)
            if config in fails:
                raise error

        return autotune.choose("kernel sm_90", list(self.CANDIDATES), run)

    @pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
    def test_a_candidate_that_fails_is_dropped(self, error, caplog):
        with caplog.at_level(logging.INFO, "page4d_kernels"):
            for _ in range(2):
                assert self.choose(error, fails=self.CANDIDATES[2:]) == self.CANDIDATES[1]
        assert len(self.ran) == 3
        dropped = [record.message for record in caplog.records if "BLOCK_N': 64" in record.message]
        assert len(dropped) == 1 and dropped[0].startswith("autotune: kernel sm_90: dropped ")
        assert str(error).splitlines()[0] in dropped[0] and "\n" not in dropped[0]

    @pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
    def test_when_all_fail_the_built_in_choice_serves(self, error, caplog):
        with caplog.at_level(logging.WARNING, "page4d_kernels"):
            for _ in range(2):
                assert self.choose(error, fails=self.CANDIDATES) == self.CANDIDATES[0]
        assert len(self.ran) == 3 and not self.table.exists()  # not tried again in this process, not written down
        assert [record.message for record in caplog.records] == ["autotune: kernel sm_90: none of 3 candidates ran, so the first serves"]

    def test_what_the_user_interrupts_ends(self):
        with pytest.raises(KeyboardInterrupt):
            self.choose(KeyboardInterrupt(), fails=self.CANDIDATES)


class TestLengths:
    """A key of the autotuner knows whether a call has few or many rows, and nothing else about its length."""

    @staticmethod
    def keys(layout, monkeypatch):
        names = []
        monkeypatch.setattr(autotune, "choose", lambda name, candidates, run: names.append(name) or candidates[0])
        args = attention_args(layout, heads=1)
        with dry_run(90):
            mask_attention_launch.forward(args)
            out = torch.empty_like(args.q)
            mask_attention_launch.backward(args, out, torch.empty(out.shape[:3]), out, None)
        return names

    def test_the_encoder_does_not_decide_for_a_long_clip(self, monkeypatch):
        one_frame, forty_frames = (self.keys(TokenLayout(frames, 893, 5), monkeypatch) for frames in (1, 40))
        assert len(one_frame) == 5 and not set(one_frame) & set(forty_frames)
        assert [name.rpartition(" ")[0] for name in one_frame] == [name.rpartition(" ")[0] for name in forty_frames]
        assert {name.rpartition(" ")[2] for name in one_frame + forty_frames} == {"few", "many"}

    def test_lengths_of_a_class_share_their_key(self, monkeypatch):
        few = [self.keys(layout, monkeypatch) for layout in (TokenLayout(1, 7, 1), TokenLayout(1, 1374, 5), TokenLayout(4, 1024, 5))]
        assert few[0] == few[1] == few[2]
        assert self.keys(TokenLayout(5, 893, 5), monkeypatch) == self.keys(TokenLayout(10, 1041, 5), monkeypatch)


class CountingDriver(DryRunDriver):
    """Counts how often a device is asked what it is, and can have two devices of different kinds."""

    def __init__(self, *capabilities: int):
        super().__init__(capabilities[0])
        self.capabilities, self.device, self.asked = capabilities, 0, 0

    def get_current_device(self) -> int:
        return self.device

    def get_current_target(self):
        self.asked += 1
        self.target = dataclasses.replace(self.target, arch=self.capabilities[self.device])
        return self.target

    def get_device_properties(self, device):
        self.asked += 1
        return {"max_shared_mem": SHARED_MEMORY[self.capabilities[device]], "multiprocessor_count": 132 - device, "warpSize": 32}


@pytest.fixture
def drive(monkeypatch):
    """Makes a driver the active one."""
    from triton.runtime import driver

    return lambda stand_in: monkeypatch.setattr(driver, "_active", stand_in)


class TestTarget:
    @pytest.mark.parametrize("example", ["attention, layout", "mask head, bf16", "QK-norm + RoPE", "residual + norm"])
    def test_devices_are_asked_once(self, example, drive):
        stand_in = CountingDriver(90)
        drive(stand_in)
        launch = entry_points()[example]
        launch()
        assert stand_in.asked > 0
        before, launches = stand_in.asked, len(stand_in.launches)
        launch()
        assert stand_in.asked == before and len(stand_in.launches) == 2 * launches

    def test_every_device_has_answers_of_its_own(self, drive):
        stand_in = CountingDriver(90, 80)
        drive(stand_in)
        for _ in range(2):
            for device, capability in enumerate((90, 80)):
                stand_in.device = device
                assert target.current() == (capability, SHARED_MEMORY[capability], 132 - device)
                assert autotune.key("kernel", "D64") == f"kernel sm_{capability} D64"
        drive(CountingDriver(100))
        assert target.capability() == 100

    def test_dry_runs_may_be_nested(self):
        with dry_run(80):
            with dry_run(90):
                assert target.capability() == 90
            assert target.capability() == 80

    def test_candidates_are_those_of_the_device(self, drive):
        from page4d_kernels.triton import mask_head_launch

        stand_in = CountingDriver(90, 80)
        drive(stand_in)
        half = torch.bfloat16
        found = []
        for stand_in.device in (0, 1, 0, 1):
            attention = mask_attention_launch._tuning("fwd_kernel", 128, half, 0, "few")
            found.append((attention, mask_head_launch._tuning("fwd_kernel", half, 256)))
        assert found[0] == found[2] != found[1] == found[3]
        assert found[0][0] is found[2][0]  # made once

    def test_the_interpreter_is_a_target(self, drive, monkeypatch):
        drive(CountingDriver(90))
        assert target.capability() == 90
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert target.current() == target.INTERPRETER and autotune.key("kernel") == "kernel sm_0"


@triton.jit
def some_kernel(p_x, p_y, n, stride, factor, flag, BLOCK: tl.constexpr, SHIFT: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(p_y + offsets * stride, tl.load(p_x + offsets, offsets < n) * factor + SHIFT + flag)


def test_the_choice_can_be_traced(monkeypatch):
    """torch.compile traces the checks and the choice of the backend, on a GPU too: here with a stand-in for one."""
    cuda = types.SimpleNamespace(is_available=lambda: True)
    monkeypatch.setattr(target, "torch", types.SimpleNamespace(cuda=cuda, float32=torch.float32))
    monkeypatch.setattr(target, "device_type", lambda: "cpu")
    args = attention_args()

    def attend(q, k, v):
        return mask_attention(q, k, v, args.query_gate, args.key_bias, layout=LAYOUT, backend="triton")

    with dry_run(90) as stand_in:
        torch.compile(attend, fullgraph=True, backend="eager")(args.q, args.k, args.v)
    assert "mask_attention_fwd_kernel" in [launch.kernel for launch in stand_in.launches]


class TestLauncher:
    """A launch like an earlier one is not bound anew, and runs what Triton would have run."""

    @pytest.fixture(autouse=True)
    def seen(self, monkeypatch):
        """What Triton and the launcher hand over for every launch: compiled kernel, grid, arguments."""
        seen = []

        def launch_metadata(compiled, grid, stream, *args):
            seen.append((compiled, (*grid, 1, 1)[:3], args))

        monkeypatch.setattr(CompiledKernel, "launch_metadata", launch_metadata)
        launcher.forget()
        with dry_run(90):
            yield seen
        launcher.forget()

    @pytest.fixture
    def bound(self, monkeypatch):
        """The names of the kernels that Triton is asked to bind."""
        names = []
        original = triton.JITFunction.run

        def run(kernel, *args, **options):
            names.append(kernel.__name__)
            return original(kernel, *args, **options)

        monkeypatch.setattr(triton.JITFunction, "run", run)
        return names

    @pytest.mark.parametrize(
        "example", ["attention, layout", "attention, no layout", "mask head, bf16", "QK-norm + RoPE", "residual + norm"]
    )
    def test_a_repeated_launch_hands_over_the_same(self, example, seen, bound):
        launch = entry_points()[example]
        launch()
        first, names = list(seen), list(bound)
        assert first and len(set(names)) == len({compiled.name for compiled, _, _ in first})
        seen.clear(), bound.clear()
        launch()
        assert bound == []
        assert [(compiled, grid, comparable(args)) for compiled, grid, args in seen] == [
            (compiled, grid, comparable(args)) for compiled, grid, args in first
        ]

    def test_what_differs_for_triton_differs_here(self, seen, bound):
        """Each of these is compiled anew, or could be: the launcher's second round must run what Triton ran in the first."""
        memory = torch.zeros(64, dtype=torch.int8)
        x, y = (torch.zeros(64) for _ in range(2))
        unaligned = memory[4:36].view(torch.float32)
        half = torch.zeros(64, dtype=torch.float16)
        plain = {"p_x": x, "p_y": y, "n": 17, "stride": 3, "factor": 0.5, "flag": False, "BLOCK": 32, "SHIFT": 1, "num_warps": 4}
        changes = [
            {}, {"p_x": unaligned}, {"p_y": unaligned}, {"p_x": unaligned, "p_y": unaligned}, {"p_x": half}, {"p_y": half},
            {"n": 16}, {"n": 1}, {"n": 2**31}, {"n": 2**63}, {"stride": 1}, {"stride": 16}, {"n": 3, "stride": 17},
            {"factor": 1}, {"factor": 1.0}, {"factor": 16}, {"factor": 2}, {"factor": 2.0}, {"flag": True}, {"flag": 1}, {"flag": 0},
            {"BLOCK": 64}, {"SHIFT": 2}, {"num_warps": 8},
        ]  # fmt: skip

        def launch(change):
            x, y, *numbers, block, shift, warps = (plain | change).values()
            launcher.launch(some_kernel, (2, 3), (x, y), tuple(numbers), BLOCK=block, SHIFT=shift, num_warps=warps)

        for change in changes:
            some_kernel[(2, 3)](*list((plain | change).values())[:-1], num_warps=(plain | change)["num_warps"])
        expected = list(seen)
        assert len({id(compiled) for compiled, _, _ in expected}) >= 15
        for _ in range(2):
            seen.clear(), bound.clear()
            for change in changes:
                launch(change)
            for change, (compiled, grid, args), (other, _, other_args) in zip(changes, seen, expected, strict=True):
                assert compiled is other and grid == (2, 3, 1), change
                assert comparable(args) == comparable(other_args), change
        assert bound == []

    def test_descriptors_are_made_once_per_call(self, seen, monkeypatch):
        """Gated and other rows read the same tiles of k and v. What they get is what Triton's constructor makes and checks."""
        made = []
        original = mask_attention_launch._descriptor
        monkeypatch.setattr(mask_attention_launch, "_descriptor", lambda x, block: made.append(original(x, block)) or made[-1])
        monkeypatch.setattr(autotune, "choose", lambda name, candidates, run: {**candidates[0], "BLOCK_N": 64})
        args = attention_args(TokenLayout(2, 600, 5))
        mask_attention_launch.forward(args)
        assert len(made) == 2 and len(seen) > 2
        for found, x in zip(made, (args.k, args.v), strict=True):
            assert found.base is x
            expected = TensorDescriptor(x, list(x.shape), list(x.stride()), found.block_shape)
            fields = [field.name for field in dataclasses.fields(TensorDescriptor) if field.name != "base"]
            assert all(getattr(found, name) == getattr(expected, name) for name in fields)

    def test_descriptors_of_other_tiles_are_other_kernels(self, seen):
        x = torch.zeros(64, 64)
        tiles = [TensorDescriptor(x, [64, 64], [64, 1], block) for block in ([16, 16], [16, 32], [16, 16])]
        halves = TensorDescriptor(x.half(), [64, 64], [64, 1], [16, 16])
        assert launcher._trait(tiles[0]) == launcher._trait(tiles[2])
        assert len({launcher._trait(tile) for tile in (*tiles, halves, x)}) == 4

    def test_each_device_has_kernels_of_its_own(self, seen):
        x = torch.zeros(64)
        for capability in (80, 90, 80, 90):
            with dry_run(capability):
                launcher.launch(some_kernel, (1,), (x, x), (5, 1, 0.5, False), BLOCK=32, SHIFT=0)
        assert [compiled.metadata.target.arch for compiled, _, _ in seen] == [80, 90, 80, 90]

    def test_amd_gpus_are_left_to_triton(self, seen, bound):
        """There the size of a tensor's storage matters too."""
        x = torch.zeros(64)
        with dry_run("gfx942"):
            for _ in range(2):
                launcher.launch(some_kernel, (1,), (x, x), (9, 1, 0.5, False), BLOCK=32, SHIFT=0)
        assert len(bound) == len(seen) == 2 and not launcher._launches

    def test_too_many_are_forgotten(self, seen, bound, monkeypatch):
        monkeypatch.setattr(launcher, "LIMIT", 3)
        x = torch.zeros(64)
        for n in (3, 4, 5, 6, 6, 3):
            launcher.launch(some_kernel, (1,), (x, x), (n, 1, 0.5, False), BLOCK=32, SHIFT=0)
            assert len(launcher._launches) <= 3
        assert [args[2] for _, _, args in seen] == [3, 4, 5, 6, 6, 3] and len(bound) == 5

    def test_a_profiler_that_instruments_kernels_gets_them(self, seen, bound, monkeypatch):
        x = torch.zeros(64)
        for mode in ("", "consan", "", "consan"):
            monkeypatch.setattr(triton.knobs.compilation, "instrumentation_mode", mode)
            launcher.launch(some_kernel, (1,), (x, x), (7, 1, 0.5, False), BLOCK=32, SHIFT=0)
        assert len(bound) == 2 and len({id(compiled) for compiled, _, _ in seen}) == 2


def comparable(args):
    """Tensors by dtype, shape and strides, descriptors by what they describe."""
    known = {torch.Tensor: lambda x: (x.dtype, x.shape, x.stride()), TensorDescriptor: lambda x: (x.shape, x.strides, x.block_shape)}
    return [(type(x), known.get(type(x), lambda value: value)(x)) for x in args]
