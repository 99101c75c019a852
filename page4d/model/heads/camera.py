"""Camera head: four refinements of the pose encoding from the camera tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import CameraHeadConfig
from ...layers import Block, LayerNorm, Linear, Mlp

POSE_SIZE = 9  # translation 3, quaternion 4, fields of view 2


class CameraHead(nn.Module):
    def __init__(self, dim: int, mlp_ratio: int, config: CameraHeadConfig):
        super().__init__()
        self.iterations = config.iterations
        self.empty_pose_tokens = nn.Parameter(torch.zeros(1, 1, POSE_SIZE))
        self.token_norm = LayerNorm(dim)
        self.trunk_norm = LayerNorm(dim)
        self.embed_pose = Linear(POSE_SIZE, dim)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, 3 * dim))
        # a backend chosen for the trunk may not serve this head's fp32, and S tokens need no special one
        blocks = (Block(dim, config.num_heads, mlp_ratio, backend="auto") for _ in range(config.depth))
        self.trunk = nn.Sequential(*blocks)
        self.pose_branch = Mlp(dim, dim // 2, POSE_SIZE)

    def forward(self, tokens: Tensor) -> Tensor:
        """Last layer's camera tokens (B, S, 2C) -> pose encodings of all iterations (iterations, B, S, 9)."""
        k = self.token_norm(tokens)
        normal = F.layer_norm(k, k.shape[-1:], eps=1e-6)
        pose: Tensor | None = None  # the raw sum, without activation
        outputs = []
        for _ in range(self.iterations):
            previous = self.empty_pose_tokens.expand(*k.shape[:2], -1) if pose is None else pose.detach()
            shift, scale, gate = self.poseLN_modulation(self.embed_pose(previous)).chunk(3, -1)
            y = self.trunk(k + gate * (normal * (1 + scale) + shift))
            delta = self.pose_branch(self.trunk_norm(y))
            pose = delta if pose is None else pose.detach() + delta
            outputs.append(torch.cat([pose[..., :7], F.relu(pose[..., 7:])], -1))  # a field of view is not negative
        return torch.stack(outputs)
