"""The host side of the Triton launches: on which device, with which queries and choices, and what is reused from call to call."""

from __future__ import annotations

import importlib
import os

import pytest
import torch

from page4d_kernels import TokenLayout, registries
from page4d_kernels.backends.mask_attention.problem import AttentionArgs
from page4d_kernels.testing import attention_inputs

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter and the compiler cannot share a process", allow_module_level=True)

from page4d_kernels.triton.dryrun import DryRunDriver, dry_run

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
        assert [launch.kernel for launch in stand_in.launches] == ["mask_attention_fwd_kernel"]
        assert set(devices.seen) == {1} and devices.current == 0
