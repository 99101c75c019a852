"""torch's Linear, Conv2d and LayerNorm, which compute in the dtype of their parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        return self._convolved(x) if self._as_convolution(x) else F.linear(x, self.weight, self.bias)

    def _as_convolution(self, x: Tensor) -> bool:
        """Whether to run the matmul as oneDNN's 1x1 convolution instead of MKL's matmul.

        The convolution reorders the weights. In fp32 on an AMD EPYC it was 1.1 to 1.4 times as fast for matmuls of at least this size,
        see docs/long_sequences.md.
        """
        rows, narrow = x.numel() // self.in_features, min(self.in_features, self.out_features)
        large = x.device.type == "cpu" and x.dtype == torch.float32 and rows >= 128 and narrow >= 384
        free = not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))
        return large and free and torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")

    def _convolved(self, x: Tensor) -> Tensor:
        image = x.reshape(1, -1, 1, self.in_features).permute(0, 3, 1, 2)  # rows become pixels, features become channels; no copy
        y = F.conv2d(image, self.weight[:, :, None, None], self.bias)
        return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], self.out_features)


class Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.to(self.weight.dtype), self.normalized_shape, self.weight, self.bias, self.eps)
