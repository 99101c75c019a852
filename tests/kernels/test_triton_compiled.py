"""The Triton kernels compiled for GPUs that are not here, through the real launch path: gates on what the machine code needs."""

from __future__ import annotations

import json
import os

import pytest
import torch

from page4d_kernels import TokenLayout, env
from page4d_kernels.backends.mask_attention.problem import AttentionArgs
from page4d_kernels.testing import attention_inputs

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter and the compiler cannot share a process", allow_module_level=True)

import triton

from page4d_kernels.triton import autotune
from page4d_kernels.triton import mask_attention_launch as launch
from page4d_kernels.triton.dryrun import SHARED_MEMORY, Launch, Resources, compiled_kernels, dry_run, entry_points, resources

CAPABILITIES = list(SHARED_MEMORY)
ATTENTION = {
    "mask_attention_fwd_kernel",
    "mask_attention_bwd_kernel_preprocess",
    "mask_attention_bwd_kernel_dq",
    "mask_attention_bwd_kernel_dkv",
}
PACKED = {"mask_attention_fwd_kernel_packed", "mask_attention_fwd_kernel_merge", "mask_attention_bwd_kernel_dq_packed"}
HELPERS = ("_preprocess", "_merge", "_stats")  # suffixes of kernels without a matmul


# The tiles were chosen for the machine code of Triton 3.6 and 3.7, which spills nothing. Bytes that later releases spill, measured:
KNOWN_SPILLS = {("3.8", "mask head, fp32", 100): 16}


def spill_limit(op: str, capability: int) -> int:
    return KNOWN_SPILLS.get((triton.__version__.rpartition(".")[0], op, capability), 0)


def check(capability: int, name: str, needs: Resources, spill_limit: int = 0) -> None:
    assert needs.stack <= spill_limit, f"sm_{capability} {name} spills: {needs}"
    assert needs.stack or not (needs.instructions["STL"] or needs.instructions["LDL"]), f"sm_{capability} {name}: {needs}"
    assert needs.shared <= SHARED_MEMORY[capability], f"sm_{capability} {name}: {needs}"


def check_attention(capability: int, name: str, needs: Resources) -> None:
    """The matrix unit and the loads that the architecture has."""
    found = {instruction for instruction in ("HMMA", "HGMMA", "UTMALDG") if needs.instructions[instruction]}
    expected = {90: {"HGMMA", "UTMALDG"}, 100: {"UTMALDG"}, 120: {"HMMA", "UTMALDG"}}.get(capability, {"HMMA"})
    assert found == expected, f"sm_{capability} {name}: {needs}"


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("op", ["attention, layout", "mask head, bf16", "mask head, fp32", "QK-norm + RoPE", "residual + norm"])
def test_every_configuration(op, capability, monkeypatch):
    """Every candidate of every kernel goes through the launch path and the compiler, and none spills."""
    compiled = []

    def all_candidates(key, candidates, run):
        for config in candidates:
            with compiled_kernels() as kernels:
                run(config)
            compiled.extend((name, config, kernel) for name, kernel in kernels.items())
        return candidates[0]

    monkeypatch.setattr(autotune, "choose", all_candidates)
    with dry_run(capability):
        entry_points()[op]()
    assert len(compiled) >= 4
    for name, config, kernel in compiled:
        needs = resources(kernel)
        check(capability, f"{op} {name} {config}", needs, spill_limit(op, capability))
        if op.startswith("attention"):
            check_attention(capability, f"{name} {config}", needs)


@pytest.mark.slow
@pytest.mark.parametrize("op", ["attention, no layout", "attention, no bias"])
def test_other_ways_to_meet_the_bias(op):
    with dry_run(90), compiled_kernels() as kernels:
        entry_points()[op]()
    assert set(kernels) == ATTENTION
    for name, kernel in kernels.items():
        check(90, name, resources(kernel))
        if not name.endswith(HELPERS):
            check_attention(90, name, resources(kernel))


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


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_gated_rows_cost_other_rows_nothing(capability):
    """With a layout the contiguous rows run the machine code of a call without bias; dkv, which has both loops, needs no more registers
    than keep its number of programs per multiprocessor."""
    found = []
    for promise in ("attention, layout", "attention, no bias"):
        with dry_run(capability), compiled_kernels() as kernels:
            entry_points()[promise]()
        found.append(kernels)
    packed, plain = found
    for name in ("mask_attention_fwd_kernel", "mask_attention_bwd_kernel_dq"):
        assert packed[name] is plain[name]
    with_rows, without = (resources(kernels["mask_attention_bwd_kernel_dkv"]) for kernels in found)
    assert with_rows.registers <= without.registers or with_rows.programs == without.programs


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
        monkeypatch.setattr(autotune, "capability", lambda: 90)
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

    def test_pruning_keeps_the_first_and_what_fits(self):
        with dry_run(80):
            kept = autotune.prune(list(self.CANDIDATES), lambda config: autotune.ResourceEstimate(config["BLOCK_N"] << 12, 0))
        assert kept == [self.CANDIDATES[0], self.CANDIDATES[2]]
