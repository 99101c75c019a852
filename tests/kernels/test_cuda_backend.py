"""What the CUDA backends do in Python before the library is called. Needs no GPU."""

from __future__ import annotations

import pytest
import torch

from page4d_kernels import native
from page4d_kernels.backends.mask_attention.cuda import VARIANT, unexpanded
from page4d_kernels.backends.mask_head import cuda as head
from page4d_kernels.backends.mask_head.problem import MaskHeadProblem


def test_only_expanded_tensors_are_copied():
    """A tensor map with stride 0 is not documented. A copy of anything else would cost memory and time that nobody asked for."""
    one = torch.randn(1, 1, 9, 64)
    for shape in ((1, 4, 9, 64), (3, 1, 9, 64)):
        expanded = one.expand(shape)
        copy = unexpanded(expanded)
        assert torch.equal(copy, expanded) and min(copy.stride()) > 0
    row = torch.randn(2, 4, 1, 64).expand(2, 4, 9, 64)
    assert torch.equal(unexpanded(row), row) and min(unexpanded(row).stride()) > 0
    packed = torch.randn(2, 9, 3, 4, 64).permute(2, 0, 3, 1, 4)[1]
    for view in (one, one.expand(1, 1, 9, 64), packed):
        assert unexpanded(view) is view


def test_mask_head_needs_the_shared_memory_of_the_device(monkeypatch):
    def reasons(hidden: int, width: int) -> list[str]:
        return head.BACKEND.unsupported(MaskHeadProblem("cuda", torch.float32, 1, 2, (3, width), 5, 24, hidden))

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    available = 99 * 1024  # sm_86, sm_89
    monkeypatch.setattr(native, "mask_head_shared_memory", lambda hidden, width, device: (80_000 + hidden * width, available))
    assert reasons(64, 94) == []
    assert reasons(256, 94) == ["256 hidden units and 94 patches in a row need 101.6 KiB of shared memory per block, this GPU has 99.0"]


@pytest.mark.skipif(bool(native.why_no_cuda("mask_attention_cuda")), reason="needs the CUDA kernels")
def test_variants_of_the_attention_kernel():
    library = native.library()
    assert library.mask_attention_cuda_variants[VARIANT] == (8, 8.0)  # polynomial_every, rescale_past
    q = torch.zeros(1, 1, 8, 64, dtype=torch.bfloat16)
    addresses = (q.data_ptr(),) * 3 + (0, 0) + (q.data_ptr(),) * 2
    missing = len(library.mask_attention_cuda_variants)
    with pytest.raises(ValueError, match="the kernel has no such variant"):
        library.mask_attention_cuda(
            addresses, (1, 1, 8, 8, 64), [q.stride()[:3]] * 4, 0, 0, 1.0, (0, 0, 0), missing, 1, [0, 0], native.DTYPES[q.dtype], 0, 0
        )
