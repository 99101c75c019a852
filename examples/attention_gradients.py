"""The attention op alone: softmax(q k^T * scale + r c^T) v, and the gradients of r and c.

    python examples/attention_gradients.py

r (the query gate) says which queries listen to the mask. c (the key bias) is the mask: one number per key.
"""

import torch

from page4d_kernels import TokenLayout, mask_attention

torch.manual_seed(0)
layout = TokenLayout(frames=2, tokens_per_frame=53, special_tokens=5)  # 5 special tokens and 48 patches per frame
q, k, v = torch.randn(3, 1, 4, layout.tokens, 64)
gate = layout.only_special(torch.full((1, layout.tokens), 64.0)).requires_grad_()
bias = (torch.rand(1, layout.tokens) - 0.5).requires_grad_()


def gradients(backend: str | None) -> tuple[torch.Tensor, ...]:
    out = mask_attention(q, k, v, gate, bias, layout=layout, backend=backend)
    return torch.autograd.grad(out.square().sum(), (gate, bias))


chosen, exact = gradients(None), gradients("reference")
for name, ours, reference in zip(("r", "c"), chosen, exact, strict=True):
    error = float((ours - reference).abs().max())
    assert error < 1e-3 * float(reference.abs().max()), error
    print(f"gradient of {name}: largest {float(reference.abs().max()):.3f}, off by {error:.1e} from the reference")
