from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from page4d.layers import Linear

X86 = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")


class Calls(TorchDispatchMode):
    """Names of the operators that run, with those that copy."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__.split(".")[0])
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(not X86, reason="needs oneDNN on x86")
@pytest.mark.parametrize("shape", [(130,), (2, 65), (3, 2, 43)])
def test_large_products_are_convolutions(shape):
    layer = Linear(384, 400)
    x = torch.randn(*shape, 384)
    with torch.no_grad(), Calls() as calls:
        found = layer(x)
    assert "convolution" in calls.names and not {"clone", "copy_", "contiguous", "_to_copy"} & set(calls.names)
    assert found.is_contiguous() and found.shape == (*shape, 400)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    assert (found - exact).abs().max() <= 2 * (F.linear(x, layer.weight, layer.bias) - exact).abs().max()
    with torch.no_grad():
        torch.testing.assert_close(layer(x.transpose(0, -2).contiguous().transpose(0, -2)), found)


@pytest.mark.parametrize("case", ["gradients", "few rows", "narrow", "half precision", "autocast"])
def test_other_products_are_linear(case):
    layer, x = Linear(384, 400), torch.randn(130, 384)
    if case == "few rows":
        x = x[:100]
    if case == "narrow":
        layer = Linear(384, 100)
    if case == "half precision":
        layer, x = layer.bfloat16(), x.bfloat16()
    with torch.set_grad_enabled(case == "gradients"), torch.autocast("cpu", enabled=case == "autocast"), Calls() as calls:
        layer(x)
    assert "convolution" not in calls.names
