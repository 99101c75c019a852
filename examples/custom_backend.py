"""An attention backend of your own: register it, use it, and see the error when it cannot serve a call.

    python examples/custom_backend.py

The same works for the other ops: register_backend(..., op="mask_head"), for example.
"""

import torch

from page4d_kernels import Backend, BackendError, TokenLayout, mask_attention, register_backend, use_backend

torch.manual_seed(0)


def forward(args):
    """Compute all N x N logits. Without a `backward`, a forward must be differentiable PyTorch and return the output alone."""
    logits = args.q @ args.k.transpose(-1, -2) * args.scale
    if args.query_gate is not None:
        logits = logits + args.query_gate[:, None, :, None] * args.key_bias[:, None, None, :]
    return logits.softmax(-1) @ args.v


def unsupported(problem) -> list[str]:
    """All reasons why it cannot serve this call, in words. An empty list means that it can."""
    return [f"its logits take N x N memory: at most 1000 keys, not {problem.keys}"] if problem.keys > 1000 else []


register_backend(Backend("mine", "plain PyTorch with all logits", forward, unsupported=unsupported))

layout = TokenLayout(frames=2, tokens_per_frame=53, special_tokens=5)
q, k, v = torch.randn(3, 1, 4, layout.tokens, 64)
gate = layout.only_special(torch.full((1, layout.tokens), 64.0))
bias = torch.rand(1, layout.tokens) - 0.5
with use_backend("mine"):  # every call in the block, for example in the trunk of a model
    out = mask_attention(q, k, v, gate, bias, layout=layout)
expected = mask_attention(q, k, v, gate, bias, layout=layout, backend="reference")  # this call names another
error = float((out - expected).abs().max())
print(f"differs from the reference by at most {error:.1e}")
assert error < 1e-4

try:
    mask_attention(*torch.randn(3, 1, 1, 2000, 64), backend="mine")
except BackendError as refusal:
    print(refusal)
