"""The whole model: images in, `Prediction` out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn

from page4d_kernels.backends.mask_attention import BACKENDS
from page4d_kernels.profiling import stage

from ..config import Layer, Page4DConfig
from ..errors import InputError
from ..execution.across import Across, agreed, largest_share
from ..execution.attention_plan import CHECKED_ROWS, AttentionPlan, kept_share
from ..execution.memory import HEAD_FRAMES, MemoryPlan, Share, Workload, budget_of, can_offload, make_plan
from ..execution.parallel import ParallelEagerRunner, ParallelRunner
from ..execution.ranks import Ranks
from ..execution.ring import check_backend
from ..execution.runners import StreamedRunner
from ..files import Allocate
from ..layers import Conv2d, Linear
from ..prediction import Prediction
from .aggregator import Aggregator
from .call import OUTPUTS, Call, checked_call, wanted_outputs
from .cuda_graph import take_graph
from .heads import CameraHead, DenseHead, TrackHead
from .heads.track import UpdateFormer


class Page4D(nn.Module):
    """PAGE-4D: cameras, depth, point maps, tracks and the dynamics mask of a video in one forward pass.

    Parameter names are those of the official release. `Page4D(config)` has random weights, `from_pretrained` loads weights.
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
            config: configuration of a local file that carries none (official .pt files). The official size by default.
            device: default: cuda if available, else mps, else cpu.
            dtype: dtype of the trunk's matmuls, see `set_compute_dtype`. Default: bf16 (fp16 on older GPUs) on cuda, fp32 elsewhere.

        Raises:
            CheckpointError: the file is missing, damaged, holds code instead of weights, or its keys do not fit the model.
        """
        from .checkpoint import assign_weights, read_pretrained

        config, state = read_pretrained(name_or_path, config)
        with torch.device("meta"):
            model = cls(config)
        assign_weights(model, state, Path(name_or_path).name)
        model.aggregator.reset_buffers()
        device = torch.device(device) if device else default_device()
        model.set_compute_dtype(dtype or default_dtype(device))
        return model.to(device).eval()

    def set_compute_dtype(self, dtype: torch.dtype) -> Page4D:
        """Convert the weights of the trunk's matmuls (encoder, frame and global blocks) to `dtype`, in place.

        Norms, layer scales, tokens, the residual stream, the mask head and the prediction heads stay in fp32. For training in low
        precision leave the parameters in fp32 and use torch.autocast: it runs the same matmuls in low precision.
        """
        trunk = (self.aggregator.patch_embed, self.aggregator.frame_blocks, self.aggregator.global_blocks)
        for part in trunk:
            for module in part.modules():
                if isinstance(module, (Linear, Conv2d)):
                    module.to(dtype)
        return self

    def compile_parts(self) -> Page4D:
        """Run the encoder and the dense heads through torch.compile from now on, in place.

        The first pass takes minutes longer, and so does the first pass with another image size. Results agree up to rounding. It is
        meant for many frames on a GPU. Blocks are not compiled: most of their time is in our own operators.
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
        attention: AttentionPlan | str | Path | Sequence[Layer] | None = None,
        attention_check: int = CHECKED_ROWS,
        group: dist.ProcessGroup | None = None,
    ) -> Prediction:
        """Run the trunk once and the heads that are asked for.

        Args:
            images: (B, S, 3, H, W) or (S, 3, H, W) in [0, 1], RGB, H and W multiples of the patch size. Numpy arrays count too.
            query_points: (B, N, 2) or (N, 2), x and y in pixels of frame 0 (pixel centres at integers). Given, the prediction has tracks.
                A point that is not finite has no finite track.
            outputs: any of "camera", "depth", "points", "mask". Default: all that the model has a head for.
            mask_strength: query gate of the special tokens. Default: the configuration's. 0 switches the modulation off.
            memory_budget: bytes that a pass without gradients may allocate beyond the weights; 0 asks for the smallest plan. Default: 0.9
                of the free memory. `plan` returns the resulting plan. The images may lie on another device than the model: they are
                copied a few frames at a time.
            allocate: `allocate(name, shape)` returns the tensor that depth or points are written to, for example in host memory. Without
                gradients only.
            attention: what the patches of each global layer see, see `AttentionPlan.of`. Default: everything, in all layers.
            attention_check: patch rows of each layer that is not dense which are computed densely as well. `attention_deviation` of the
                result is then |sparse - dense| / |dense| over these rows, for each layer. 0, or gradients: nothing is measured.
            group: processes that share the sequence, each of which calls this with its own frames, in the order of their ranks, and with
                all else equal. The result is the same as in one process, of this rank's frames (docs/several_gpus.md).

        Raises:
            InputError (a ValueError): images or query points do not fit or are not finite, images are far out of [0, 1], or the model has
                no head for an output.
            RankError: another process of the group failed, ended, or did not come in time.
        """
        given = (images, query_points, outputs, mask_strength, memory_budget, allocate, attention, attention_check)
        if group is not None:
            if torch.compiler.is_compiling():
                raise InputError("torch.compile cannot trace a pass on several ranks: leave out group, or use compile_parts instead")
            ranks = Ranks.of(group, self.aggregator.camera_token.device)
            with ranks.refusing():
                if 0 in tuple(getattr(images, "shape", ()))[:-3]:
                    raise InputError(f"rank {ranks.rank} has no frame: give each rank at least one, or use fewer ranks")
                call = checked_call(self, *given)
            facts = {"dtype of the trunk": str(self.aggregator.compute_dtype), "attention backend": BACKENDS.requested(), **call.facts}
            facts["trained parameters"] = sum(p.requires_grad for p in self.parameters()) if torch.is_grad_enabled() else 0
            across = agreed(ranks, call.images.shape[1], self.config.num_heads, facts)
            check_backend(across, len(call.images), across.total, self.config, self.aggregator.compute_dtype)
            with ranks.guard():
                found = self._run(call, across)
                ranks.finish()
                return found
        call = checked_call(self, *given)
        if memory_budget is None and allocate is None and call.plan is None:
            tensors = {"images": call.images}
            if call.query_points is not None:
                tensors["query_points"] = call.query_points
            graphed = take_graph(self, tensors, {"outputs": sorted(call.wanted & set(OUTPUTS)), "mask_strength": call.strength})
            if graphed is not None:
                return graphed
        return self._run(call, None)

    def _run(self, call: Call, across: Across | None) -> Prediction:
        """The pass. `across`: the sequence of which the images are a part."""
        wanted, plan, allocate, aggregator = call.wanted, call.plan, call.allocate, self.aggregator
        kept = self.config.kept_layers
        layers = kept if wanted & {"depth", "points", "track"} else kept[-1:] if "camera" in wanted else ()
        images = call.images.to(aggregator.camera_token.dtype)
        device = aggregator.camera_token.device
        runner: StreamedRunner | None = None
        eager: ParallelEagerRunner | None = None
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            points = 0 if call.query_points is None else call.query_points.shape[1]
            share = None if across is None else across.share
            workload = self._workload(images.shape, wanted, images.device == device, allocate is None, points, plan, share)
            made = (self._plan(workload, call.memory_budget), workload, device, aggregator.compute_dtype)
            runner = StreamedRunner(*made) if across is None else ParallelRunner(*made, across=across)
            if allocate is not None:
                allocate = self._allocated(workload, allocate)
        elif across is not None:
            eager = ParallelEagerRunner(aggregator.call, across)
        features = aggregator(
            images,
            mask_strength=call.strength,
            layers=layers,
            want_mask="mask" in wanted,
            runner=runner or eager,
            plan=plan,
            checked=0 if runner is None else call.checked,
        )
        frames_per_chunk = HEAD_FRAMES if runner is None else runner.plan.head_frames
        with torch.autocast(device.type, enabled=False):
            found = self._heads(wanted, features.layers, images, call.query_points, frames_per_chunk, allocate, across)
        if "mask" in wanted and features.key_bias is not None:
            bias = rearrange(features.key_bias, "b (s p) -> b s p", s=images.shape[1])[:, :, features.special_tokens :]
            found["mask"] = rearrange(bias, "b s (h w) -> b s h w", h=images.shape[-2] // self.config.patch_size)
        return Prediction(
            images=images, attention=None if plan is None else plan.to_json(), attention_deviation=features.deviation, **found
        )

    def plan(
        self,
        shape: Sequence[int],
        outputs: Collection[str] | None = None,
        memory_budget: int | None = None,
        *,
        images_on_device: bool = True,
        results_on_device: bool = True,
        points: int = 0,
        attention: AttentionPlan | None = None,
        ranks: int = 1,
    ) -> MemoryPlan:
        """The memory plan of a pass without gradients over images of shape (B, S, 3, H, W), see `forward`.

        Args:
            images_on_device, results_on_device: whether images, and depth and points, lie on the model's device.
            points: how many points are tracked per sequence.
            attention: what the patches of each global layer see.
            ranks: among how many processes the frames are divided. The plan is that of the one that has the most.
        """
        wanted = wanted_outputs(self, outputs, None) | ({"track"} if points else set())
        share: Share | None = None
        if ranks > 1:
            frames, share = largest_share(shape[1], ranks, self.config.num_heads)
            shape = (shape[0], frames, *shape[2:])
        workload = self._workload(shape, wanted, images_on_device, results_on_device, points, attention, share)
        return self._plan(workload, memory_budget)

    def _allocated(self, workload: Workload, allocate: Allocate) -> Allocate:
        """Allocate outputs before the trunk runs, so that lack of space fails early."""
        heads = {"depth": self.depth_head, "points": self.point_head}
        made: dict[str, Tensor] = {}
        for output, head in heads.items():
            if output in workload.outputs and head is not None:
                made |= {name: allocate(name, (workload.all_frames, *workload.size, *rest)) for name, rest in head.results}
        return lambda name, shape: made.pop(name)

    def _plan(self, workload: Workload, memory_budget: int | None) -> MemoryPlan:
        device = self.aggregator.camera_token.device
        return make_plan(workload, budget_of(device) if memory_budget is None else memory_budget, can_offload(workload, device))

    def _workload(
        self,
        shape: Sequence[int],
        outputs: Collection[str],
        images_on_device: bool,
        results_on_device: bool,
        points: int,
        attention: AttentionPlan | None,
        share: Share | None,
    ) -> Workload:
        batch, frames, _, height, width = shape
        item = self.aggregator.compute_dtype.itemsize
        size = (height, width)
        kept = kept_share(attention, self.config, frames if share is None else share.total, size)
        where = {"images_on_device": images_on_device, "results_on_device": results_on_device}
        return Workload(self.config, batch, frames, size, item, frozenset(outputs), **where, points=points, kept_keys=kept, share=share)

    @property
    def available(self) -> set[str]:
        """The outputs for which this model has a head."""
        heads = {
            "camera": self.camera_head,
            "depth": self.depth_head,
            "points": self.point_head,
            "mask": self.aggregator.spatial_mask_head,
            "track": self.track_head,
        }
        return {name for name, head in heads.items() if head is not None}

    def _heads(
        self,
        wanted: set[str],
        layers: list[Tensor],
        images: Tensor,
        query_points: Tensor | None,
        frames_per_chunk: int,
        allocate: Allocate | None,
        across: Across | None,
    ) -> dict[str, Tensor]:
        """Run the heads: dense ones `frames_per_chunk` frames at a time. The kept layers are cast to the heads' dtype."""
        size, device = (images.shape[-2], images.shape[-1]), self.aggregator.camera_token.device
        special = self.config.special_tokens
        found: dict[str, Tensor] = {}
        if "camera" in wanted and self.camera_head is not None:
            with stage("camera head"):
                tokens = layers[-1][:, :, 0].to(device).flatten(-2)
                if across is None:
                    found["pose_enc_list"] = self.camera_head(tokens)
                else:  # a token per frame: every rank computes all cameras
                    found["pose_enc_list"] = self.camera_head(across.gather(tokens, "camera"))[:, :, across.own]
                found["pose_enc"] = found["pose_enc_list"][-1]
        if "depth" in wanted and self.depth_head is not None:
            with stage("depth head"):
                found["depth"], found["depth_conf"] = self.depth_head.forward_chunked(layers, special, size, frames_per_chunk, allocate)
        if "points" in wanted and self.point_head is not None:
            with stage("point head"):
                found["world_points"], found["world_points_conf"] = self.point_head.forward_chunked(
                    layers, special, size, frames_per_chunk, allocate
                )
        if "track" in wanted and self.track_head is not None and query_points is not None:
            with stage("track head"):
                queries = query_points.to(device, images.dtype)
                found["query_points"] = queries
                found["track_list"], found["vis"], found["conf"] = self.track_head(layers, special, size, queries, frames_per_chunk, across)
                found["track"] = found["track_list"][-1]
        return found


def default_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """The default dtype of the trunk's matmuls: half precision on cuda, fp32 elsewhere."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
