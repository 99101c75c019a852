"""Backends and devices of the shared suites.

A test with the arguments `backend` and `device` runs for every pair that can exist. A test with `backend` alone runs on that backend's
default device. The names of the backends are the module's NAMES. Tests that need CUDA get the marker `gpu`.
"""

from __future__ import annotations

import pytest

from page4d_kernels.testing import default_device, devices_of


def pytest_generate_tests(metafunc):
    names = getattr(metafunc.module, "NAMES", None)
    chosen = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if names is None or "backend" not in metafunc.fixturenames or any("backend" in names_of for names_of in chosen):
        return
    if "device" in metafunc.fixturenames:
        metafunc.parametrize(("backend", "device"), [(name, device) for name in names for device in devices_of(name)])
    else:
        metafunc.parametrize("backend", names)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        backend = params.get("backend")
        home = default_device(backend) if isinstance(backend, str) else "cpu"
        if params.get("device", home) == "cuda":
            item.add_marker(pytest.mark.gpu)
