"""The choice of a backend: who decides, what is refused and in which words."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from page4d_kernels import (
    Backend,
    BackendError,
    TokenLayout,
    env,
    is_backend_supported,
    mask_attention,
    register_backend,
    registries,
    use_backend,
)
from page4d_kernels.backends.mask_attention import BACKENDS, flash, reference, xformers
from page4d_kernels.backends.mask_attention.problem import AttentionArgs, AttentionProblem, _import_error
from page4d_kernels.backends.registry import Registry
from page4d_kernels.info import report
from page4d_kernels.ops.mask_attention import describe
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
    registry = Registry("test_op", "PAGE4D_ATTN", order=("broken", "works"), safe=("works",), typical=print)
    registry.register(Backend("broken", "", print, unavailable=lambda: ["it is broken"]))
    registry.register(Backend("works", "", print))
    with caplog.at_level(logging.INFO, "page4d_kernels"):
        for _ in range(3):
            assert registry.choose(PROBLEM).name == "works"
    assert [record.message for record in caplog.records] == ["test_op: auto takes works (not broken: it is broken)"]
    with pytest.raises(ValueError, match="already"):
        registry.register(Backend("works", "", print))


def test_no_backend_at_all():
    registry = Registry("test_op", "PAGE4D_ATTN", order=("broken",), safe=("broken",), typical=print)
    registry.register(Backend("broken", "", print, unavailable=lambda: ["it is broken"]))
    with pytest.raises(BackendError, match="no backend can serve this: broken: it is broken"):
        registry.choose(PROBLEM)


def test_a_backend_registered_from_outside_serves_by_name_alone(monkeypatch):
    monkeypatch.setattr(BACKENDS, "_backends", dict(BACKENDS._backends))
    inputs = attention_inputs(TokenLayout(2, 20, 5))

    def forward(args):
        return reference.BACKEND.forward(args)[0]

    register_backend(
        Backend("mine", "a backend of a user", forward, unsupported=lambda problem: [] if problem.keys < 100 else ["too long"])
    )
    assert torch.equal(inputs.attend("mine"), inputs.attend("reference")) and "mine" not in BACKENDS.order
    with use_backend("mine"):
        assert BACKENDS.requested() == "mine"
    with pytest.raises(BackendError, match="backend 'mine' cannot serve this: too long"):
        attention_inputs(TokenLayout(2, 60, 5)).attend("mine")
    with pytest.raises(ValueError, match="mask_attention already has a backend named 'mine'"):
        register_backend(Backend("mine", "", forward))
    with pytest.raises(BackendError, match="unknown op 'attention'"):
        register_backend(Backend("mine", "", forward), op="attention")


def serves(args):
    return args.q


@pytest.mark.parametrize(
    "backend",
    [
        Backend("auto", "auto stays what it is", serves),
        Backend("", "no name", serves),
        Backend("my backend, x", "no word", serves),
        Backend(3, "a number", serves),
        Backend("mine", "no function", None),
        Backend("mine", "no function", serves, unsupported=["a reason"]),
        "mine",
        None,
        Backend,
    ],
    ids=["auto", "no name", "no word", "a number", "no function", "no function of reasons", "a string", "nothing", "a class"],
)
def test_a_backend_that_could_not_be_chosen_or_called_is_not_registered(backend):
    before = list(registries()["mask_attention"])
    with pytest.raises(ValueError, match="backend"):
        register_backend(backend)
    assert list(registries()["mask_attention"]) == before


def test_a_faulty_backend_does_no_harm_to_others(monkeypatch):
    registry = registries()["mask_attention"]
    monkeypatch.setattr(registry, "_backends", dict(registry._backends))

    def fails(*problem):
        raise ZeroDivisionError("boom")

    register_backend(Backend("raises", "its check fails", serves, unsupported=fails))
    register_backend(Backend("text", "its check returns no list", serves, unavailable=lambda: "not today"))
    register_backend(Backend("shape", "returns another shape", lambda args: args.q[..., :1]))
    x = torch.zeros(1, 1, 4, 8)
    with pytest.raises(BackendError, match="backend 'raises' cannot serve this: its own check failed with ZeroDivisionError: boom"):
        mask_attention(x, x, x, backend="raises")
    with pytest.raises(BackendError, match="returned 'not today' instead of a list of reasons"):
        mask_attention(x, x, x, backend="text")
    with pytest.raises(BackendError, match=r"backend 'shape' returned \(1, 1, 4, 1\) float32 on cpu instead of \(1, 1, 4, 8\) float32"):
        mask_attention(x, x, x, backend="shape")
    with pytest.raises(BackendError, match="unknown backend"):
        mask_attention(x, x, x, backend="nosuch")
    assert "boom" in report() and mask_attention(x, x, x, backend="reference").shape == x.shape


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
    assert adapter._unavailable() == []
    inputs = attention_inputs(TokenLayout(3, 20, 5), batch=2, heads=3, packed=True)
    out = adapter.BACKEND.forward(AttentionArgs(*inputs.tensors(), inputs.layout, 0.3))
    expected = mask_attention(inputs.q, inputs.k, inputs.v, inputs.query_gate, inputs.key_bias, scale=0.3, backend="reference")
    assert torch.allclose(out, expected, atol=1e-5)
    assert any("runs on cuda" in reason for reason in BACKENDS.reasons(adapter.BACKEND.name, PROBLEM))


@pytest.mark.slow
def test_package_adapters_compile(adapter):
    inputs = attention_inputs(TokenLayout(3, 20, 5), batch=2, heads=3)

    def attend(*tensors):
        assert not adapter._unavailable()  # traced as a constant
        return adapter.BACKEND.forward(AttentionArgs(*tensors, inputs.layout, 0.3))

    out = torch.compile(attend, fullgraph=True)(*inputs.tensors())
    assert torch.allclose(out, attend(*inputs.tensors()), atol=1e-5)


@pytest.mark.parametrize("op", ["mask_attention", "mask_head", "qk_norm_rope"])
def test_the_cuda_backends_say_what_is_missing(op, monkeypatch):
    from page4d_kernels import native

    registry, function = registries()[op], f"{op}_cuda"
    without = types.ModuleType("_native")
    monkeypatch.setattr(native, "_load", lambda: (without, ""))
    monkeypatch.setattr(native, "build_record", lambda: {"built": True, "left_out": ["cuda: PAGE4D_BUILD_CUDA=0"]})
    assert registry.get("cuda").unavailable() == [f"the compiled library: it was built without {function}: PAGE4D_BUILD_CUDA=0"]
    setattr(without, function, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert registry.get("cuda").unavailable() == ["there is no CUDA device"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert registry.get("cuda").unavailable() == []
    assert "cuda" not in registry.order  # until it has run on a GPU


def test_the_cuda_backends_say_unsupported(monkeypatch):
    from page4d_kernels.backends.mask_attention import cuda as attention
    from page4d_kernels.backends.mask_head import cuda as head
    from page4d_kernels.backends.mask_head.problem import MaskHeadProblem
    from page4d_kernels.backends.qk_norm_rope import cuda as rope
    from page4d_kernels.backends.qk_norm_rope.problem import QkNormRopeProblem

    assert rope.BACKEND.unsupported(QkNormRopeProblem("cpu", torch.float64, 1, 17, 2, 48, (3, 4), 5)) == [
        "it runs on cuda, the tensors are on cpu",
        "it takes float32, float16 and bfloat16, not float64",
        "it takes head dims 32, 64, 128, not 48",
    ]
    assert head.BACKEND.unsupported(MaskHeadProblem("cuda", torch.float32, 1, 70000, (3, 301), 5, 24, 257)) == [
        "its hidden layer goes up to 256, not 257",
        "its grids are up to 300 patches wide, not 301",
        "it takes up to 65535 frames, not 70000",
    ]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    layout = TokenLayout(1, 200, 129)
    assert attention.BACKEND.unsupported(AttentionProblem("cuda", torch.float32, 1, 2, 200, 200, 96, layout=layout, aligned=False)) == [
        "it takes float16 and bfloat16, not float32",
        "it is for Hopper (sm_90), this GPU is sm_80: triton serves the rest",
        "it takes head dims 64 and 128, not 96",
        "q, k and v must step by multiples of 16 bytes",
        "it takes at most 128 special tokens in a frame, not 129",
    ]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert attention.BACKEND.unsupported(AttentionProblem("cuda", torch.bfloat16, 1, 2, 200, 200, 64)) == []


def test_alignment_is_seen_in_strides():
    qkv = torch.empty(1, 20, 3, 2, 64, dtype=torch.bfloat16).permute(2, 0, 3, 1, 4)
    assert describe(*qkv).aligned
    odd = torch.empty(1, 2, 19, 68, dtype=torch.bfloat16)
    assert not describe(odd[..., :64], *qkv[1:]).aligned and not describe(*qkv[:2], odd[..., :64]).aligned
    assert describe(*(odd[:, :, :1, :64] for _ in range(3))).aligned is False  # heads step by 19 * 68
    assert describe(*(odd[:, :1, :1, :64] for _ in range(3))).aligned  # nothing steps


@pytest.mark.parametrize("compiled", [False, True])
def test_no_attention_backend_sees_an_odd_address(monkeypatch, compiled):
    """Kernels load 16 bytes at once. Of torch's own and of other packages, not all check the address."""
    seen: list[torch.Tensor] = []
    right = BACKENDS.get("chunked")

    def forward(args):
        seen.extend(args[:3])
        return right.forward(args)

    def backward(args, out, lse, d_out, d_lse):
        seen.extend((*args[:3], d_out))
        return right.backward(args, out, lse, d_out, d_lse)

    watch = dataclasses.replace(right, name="watch", forward=forward, backward=backward)
    monkeypatch.setattr(BACKENDS, "_backends", BACKENDS._backends | {"watch": watch})

    def attend(q, k, v):
        return mask_attention(q[1:].view(1, 1, 10, 64), k[1:].view(1, 1, 10, 64), v, layout=None, backend="watch")

    if compiled:
        attend = torch.compile(attend, backend="aot_eager")
    memory = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 641), dtype=np.float32))
    q, k = (x.clone().requires_grad_() for x in memory[:2])
    v = torch.from_numpy(memory[2].numpy()[1:]).view(1, 1, 10, 64)  # its storage begins there
    assert v.data_ptr() % 16 and v.storage_offset() == 0
    out = attend(q, k, v)
    out.backward(memory[3, 1:].view(1, 1, 10, 64))
    assert len(seen) == 7 and all(x.data_ptr() % 16 == 0 for x in seen)
    assert q.grad[1:].abs().sum() > 0 and q.grad[0] == 0
    expected = mask_attention(q[1:].view(1, 1, 10, 64), k[1:].view(1, 1, 10, 64), v, layout=None, backend="chunked")
    assert torch.equal(out, expected)


def test_nothing_is_copied_without_need(monkeypatch):
    seen: list[AttentionArgs] = []
    other = Backend("watch", "", lambda args: seen.append(args) or args.q.clone())
    monkeypatch.setattr(BACKENDS, "_backends", BACKENDS._backends | {"watch": other})
    q, k, v = torch.randn(3, 1, 1, 10, 64)
    mask_attention(q, k, v, layout=None, backend="watch")
    odd = torch.randn(641)[1:].view(1, 1, 10, 64)
    mask_attention(odd, k, v, layout=None, backend="watch")
    assert seen[0].q.data_ptr() == q.data_ptr() and seen[1].q.data_ptr() % 16 == 0
