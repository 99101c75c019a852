"""Random number generators by purpose."""

from __future__ import annotations

import hashlib

import torch


def seeded(*parts: object) -> torch.Generator:
    """A CPU generator that depends on all of `parts`. The first part names the purpose, so that no option shifts the draws of another.

    The parts are hashed, because a CPU generator keeps only the low 32 bits of its seed.
    """
    digest = hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
