"""The specification of every op: the simplest PyTorch that is correct in any dtype, with the gradient written as formulas."""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and softmax: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32
