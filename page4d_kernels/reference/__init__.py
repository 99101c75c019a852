"""The specification of every op: the plainest PyTorch that is right in any dtype, with the gradient written out as formulas."""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums and softmax run in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32
