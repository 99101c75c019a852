"""The attention op alone: softmax(q k^T * scale + r c^T) v, and its gradients with respect to r and c.

    python examples/attention_gradients.py

r (`query_gate`) says which queries listen to the mask. c (`key_bias`) is the mask, one number per key. The gradients of the backend that
"auto" takes are compared with those of the specification, backend="reference".
"""

import torch

from page4d_kernels import TokenLayout, mask_attention

torch.manual_seed(0)
layout = TokenLayout(frames=2, tokens_per_frame=53, special_tokens=5)  # per frame 5 special tokens, then 48 patches
q, k, v = torch.randn(3, 1, 4, layout.tokens, 64)  # 4 heads of 64
r = layout.only_special(torch.full((1, layout.tokens), 64.0)).requires_grad_()
c = (torch.rand(1, layout.tokens) - 0.5).requires_grad_()


def gradients(backend: str) -> tuple[torch.Tensor, ...]:
    out = mask_attention(q, k, v, query_gate=r, key_bias=c, layout=layout, backend=backend)
    return torch.autograd.grad(out.square().sum(), (r, c))


for name, computed, expected in zip("rc", gradients("auto"), gradients("reference"), strict=True):
    largest, error = float(expected.abs().max()), float((computed - expected).abs().max())
    print(f"gradient of {name}: largest {largest:.3f}, differs from the reference by at most {error:.1e}")
    assert error < 1e-3 * largest
