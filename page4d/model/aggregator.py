"""The trunk: attention alternates between within-frame and across-frame. In middle layers the dynamics mask modulates the latter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from page4d_kernels import TokenLayout
from page4d_kernels.profiling import stage
from page4d_kernels.reference import accumulation_dtype

from ..config import Page4DConfig
from ..execution.attention_plan import AttentionPlan
from ..execution.runners import EagerRunner, TrunkRunner
from ..layers import Block, MaskHead, Modulation
from ..layers.attention import rope
from .encoder import Encoder

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as the encoder was trained with


@dataclass(frozen=True)
class Features:
    """What the heads read."""

    layers: list[Tensor]  # (B, S, P, 2, C) of each kept layer: output of its frame block, output of its global block
    key_bias: Tensor | None  # (B, S*P)
    special_tokens: int
    deviation: Tensor | None = None  # (depth,): of each global layer from dense attention, 0 where it is dense; None if not measured


class Aggregator(nn.Module):
    def __init__(self, config: Page4DConfig):
        super().__init__()
        self.config = config
        self.checkpoint_activations = False  # in training: recompute the blocks in the backward pass
        dim = config.embed_dim
        self.camera_token = nn.Parameter(torch.zeros(1, 2, 1, dim))  # [first frame, every other frame]
        self.register_token = nn.Parameter(torch.zeros(1, 2, config.register_tokens, dim))
        self.patch_embed = Encoder(config)
        self.frame_blocks = nn.ModuleList(self._block() for _ in range(config.depth))
        self.global_blocks = nn.ModuleList(self._block() for _ in range(config.depth))
        self.spatial_mask_head = MaskHead(dim, config.mask_hidden) if config.mask_hidden is not None else None
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", None, persistent=False)
        self.register_buffer("std", None, persistent=False)
        self.reset_buffers()

    def _block(self) -> Block:
        config = self.config
        return Block(config.embed_dim, config.num_heads, config.mlp_ratio, qk_norm=True, scale_init=config.layer_scale)

    def reset_buffers(self) -> None:
        """Create the constants. Called again when a model made on the meta device gets its weights."""
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.patch_embed.reset_parameters()
        for token in (self.camera_token, self.register_token):
            nn.init.normal_(token, std=1e-6)

    def _per_frame(self, token: Tensor, batch: int, first: int, frames: int) -> Tensor:
        """(1, 2, n, C) -> (B, S, n, C): the first variant for frame 0 of the sequence, the second for the rest."""
        leading = int(first == 0)
        return torch.cat([token[:, :leading], token[:, 1:].expand(-1, frames - leading, -1, -1)], 1).expand(batch, -1, -1, -1)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the blocks' matmuls."""
        device = self.camera_token.device.type
        block = self.global_blocks[0]
        assert isinstance(block, Block)
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else block.attn.qkv.weight.dtype

    def normalise(self, images: Tensor) -> Tensor:
        return (images.to(self.mean.dtype) - self.mean) / self.std

    def forward(
        self,
        images: Tensor,
        *,
        mask_strength: float,
        layers: tuple[int, ...],
        want_mask: bool,
        runner: TrunkRunner | None = None,
        plan: AttentionPlan | None = None,
        checked: int = 0,
    ) -> Features:
        """Run the trunk.

        Args:
            images: (B, S, 3, H, W) in [0, 1], of the whole sequence or, as the runner knows, of a part of it.
            mask_strength: query gate of the special tokens. 0 switches the modulation off.
            layers: which layers to save. The trunk stops after the last of them.
            want_mask: whether to compute the mask even if it does not modulate.
            runner: how to run the blocks without gradients. `EagerRunner` by default.
            plan: what the patches of each global layer see. None: everything.
            checked: patch rows of each sparse layer that are computed densely too. 0 with gradients.
        """
        config = self.config
        batch, frames, _, height, width = images.shape
        grid = (height // config.patch_size, width // config.patch_size)
        special = config.special_tokens
        checked = 0 if runner is None else checked  # with gradients nothing is measured
        runner = runner or EagerRunner(self.call)
        first, total = runner.span(frames)
        with stage("encoder"):
            tokens = [self._per_frame(token, batch, first, frames) for token in (self.camera_token, self.register_token)]
            x = runner.embed(self.patch_embed, self.normalise, images, torch.cat(tokens, 2))
        per_frame = x.shape[2]
        table = rope(grid, special, config.embed_dim // config.num_heads, config.rope_base, x.device, accumulation_dtype(x.dtype))
        layout = TokenLayout(total, per_frame, special)
        use_mask = mask_strength > 0 and config.masked_blocks[0] < config.masked_blocks[1]

        key_bias, modulation = None, None
        sparse: list[int] = []
        last = max(layers, default=config.mask_after)
        for index, (frame_block, global_block) in enumerate(zip(self.frame_blocks, self.global_blocks, strict=True)):
            assert isinstance(frame_block, Block) and isinstance(global_block, Block)
            with stage(f"frame {index}"):
                x = runner.frame_block(frame_block, x, table)
            if index == config.mask_after and self.spatial_mask_head is not None and (use_mask or want_mask):
                with stage("mask head"):
                    key_bias = runner.mask_head(self.spatial_mask_head, x, grid, special)
                if use_mask:
                    everywhere = runner.gathered(key_bias.unflatten(1, (frames, per_frame))).flatten(1, 2)
                    modulation = Modulation(self._gate(layout, batch, mask_strength, x), everywhere, layout)
            if not layers and index == last:
                break  # only the mask was asked for
            if index in layers:
                runner.save_frame_half(x)
            with stage(f"global {index}"):
                masked = config.masked_blocks[0] <= index < config.masked_blocks[1]
                seen = None if plan is None else plan.sparsity(index, layout, grid, checked, x.device)
                sparse += [index] if seen is not None else []
                x = runner.global_block(global_block, x, table, modulation if masked else None, seen)
            if index in layers:
                runner.save_global_half(x)
            if index == last:
                break
        return Features(runner.saved_layers(), key_bias, special, self._deviation(runner.deviations(), sparse))

    def _deviation(self, measured: list[Tensor], sparse: list[int]) -> Tensor | None:
        if len(measured) != len(sparse) or not sparse:
            return None
        found = measured[0].new_zeros(self.config.depth)
        found[sparse] = torch.stack(measured)
        return found

    def call(self, block: nn.Module, *inputs) -> Tensor:
        """The block's output, with activation checkpointing if it is on. For `EagerRunner`."""
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def _gate(self, layout: TokenLayout, batch: int, strength: float, like: Tensor) -> Tensor:
        """Query gate (B, S*P): the mask strength at the special tokens."""
        gate = torch.full((batch, layout.tokens), strength, dtype=accumulation_dtype(like.dtype), device=like.device)
        return layout.only_special(gate)
