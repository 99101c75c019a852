"""The whole model: images in, `Prediction` out."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from page4d_kernels.nvtx import stage

from .aggregator import Aggregator
from .config import Page4DConfig
from .errors import InputError
from .heads import CameraHead, DenseHead, TrackHead
from .heads.dense import Allocate
from .heads.track import UpdateFormer
from .layers import Conv2d, Linear
from .lean import Lean
from .memory import HEAD_FRAMES, Plan, Workload, budget_of, can_offload, make_plan
from .prediction import Prediction

OUTPUTS = ("camera", "depth", "points", "mask")  # tracks come with query points


class Page4D(nn.Module):
    """PAGE-4D: cameras, depth, point maps, tracks and the dynamics mask of a video in one forward pass.

    Parameter names are those of the official release. Made from a configuration it has random weights; `from_pretrained` loads some.
    """

    def __init__(self, config: Page4DConfig):
        super().__init__()
        self.config = config
        dim, patch = 2 * config.embed_dim, config.patch_size
        self.aggregator = Aggregator(config)
        self.camera_head = CameraHead(dim, config.mlp_ratio, config.camera) if config.camera else None
        self.point_head = self._dense(config.point_head, "points")
        self.depth_head = self._dense(config.depth_head, "depth")
        self.track_head = TrackHead(dim, patch, config.track) if config.track else None
        if not self.aggregator.camera_token.is_meta:
            self.reset_parameters()

    def _dense(self, config, kind: str) -> DenseHead | None:
        if config is None:
            return None
        return DenseHead(2 * self.config.embed_dim, self.config.patch_size, config.out_channels, config.features, kind)

    def reset_parameters(self) -> None:
        """The initialisation of the official release where it departs from PyTorch's."""
        self.aggregator.reset_parameters()
        for module in self.modules():
            if isinstance(module, UpdateFormer):
                module.reset_parameters()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        config: Page4DConfig | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Page4D:
        """A model with weights, in eval mode.

        Args:
            name_or_path: "nano" (bundled), "page4d", "page4d-mask" or "vggt" (downloaded from the Hugging Face hub), or a local .pt or
                .safetensors file.
            config: of a local file that carries none (official .pt files); the official size by default.
            device: cuda if there is one, else mps, else cpu.
            dtype: of the trunk's matrix products; see `set_compute_dtype`. bf16 (fp16 on older GPUs) on cuda, fp32 elsewhere.

        Raises:
            CheckpointError: the file is missing, damaged, holds code instead of weights, or its keys do not fit, in one line each.
        """
        from .checkpoint import load_pretrained

        model = load_pretrained(name_or_path, config)
        device = torch.device(device) if device else default_device()
        model.set_compute_dtype(dtype or default_dtype(device))
        return model.to(device).eval()

    def set_compute_dtype(self, dtype: torch.dtype) -> Page4D:
        """Run the trunk's matrix products (encoder, frame and global blocks) in `dtype`, in place.

        Norms, layer scales, tokens, the residual stream, the mask head and the prediction heads stay in fp32. For training in low
        precision leave the parameters in fp32 and use torch.autocast, which reaches the same products.
        """
        trunk = (self.aggregator.patch_embed, self.aggregator.frame_blocks, self.aggregator.global_blocks)
        for part in trunk:
            for module in part.modules():
                if isinstance(module, (Linear, Conv2d)):
                    module.to(dtype)
        return self

    def compile_parts(self) -> Page4D:
        """Run the encoder and the dense heads through torch.compile from now on, in place. The rest of the time is in our own operators.

        The first pass takes minutes longer, as does the first with another image size; results agree up to rounding. It pays for many
        frames on a GPU.
        """
        for part in (self.aggregator.patch_embed, self.depth_head, self.point_head):
            if part is not None:
                part.compile()
        return self

    def forward(
        self,
        images: Tensor,
        query_points: Tensor | None = None,
        *,
        outputs: Collection[str] | None = None,
        mask_strength: float | None = None,
        memory_budget: int | None = None,
        allocate: Allocate | None = None,
    ) -> Prediction:
        """Run the trunk once and the heads that are asked for.

        Args:
            images: (B, S, 3, H, W) or (S, 3, H, W) in [0, 1], RGB, H and W multiples of the patch size.
            query_points: (B, N, 2) or (N, 2), x and y in pixels of frame 0 (pixel centres at integers): asks for tracks. A point that is
                not finite has no finite track.
            outputs: any of "camera", "depth", "points", "mask"; all that the model has by default.
            mask_strength: gate of the special tokens, overrides the configuration's; 0 switches the modulation off.
            memory_budget: bytes that a pass without gradients may take beyond the weights, 0 for as few as it gets; 0.9 of what is free by
                default. `plan` tells what comes of it. Images may then lie on another device than the model, and go over a few frames at a
                time.
            allocate: makes the tensors that depth and points are written to, such as in the host's memory (without gradients only).

        Raises:
            InputError (a ValueError): images or query points do not fit, or an output is asked for that the model has no head for.
        """
        if memory_budget is not None and memory_budget < 0:
            raise InputError(f"memory_budget is a number of bytes, at least 0, not {memory_budget}")
        if images.dim() == 4:
            images = images.unsqueeze(0)
        if query_points is not None and query_points.dim() == 2:
            query_points = query_points.unsqueeze(0)
        strength = self.config.mask_strength if mask_strength is None else mask_strength
        wanted = self._wanted(outputs, query_points)
        self._check(images, query_points)
        self._check_mask(images, strength, "mask" in wanted)

        kept = self.config.kept_layers
        layers = kept if wanted & {"depth", "points", "track"} else kept[-1:] if "camera" in wanted else ()
        images = images.to(self.aggregator.camera_token.dtype)
        aggregator, run = self.aggregator, None
        device = aggregator.camera_token.device
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            points = 0 if query_points is None else query_points.shape[1]
            work = self._workload(images.shape, wanted, images.device == device, allocate is None, points)
            run = Lean(self._plan(work, memory_budget), work, device, aggregator.compute_dtype)
            if allocate is not None:
                allocate = self._allocated(work, allocate)
        features = aggregator(images, mask_strength=strength, layers=layers, want_mask="mask" in wanted, run=run)
        frames = HEAD_FRAMES if run is None else run.plan.head_frames
        with torch.autocast(device.type, enabled=False):
            found = self._heads(wanted, features.layers, images, query_points, frames, allocate)
        if "mask" in wanted and features.key_bias is not None:
            frames = images.shape[1]
            grid = (images.shape[-2] // self.config.patch_size, images.shape[-1] // self.config.patch_size)
            found["mask"] = features.key_bias.unflatten(1, (frames, -1))[:, :, features.special_tokens :].unflatten(2, grid)
        return Prediction(images=images, **found)

    def plan(
        self,
        shape: Sequence[int],
        outputs: Collection[str] | None = None,
        memory_budget: int | None = None,
        *,
        images_here: bool = True,
        results_here: bool = True,
        points: int = 0,
    ) -> Plan:
        """How a pass without gradients over images of a shape (B, S, 3, H, W) goes about its memory, see `forward`.

        `images_here`, `results_here`: whether they lie on the model's device; dense results do not if they are allocated elsewhere.
        `points`: tracked per sequence.
        """
        wanted = self._wanted(outputs, None) | ({"track"} if points else set())
        work = self._workload(shape, wanted, images_here, results_here, points)
        return self._plan(work, memory_budget)

    def _allocated(self, work: Workload, allocate: Allocate) -> Allocate:
        """`allocate`, asked before the trunk: what has no room says so at once."""
        heads = {"depth": self.depth_head, "points": self.point_head}
        made: dict[str, Tensor] = {}
        for output, head in heads.items():
            if output in work.outputs and head is not None:
                made |= {name: allocate(name, (work.all_frames, *work.size, *rest)) for name, rest in head.results}
        return lambda name, shape: made.pop(name)

    def _plan(self, work: Workload, memory_budget: int | None) -> Plan:
        device = self.aggregator.camera_token.device
        return make_plan(work, budget_of(device) if memory_budget is None else memory_budget, can_offload(work, device))

    def _workload(self, shape: Sequence[int], outputs: Collection[str], images_here: bool, results_here: bool, points: int) -> Workload:
        batch, frames, _, height, width = shape
        itemsize = self.aggregator.compute_dtype.itemsize
        return Workload(self.config, batch, frames, (height, width), itemsize, frozenset(outputs), images_here, results_here, points)

    @property
    def available(self) -> set[str]:
        """The outputs that this model has a head for."""
        heads = {
            "camera": self.camera_head,
            "depth": self.depth_head,
            "points": self.point_head,
            "mask": self.aggregator.spatial_mask_head,
            "track": self.track_head,
        }
        return {name for name, head in heads.items() if head is not None}

    def _wanted(self, outputs: Collection[str] | None, query_points: Tensor | None) -> set[str]:
        if isinstance(outputs, str):
            raise InputError(f"outputs have to be a collection of names, such as [{outputs!r}], not one string")
        wanted = self.available & set(OUTPUTS) if outputs is None else set(outputs)
        unknown = sorted(wanted - set(OUTPUTS))
        if unknown:
            raise InputError(
                f"unknown output {', '.join(map(repr, unknown))}: choose from {', '.join(OUTPUTS)} (tracks come with query points)"
            )
        if query_points is not None:
            wanted.add("track")
        absent = sorted(wanted - self.available)
        if absent:
            raise InputError(
                f"this model has no {' and no '.join(absent)} head: its weights came without one, so do not ask for that output"
            )
        if not wanted:
            raise InputError("no output is asked for")
        return wanted

    def _check(self, images: Tensor, query_points: Tensor | None) -> None:
        if images.dim() != 5 or images.shape[2] != 3:
            raise InputError(f"images have to be (B, S, 3, H, W) or (S, 3, H, W), not {tuple(images.shape)}")
        if not images.is_floating_point():
            raise InputError(f"images have to be floating point in [0, 1], not {images.dtype}: convert and divide by 255")
        batch, frames, _, height, width = images.shape
        if batch == 0 or frames == 0:
            raise InputError(f"there is no frame in images of shape {tuple(images.shape)}")
        patch = self.config.patch_size
        if height % patch or width % patch or not height or not width:
            nearest = tuple(max(round(size / patch), 1) * patch for size in (height, width))
            raise InputError(
                f"image height and width have to be multiples of {patch}, not {height} x {width}: resize to {nearest[0]} x {nearest[1]}"
            )
        if query_points is None or self.track_head is None:
            return
        if query_points.dim() != 3 or query_points.shape[0] != batch or query_points.shape[2] != 2 or not query_points.shape[1]:
            raise InputError(f"query_points have to be ({batch}, N, 2) or (N, 2) with N >= 1, not {tuple(query_points.shape)}")
        smallest = self.track_head.smallest_image
        if min(height, width) < smallest:
            raise InputError(f"tracking needs images of at least {smallest} x {smallest} pixels, not {height} x {width}: use a larger size")

    def _check_mask(self, images: Tensor, strength: float, wanted: bool) -> None:
        if not 0 <= strength < math.inf:
            raise InputError(f"mask_strength has to be at least 0 and finite, not {strength}")
        if strength > 0 and self.aggregator.spatial_mask_head is None:
            raise InputError(f"mask_strength {strength} needs a mask head, and this model has none: use 0")
        if strength > 0 and self.config.masked_blocks[0] == self.config.masked_blocks[1]:
            raise InputError(f"mask_strength {strength} has no effect: this configuration masks no block; use 0")
        if (strength > 0 or wanted) and images.shape[-2:] == (self.config.patch_size, self.config.patch_size):
            raise InputError("the dynamics mask needs at least two patches, and the image is a single one: use a larger size")

    def _heads(
        self,
        wanted: set[str],
        layers: list[Tensor],
        images: Tensor,
        query_points: Tensor | None,
        frames: int,
        allocate: Allocate | None,
    ) -> dict[str, Tensor]:
        """Run the heads, the dense ones so many frames at a time; the kept layers are cast to what the heads compute in."""
        size, device = (images.shape[-2], images.shape[-1]), self.aggregator.camera_token.device
        special = self.config.special_tokens
        found: dict[str, Tensor] = {}
        if "camera" in wanted and self.camera_head is not None:
            with stage("camera head"):
                found["pose_enc_list"] = self.camera_head(layers[-1][:, :, 0].to(device).flatten(-2))
                found["pose_enc"] = found["pose_enc_list"][-1]
        if "depth" in wanted and self.depth_head is not None:
            with stage("depth head"):
                found["depth"], found["depth_conf"] = self.depth_head.stream(layers, special, size, frames, allocate)
        if "points" in wanted and self.point_head is not None:
            with stage("point head"):
                found["world_points"], found["world_points_conf"] = self.point_head.stream(layers, special, size, frames, allocate)
        if "track" in wanted and self.track_head is not None and query_points is not None:
            with stage("track head"):
                queries = query_points.to(device, images.dtype)
                found["query_points"] = queries
                found["track_list"], found["vis"], found["conf"] = self.track_head(layers, special, size, queries, frames)
                found["track"] = found["track_list"][-1]
        return found


def default_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """What the trunk's matrix products run in: half precision where the hardware gains from it."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
