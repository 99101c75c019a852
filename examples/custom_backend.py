"""An attention backend of your own: register it, use it, and see what it says when it cannot serve.

python examples/custom_backend.py
"""

import torch

from page4d_kernels import Backend, BackendError, TokenLayout, mask_attention, register_backend, use_backend


def forward(args):
    """The N x N logits, in plain PyTorch. Without a `backward` it must be differentiable PyTorch, and returns the output alone."""
    q, k, v, gate, bias, _, scale = args
    logits = q @ k.transpose(-1, -2) * scale
    if gate is not None:
        logits = logits + gate[:, None, :, None] * bias[:, None, None, :]
    return logits.softmax(-1) @ v


def unsupported(problem) -> list[str]:
    """All reasons in words. An empty list means that it can serve."""
    return [f"its logits take N x N memory: at most 1000 keys, not {problem.keys}"] if problem.keys > 1000 else []


register_backend(Backend("mine", "plain PyTorch with all logits", forward, unsupported=unsupported))

layout = TokenLayout(frames=2, tokens_per_frame=53, special_tokens=5)
q, k, v = torch.randn(3, 1, 4, layout.tokens, 64)
gate = layout.only_special(torch.full((1, layout.tokens), 64.0))
bias = torch.rand(1, layout.tokens) - 0.5
with use_backend("mine"):
    out = mask_attention(q, k, v, gate, bias, layout=layout)
expected = mask_attention(q, k, v, gate, bias, layout=layout, backend="reference")
print(f"off by {float((out - expected).abs().max()):.1e} from the reference")

try:
    mask_attention(*torch.randn(3, 1, 1, 2000, 64), backend="mine")
except BackendError as error:
    print(error)
