"""The Triton kernels compiled for GPUs that are not here, through the real launch path: gates on what the machine code needs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from page4d_kernels import TokenLayout, env
from page4d_kernels.backends.mask_attention.problem import AttentionArgs
from page4d_kernels.testing import attention_inputs

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter and the compiler cannot share a process", allow_module_level=True)

import triton

from page4d_kernels.triton import autotune, mask_head_launch, qk_norm_rope_launch, residual_norm_launch, target
from page4d_kernels.triton import mask_attention_launch as launch
from page4d_kernels.triton import mask_attention_tiles as tiles
from page4d_kernels.triton.dryrun import SHARED_MEMORY, Launch, Resources, compiled_kernels, dry_run, entry_points, resources

GPUS = [target for target in SHARED_MEMORY if isinstance(target, int)]
EACH_UNIT = [80, 90, 100, 120]  # one target per matrix unit, and sm_120, whose machine code differs most from that of sm_80
AMD = [target for target in SHARED_MEMORY if isinstance(target, str)]
TILED = {"mask_attention_fwd_kernel", "mask_attention_bwd_kernel_dq", "mask_attention_bwd_kernel_dkv"}
ATTENTION = TILED | {"mask_attention_bwd_kernel_preprocess"}
PACKED = {"mask_attention_fwd_kernel_packed", "mask_attention_fwd_kernel_merge", "mask_attention_bwd_kernel_dq_packed"}
HELPERS = ("_preprocess", "_merge", "_stats")  # suffixes of kernels without a matmul


# The tiles were chosen for the machine code of Triton 3.7, which spills nothing. Bytes that other releases spill, measured:
KNOWN_SPILLS = {
    ("3.6", "mask_attention_bwd_kernel_dkv", 80): 8,
    ("3.6", "mask_attention_bwd_kernel_dkv", 120): 16,
    ("3.8", "mask_head_bwd_kernel_channels", 100): 16,
}


def check(target: int | str, name: str, needs: Resources) -> None:
    release = triton.__version__.rpartition(".")[0]
    assert needs.stack <= KNOWN_SPILLS.get((release, name.split()[0], target), 0), f"{target} {name} spills: {needs}"
    assert needs.stack or not (needs.instructions.get("STL") or needs.instructions.get("LDL")), f"{target} {name}: {needs}"
    assert needs.shared <= SHARED_MEMORY[target], f"{target} {name}: {needs}"
    assert needs.programs >= 1, f"{target} {name}: {needs}"


def check_attention(target: int | str, name: str, needs: Resources) -> None:
    """The matrix unit and the loads that the architecture has."""
    found = {instruction for instruction, count in needs.instructions.items() if count} - {"MUFU.EX2", "STL", "LDL"}
    expected = {90: {"HGMMA", "UTMALDG"}, 100: {"UTCHMMA", "UTMALDG"}, "gfx942": {"MFMA"}, "gfx950": {"MFMA"}}.get(target, {"HMMA"})
    assert found == expected, f"{target} {name}: {needs}"


@dataclass(frozen=True)
class Compiled:
    """A kernel with one of its configurations. Merge, preprocess and statistics come with the kernel after which they run."""

    name: str
    config: autotune.Config
    needs: Resources


def compiled(target: int | str, call: Callable[[], object], first: bool) -> list[Compiled]:
    """Send `call` through the launch path with every candidate of every kernel, or with the first of each."""
    found = []

    def choose(key, candidates, run):
        for config in candidates[: 1 if first else None]:
            with compiled_kernels() as kernels:
                run(config)
            found.extend(Compiled(name, config, resources(kernel)) for name, kernel in kernels.items())
        return candidates[0]

    with pytest.MonkeyPatch.context() as patch, dry_run(target):
        patch.setattr(autotune, "choose", choose)
        call()
    return found


def attention_call(dtype: torch.dtype, head_dim: int, mode: str) -> Callable[[], object]:
    """Forward and backward at the official size, whose rows see the bias as `mode` says."""
    inputs = attention_inputs(TokenLayout(10, 893, 5), head_dim=head_dim, dtype=dtype, packed=True)
    vectors = (None, None) if mode == "plain" else (inputs.query_gate, inputs.key_bias)
    args = AttentionArgs(inputs.q, inputs.k, inputs.v, *vectors, inputs.layout if mode == "packed" else None, 0.125)

    def call():
        out, lse = launch.forward(args)
        return launch.backward(args, out, lse, torch.empty_like(out), None)

    return call


def check_all_attention(target: int | str, dtype: torch.dtype, head_dim: int, mode: str, first: bool) -> None:
    found = compiled(target, attention_call(dtype, head_dim, mode), first)
    assert {kernel.name for kernel in found} >= TILED | (PACKED if mode == "packed" else set())
    for kernel in found:
        name, needs = f"{kernel.name} {dtype} D{head_dim} {mode} {kernel.config}", kernel.needs
        check(target, name, needs)
        if kernel.name.endswith(HELPERS):
            continue
        if dtype != torch.float32:
            check_attention(target, name, needs)
        with dry_run(target):
            estimate = tiles.resources(kernel.name.removeprefix("mask_attention_"), head_dim, dtype, kernel.config)
        assert needs.shared <= estimate.shared, f"{target} {name} asks for more than the estimate, {estimate.shared}: {needs}"


@pytest.mark.parametrize("target", EACH_UNIT)
def test_built_in_tiles(target):
    """The tiles that a user gets without tuning: bf16, head dim 64, a layout."""
    check_all_attention(target, torch.bfloat16, 64, "packed", first=True)


@pytest.mark.slow
@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("mode", ["packed", "checked", "plain"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_no_attention_kernel_spills(dtype, head_dim, mode, target):
    """All candidates; the first of each where another test sees nearly the same code: fp16 has bf16's, sm_86 and sm_89 have sm_80's."""
    check_all_attention(target, dtype, head_dim, mode, first=dtype == torch.float16 or target in (86, 89))


@pytest.mark.slow
@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_other_kernel_spills(dtype, target):
    """Mask head, QK-norm + RoPE at head dims 64 and 128, residual + norm at 1024 and 4096 channels: all candidates."""

    def estimate(name: str, config: autotune.Config, size: int) -> int:
        op = name.partition("_fwd_" if "_fwd_" in name else "_bwd_")[0]
        if op == "mask_head":
            return mask_head_launch.resources("bwd_kernel_channels" if "channels" in name else "rows", dtype, 256, config).shared
        return {"qk_norm_rope": qk_norm_rope_launch, "residual_norm": residual_norm_launch}[op].resources(size, config).shared

    for call, size in (
        (partial(mask_head_launch.example, dtype), 0),
        (partial(qk_norm_rope_launch.example, dtype, 64), 64),
        (partial(qk_norm_rope_launch.example, dtype, 128), 128),
        (partial(residual_norm_launch.example, dtype, 1024), 1024),
        (partial(residual_norm_launch.example, dtype, 4096), 4096),
    ):
        found = compiled(target, call, first=False)
        assert len(found) >= 2
        for kernel in found:
            check(target, kernel.name, kernel.needs)
            if not kernel.name.endswith(HELPERS):
                with dry_run(target):
                    limit = estimate(kernel.name, kernel.config, size)
                assert kernel.needs.shared <= limit, f"{target} {kernel} asks for more than the estimate, {limit}"


@pytest.mark.parametrize("target", GPUS + AMD)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_built_in_tiles_fit_by_the_estimate(dtype, head_dim, target):
    """Also on sm_86, sm_89 and sm_120, whose programs have 99 KB."""
    with dry_run(target):
        for kernel in ("fwd_kernel", "fwd_kernel_packed", "bwd_kernel_dq", "bwd_kernel_dq_packed", "bwd_kernel_dkv"):
            for mode in ("plain", "packed", "checked"):
                config = tiles.candidates(kernel, mode, head_dim, dtype)[0]
                needs = tiles.resources(kernel, head_dim, dtype, config)
                assert needs.fits(config), f"{kernel} {mode} {config}: {needs}"


@pytest.mark.slow
@pytest.mark.parametrize("target", AMD)
@pytest.mark.parametrize("mode", ["packed", "checked"])
@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 64), (torch.float32, 128)])
def test_amd_compiles_and_does_not_spill(dtype, head_dim, mode, target):
    """VGPRs and scratch memory of gfx942 and gfx950, which have no tf32: matmuls of fp32 are exact there. Nothing has run on them."""
    check_all_attention(target, dtype, head_dim, mode, first=True)


@pytest.mark.slow
@pytest.mark.parametrize("target", AMD)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_other_kernels_compile_for_amd(dtype, target):
    for example in (mask_head_launch.example, qk_norm_rope_launch.example, residual_norm_launch.example):
        for kernel in compiled(target, partial(example, dtype), first=True):
            check(target, kernel.name, kernel.needs)


def test_an_amd_gpu_is_named_by_its_architecture(monkeypatch):
    """Its name is no number. Where the kernels have not been compiled, the reason says so."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with dry_run("gfx942"):
        assert autotune.key("kernel", "D64") == "kernel gfx942 D64" and target.unavailable() == []
        assert target.precision(torch.float32) == target.precision(torch.bfloat16) == "ieee"
    with dry_run("gfx1100"):
        assert target.unavailable() == [
            "on AMD the Triton kernels have been compiled for gfx942 and gfx950 only (and run on neither), this is gfx1100"
        ]
    with dry_run(90):
        assert autotune.key("kernel", "D64") == "kernel sm_90 D64" and target.unavailable() == []


def test_plain_rows_of_sm_100_have_specialised_warps():
    """Twelve warps instead of four: some load and multiply, others compute the softmax."""
    with dry_run(100), compiled_kernels() as kernels:
        attention_call(torch.bfloat16, 64, "plain")()
    kernel = kernels["mask_attention_fwd_kernel"]
    assert kernel.metadata.num_warps == 12 and resources(kernel).stack == 0


def run(layout: TokenLayout, head_dim: int = 64, dtype: torch.dtype = torch.bfloat16):
    """Launches and compiled kernels of one forward and backward on views of a packed projection."""
    inputs = attention_inputs(layout, head_dim=head_dim, dtype=dtype, packed=True)
    with dry_run(90) as stand_in, compiled_kernels() as kernels:
        args = AttentionArgs(*inputs.tensors(), layout, 0.125)
        out, lse = launch.forward(args)
        launch.backward(args, out, lse, torch.zeros_like(out), None)
    return stand_in.launches, kernels


def test_grids():
    """Gated rows have launches of their own, 5 * 10 of them one tile, whose keys 8930 // 512 programs share; so do those of few tiles."""
    launches, _ = run(TokenLayout(10, 893, 5))
    assert launches == [
        Launch("mask_attention_fwd_kernel", (70 * 2, 1, 1)),
        Launch("mask_attention_fwd_kernel_packed", (1 * 2, 17, 1)),
        Launch("mask_attention_fwd_kernel_merge", (2 * 2, 1, 1)),
        Launch("mask_attention_bwd_kernel_preprocess", (140 * 2, 1, 1)),
        Launch("mask_attention_bwd_kernel_dq", (140 * 2, 1, 1)),
        Launch("mask_attention_bwd_kernel_dkv", (140 * 2, 1, 1)),
        Launch("mask_attention_bwd_kernel_dq_packed", (1 * 2, 17, 1)),
    ]
    launches, _ = run(TokenLayout(1, 1374, 5))
    assert launches[:4] == [
        Launch("mask_attention_fwd_kernel", (11 * 2, 2, 1)),
        Launch("mask_attention_fwd_kernel_merge", (43 * 2, 1, 1)),
        Launch("mask_attention_fwd_kernel_packed", (1 * 2, 2, 1)),
        Launch("mask_attention_fwd_kernel_merge", (1 * 2, 1, 1)),
    ]
    launches, _ = run(TokenLayout(2, 300, 0))
    assert not [launch for launch in launches if launch.kernel in PACKED]


@pytest.mark.parametrize("target", EACH_UNIT)
def test_gated_rows_cost_other_rows_nothing(target):
    """With a layout the contiguous rows run the machine code of a call without bias. dkv, which has both loops, has as many programs per
    multiprocessor as without the loop over packed rows."""
    found = []
    for promise in ("attention, layout", "attention, no bias"):
        with dry_run(target), compiled_kernels() as kernels:
            entry_points()[promise]()
        found.append(kernels)
    packed, plain = found
    for name in ("mask_attention_fwd_kernel", "mask_attention_bwd_kernel_dq"):
        assert packed[name] is plain[name]
    both_loops, one_loop = (resources(kernels["mask_attention_bwd_kernel_dkv"]) for kernels in found)
    assert both_loops.programs == one_loop.programs and not both_loops.stack and not one_loop.stack


def test_grids_of_the_other_ops():
    with dry_run(90) as stand_in:
        entry_points()["mask head, bf16"]()
        entry_points()["QK-norm + RoPE"]()
        entry_points()["residual + norm"]()
    assert [(x.kernel, x.grid) for x in stand_in.launches] == [
        ("mask_head_fwd_kernel_stats", (10, 32, 1)),
        ("mask_head_fwd_kernel", (28, 10, 1)),
        ("mask_head_fwd_kernel_stats", (10, 32, 1)),
        ("mask_head_bwd_kernel_hidden", (28, 10, 1)),
        ("mask_head_bwd_kernel_channels", (32, 16, 1)),
        ("qk_norm_rope_fwd_kernel", (280 * 16, 1, 1)),
        ("qk_norm_rope_bwd_kernel", (280 * 16, 1, 1)),
        ("residual_norm_fwd_kernel", (2233, 1, 1)),
        ("residual_norm_bwd_kernel", (447, 1, 1)),  # 5 tiles of 4 rows each
    ]


def test_lengths_are_compiled_once():
    """Another number of frames or tokens per frame is the same machine code: no key of a compiled kernel contains a length."""
    with dry_run(90), compiled_kernels() as first:
        forward_at(TokenLayout(3, 128, 5))
    for layout in (TokenLayout(3, 127, 5), TokenLayout(4, 160, 1), TokenLayout(7, 177, 5)):
        with dry_run(90), compiled_kernels() as kernels:
            forward_at(layout)
        assert all(kernels[name] is first[name] for name in first)


def forward_at(layout: TokenLayout) -> None:
    inputs = attention_inputs(layout, dtype=torch.bfloat16, packed=True, heads=16)
    launch.forward(AttentionArgs(*inputs.tensors(), layout, 0.125))


@pytest.mark.slow
@pytest.mark.parametrize(("head_dim", "dtype"), [(16, torch.float16), (40, torch.float32), (128, torch.float16)])
def test_other_head_dims_and_dtypes_compile(head_dim, dtype):
    _, kernels = run(TokenLayout(2, 300, 5), head_dim=head_dim, dtype=dtype)
    assert set(kernels) >= ATTENTION
    assert all(resources(kernel).shared <= SHARED_MEMORY[90] for kernel in kernels.values())


class TestAutotune:
    """Which configuration is taken, with a stand-in for the clock."""

    CANDIDATES = ({"BLOCK_N": 32, "num_warps": 4}, {"BLOCK_N": 64, "num_warps": 4}, {"BLOCK_N": 16, "num_warps": 2})

    @pytest.fixture(autouse=True)
    def clock(self, monkeypatch, tmp_path):
        """The second candidate is the fastest, the third does not run at all."""
        timed = []

        def time(name, run, config):
            timed.append(config)
            return [3.0, 2.0, float("inf")][self.CANDIDATES.index(config)]

        monkeypatch.setattr(autotune, "_time", time)
        monkeypatch.setattr(autotune, "_chosen", {})
        monkeypatch.setattr(autotune, "TABLES", tmp_path / "shipped")
        monkeypatch.setattr(autotune, "architecture", lambda: "sm_90")
        autotune._table.cache_clear()
        yield timed
        autotune._table.cache_clear()

    def choose(self, key="kernel sm_90 D64"):
        return autotune.choose(key, list(self.CANDIDATES), lambda config: None)

    def test_off_takes_the_built_in_choice(self, clock):
        assert self.choose() == self.CANDIDATES[0] and clock == []

    @pytest.mark.parametrize("mode", ["fast", "full"])
    def test_a_key_is_timed_once(self, mode, clock, monkeypatch):
        monkeypatch.setenv("PAGE4D_AUTOTUNE", mode)
        assert self.choose() == self.CANDIDATES[1] and len(clock) == 3
        assert self.choose() == self.CANDIDATES[1] and len(clock) == 3
        self.choose("another key")
        assert len(clock) == 6

    def test_what_was_timed_is_dumped_and_read_again(self, clock, monkeypatch, tmp_path):
        path = tmp_path / "new folder" / "mine.json"
        monkeypatch.setenv("PAGE4D_AUTOTUNE", "fast")
        monkeypatch.setenv("PAGE4D_AUTOTUNE_TABLE", str(path))
        self.choose()
        self.choose("another key")
        assert set(json.loads(path.read_text())) == {"kernel sm_90 D64", "another key"} and len(list(path.parent.iterdir())) == 1
        autotune._chosen.clear()
        assert self.choose() == self.CANDIDATES[1] and len(clock) == 6
        monkeypatch.setenv("PAGE4D_AUTOTUNE", "off")
        assert self.choose() == self.CANDIDATES[1] and len(clock) == 6

    def test_a_shipped_table_saves_the_timing(self, clock, monkeypatch, tmp_path):
        (tmp_path / "shipped").mkdir()
        (tmp_path / "shipped" / "sm_90.json").write_text(json.dumps({"kernel sm_90 D64": self.CANDIDATES[2]}))
        monkeypatch.setenv("PAGE4D_AUTOTUNE", "fast")
        assert self.choose() == self.CANDIDATES[2] and clock == []
        monkeypatch.setenv("PAGE4D_AUTOTUNE", "full")
        assert self.choose() == self.CANDIDATES[1] and len(clock) == 3

    @pytest.mark.parametrize("text", ["not json", "[1]", '{"key": {"BLOCK_N": "64"}}', '{"key": 3}'])
    def test_a_broken_table_is_named(self, text, monkeypatch, tmp_path):
        path = tmp_path / "broken.json"
        path.write_text(text)
        monkeypatch.setenv("PAGE4D_AUTOTUNE_TABLE", str(path))
        with pytest.raises(env.VariableError, match=r"broken\.json is not a table of tile sizes .*: repair it or delete it"):
            self.choose()

    def test_an_unknown_mode_is_named(self, monkeypatch):
        monkeypatch.setenv("PAGE4D_AUTOTUNE", "fats")
        with pytest.raises(env.VariableError, match="PAGE4D_AUTOTUNE='fats': choose one of off, fast, full"):
            self.choose()

    def test_pruning_keeps_what_fits(self):
        """The first is no exception. If nothing fits, the smallest is left."""

        def resources(config):
            return autotune.ResourceEstimate(config["BLOCK_N"] << 12, 0)

        for gpu, kept in ((80, [0, 2]), (120, [2]), ("gfx942", [2])):
            with dry_run(gpu):
                assert autotune.prune(list(self.CANDIDATES), resources) == [self.CANDIDATES[i] for i in kept]
                assert autotune.prune(list(self.CANDIDATES[:2]), resources) == [self.CANDIDATES[0]]
