"""Backends and devices of the shared suites.

A test with the arguments `backend` and `device` runs for every pair that can exist. A test with `backend` alone runs on that backend's
default device, a test with `device` alone on both. The names of the backends are the module's NAMES. Tests that need CUDA get the marker
`gpu`.
"""

from __future__ import annotations

import pytest

from page4d_kernels.qualify import record
from page4d_kernels.testing import default_device, devices_of


def pytest_generate_tests(metafunc):
    names = getattr(metafunc.module, "NAMES", None)
    given = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    wanted = {name for name in ("backend", "device") if name in metafunc.fixturenames and not any(name in names_of for names_of in given)}
    if names is None or not wanted:
        return
    if wanted == {"backend", "device"}:
        metafunc.parametrize(("backend", "device"), [(name, device) for name in names for device in devices_of(name)])
    elif wanted == {"backend"}:
        metafunc.parametrize("backend", names)
    else:
        metafunc.parametrize("device", ["cpu", "cuda"])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        backend = params.get("backend")
        home = default_device(backend) if isinstance(backend, str) else "cpu"
        if params.get("device", home) == "cuda":
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache folder, and a library that follows its record."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PAGE4D_QUALIFY", "auto")
    monkeypatch.setattr(record, "_asides", {})
    record.forget()
    yield tmp_path
    record.forget()
