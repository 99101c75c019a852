"""The choice of a backend: who decides, what is refused and in which words."""

from __future__ import annotations

import logging
import subprocess
import sys
import types

import pytest
import torch

from page4d_kernels import BackendError, TokenLayout, env, is_backend_supported, mask_attention, registries, use_backend
from page4d_kernels.backends.mask_attention import BACKENDS, flash, xformers
from page4d_kernels.backends.mask_attention.problem import AttentionProblem, _import_error
from page4d_kernels.backends.registry import Backend, Registry
from page4d_kernels.testing import attention_inputs

PROBLEM = AttentionProblem("cpu", torch.float32, 1, 2, 10, 10, 64)


def test_argument_beats_context_beats_environment_beats_auto(monkeypatch):
    assert BACKENDS.choose(PROBLEM).name == "sdpa"
    monkeypatch.setenv("PAGE4D_ATTN", "reference")
    assert BACKENDS.choose(PROBLEM).name == "reference"
    with use_backend("chunked"):
        assert BACKENDS.choose(PROBLEM).name == "chunked"
        assert BACKENDS.choose(PROBLEM, "sdpa_augmented").name == "sdpa_augmented"
        with use_backend("auto"):
            assert BACKENDS.choose(PROBLEM).name == "sdpa"
        assert BACKENDS.choose(PROBLEM).name == "chunked"
    assert BACKENDS.choose(PROBLEM).name == "reference"


@pytest.mark.parametrize("how", ["argument", "environment", "context"])
def test_unknown_backend(how, monkeypatch):
    with pytest.raises(BackendError, match=r"unknown backend 'tritn' for mask_attention: choose one of auto, reference, .*sdpa") as error:
        if how == "argument":
            BACKENDS.choose(PROBLEM, "tritn")
        elif how == "environment":
            monkeypatch.setenv("PAGE4D_ATTN", "tritn")
            BACKENDS.choose(PROBLEM)
        else:
            with use_backend("tritn"):
                pass
    assert "\n" not in str(error.value)


def test_blocks_of_two_threads_may_cross():
    first, second = use_backend("reference"), use_backend("chunked")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert BACKENDS.choose(PROBLEM).name == "chunked"
    second.__exit__(None, None, None)
    assert BACKENDS.choose(PROBLEM).name == "sdpa"


def test_a_bad_variable_names_itself(monkeypatch):
    monkeypatch.setenv("PAGE4D_ATTN", "flsh")
    with pytest.raises(BackendError, match="PAGE4D_ATTN: unknown backend 'flsh'"):
        BACKENDS.choose(PROBLEM)
    monkeypatch.setenv("PAGE4D_DEBUG", "maybe")
    with pytest.raises(env.VariableError, match="PAGE4D_DEBUG='maybe' is not a switch"):
        env.flag("PAGE4D_DEBUG")


def test_unknown_op():
    with pytest.raises(BackendError, match="unknown op"), use_backend("reference", op="attention"):
        pass


def test_explicit_choice_never_falls_back():
    inputs = attention_inputs(TokenLayout(1, 4, 1))
    with pytest.raises(BackendError, match=r"'sdpa' cannot serve .* log-sum-exp \(backends that could: .*chunked"):
        mask_attention(inputs.q, inputs.k, inputs.v, backend="sdpa", return_lse=True)
    out, lse = mask_attention(inputs.q, inputs.k, inputs.v, return_lse=True)  # auto goes on to the next
    assert out.shape == inputs.q.shape and lse.shape == inputs.q.shape[:-1]


def test_reasons_in_words():
    half = AttentionProblem("cuda", torch.float64, 1, 2, 10, 10, 60)
    reasons = BACKENDS.reasons("sdpa", half)
    assert len(reasons) == 1 and "float64" in reasons[0]
    assert is_backend_supported("sdpa", PROBLEM) and not is_backend_supported("sdpa", half)
    assert "multiple of 8" in BACKENDS.reasons("sdpa_augmented", half)[0]


def test_auto_logs_its_choice_once(caplog):
    registry = Registry("test_op", "PAGE4D_ATTN", order=("broken", "works"))
    registry.register(Backend("broken", "", print, missing=lambda: ["it is broken"]))
    registry.register(Backend("works", "", print))
    with caplog.at_level(logging.INFO, "page4d_kernels"):
        for _ in range(3):
            assert registry.choose(None).name == "works"
    assert [record.message for record in caplog.records] == ["test_op: auto takes works (not broken: it is broken)"]
    with pytest.raises(ValueError, match="already"):
        registry.register(Backend("works", "", print))


def test_no_backend_at_all():
    registry = Registry("test_op", "PAGE4D_ATTN", order=("broken",))
    registry.register(Backend("broken", "", print, missing=lambda: ["it is broken"]))
    with pytest.raises(BackendError, match="no backend can serve this: broken: it is broken"):
        registry.choose(None)


def test_info_lists_every_backend_of_every_op():
    result = subprocess.run([sys.executable, "-m", "page4d_kernels.info"], capture_output=True, text=True, check=True)
    for op, registry in registries().items():
        assert op in result.stdout and registry.variable in result.stdout
        for backend in registry:
            assert backend.name in result.stdout
    assert "no flash-attn package could be imported" in result.stdout
    assert "PAGE4D_NVTX" in result.stdout


@pytest.fixture(params=["flash", "xformers"])
def adapter(request, monkeypatch):
    """A backend with a stand-in for its package: these need a GPU, what the adapters do around them does not."""
    if request.param == "flash":
        module, adapter = types.ModuleType("flash_attn"), flash
        module.flash_attn_func = fake_flash
        monkeypatch.setitem(sys.modules, "flash_attn", module)
    else:
        module, adapter = types.ModuleType("xformers.ops"), xformers
        module.memory_efficient_attention = fake_xformers
        monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
        monkeypatch.setitem(sys.modules, "xformers.ops", module)
    _import_error.cache_clear()
    yield adapter
    _import_error.cache_clear()


def fake_flash(q, k, v, softmax_scale, deterministic=False):
    assert deterministic
    x = (t.transpose(1, 2) for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*x, scale=softmax_scale).transpose(1, 2)


def fake_xformers(q, k, v, scale):
    return fake_flash(q, k, v, scale, True)


def test_package_adapters_keep_layout_scale_and_bias(adapter):
    assert adapter._missing() == []
    inputs = attention_inputs(TokenLayout(3, 20, 5), batch=2, heads=3, packed=True)
    out = adapter._forward(*inputs.tensors(), inputs.layout, 0.3)
    expected = mask_attention(inputs.q, inputs.k, inputs.v, inputs.query_gate, inputs.key_bias, scale=0.3, backend="reference")
    assert torch.allclose(out, expected, atol=1e-5)
    assert any("runs on cuda" in reason for reason in BACKENDS.reasons(adapter.BACKEND.name, PROBLEM))


@pytest.mark.slow
def test_package_adapters_compile(adapter):
    inputs = attention_inputs(TokenLayout(3, 20, 5), batch=2, heads=3)

    def attend(*tensors):
        assert not adapter._missing()  # traced as a constant
        return adapter._forward(*tensors, inputs.layout, 0.3)

    out = torch.compile(attend, fullgraph=True)(*inputs.tensors())
    assert torch.allclose(out, attend(*inputs.tensors()), atol=1e-5)


def test_the_cuda_backend_says_why_not(monkeypatch):
    from types import SimpleNamespace

    from page4d_kernels import native
    from page4d_kernels.backends.qk_norm_rope import BACKENDS, cuda
    from page4d_kernels.backends.qk_norm_rope.problem import QkNormRopeProblem

    without = SimpleNamespace(interface=native.INTERFACE)
    monkeypatch.setattr(native, "_load", lambda: (without, ""))
    monkeypatch.setattr(native, "build_record", lambda: {"built": True, "left_out": ["cuda: PAGE4D_BUILD_CUDA=0"]})
    assert BACKENDS.get("cuda").missing() == ["the compiled library: it was built without CUDA: PAGE4D_BUILD_CUDA=0"]
    without.qk_norm_rope_cuda = None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert BACKENDS.get("cuda").missing() == ["there is no CUDA device"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert BACKENDS.get("cuda").missing() == []
    problem = QkNormRopeProblem("cpu", torch.float64, 1, 17, 2, 48, (3, 4), 5)
    assert cuda.BACKEND.why_not(problem) == [
        "it runs on cuda, the tensors are on cpu",
        "it takes float32, float16 and bfloat16, not float64",
        "it takes head dims 32, 64, 128, not 48",
    ]
    assert "cuda" not in BACKENDS.order  # until it has run on a GPU
