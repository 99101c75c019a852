from __future__ import annotations

import os

import pytest
import torch

for _name in [name for name in os.environ if name.startswith("PAGE4D_")]:
    del os.environ[_name]  # the suite chooses backends itself
os.environ["PAGE4D_QUALIFY"] = "off"  # and neither reads the user's record nor writes one


def pytest_addoption(parser):
    parser.addoption("--full-fuzz", action="store_true", help="run tests/fuzz with all its cases: a minute")
    parser.addoption("--viewer-picture", metavar="PNG", help="where tests/viewer/test_browser.py puts its picture of the page")


def pytest_collection_modifyitems(config, items):
    """Deselect what needs CUDA where there is none."""
    if torch.cuda.is_available():
        return
    needs_cuda = [item for item in items if "gpu" in item.keywords]
    if needs_cuda:
        config.hook.pytest_deselected(items=needs_cuda)
        items[:] = [item for item in items if "gpu" not in item.keywords]


@pytest.fixture(autouse=True)
def same_numbers_every_run():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_empty(monkeypatch):
    """torch.empty and its relatives filled with NaN: reading what was never written shows."""

    def poison(function):
        def wrapper(*args, **kwargs):
            x = function(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() and x.device.type != "meta" else x

        return wrapper

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
