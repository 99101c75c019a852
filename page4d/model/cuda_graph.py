"""The forward pass as a CUDA graph, for short sequences that are bound by kernel launches."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from page4d_kernels import profiling, registries
from page4d_kernels.qualify import record
from page4d_kernels.qualify.classes import class_of

from ..execution.memory import budget_of
from ..prediction import Prediction

if TYPE_CHECKING:
    from .page4d import Page4D

logger = logging.getLogger("page4d")

WARM_UP = 3  # passes before a capture: they compile and time kernels, fill caches and allocate workspaces
MAX_FRAMES = 8  # of a pass that takes a graph by itself; longer ones keep a GPU busy anyway
KEPT = 4  # graphs of one model that are taken by themselves: each holds the memory of one pass
SEEN = 64  # calls that are remembered


class GraphedPage4D:
    """Calls the model through CUDA graphs, one per combination of shapes and options. Without gradients only.

        graphed = GraphedPage4D(model, max_frames=4)
        for clip in clips:
            prediction = graphed(clip)

    The first call with a shape is slow: it runs the model a few times. Every graph holds the memory of one pass. Longer sequences, models
    on other devices and calls with gradients go to the model directly. Weights may change in place but must not be replaced. Not yet run
    on a GPU.

    Where `page4d qualify` has shown that graphs are equal and faster, `Page4D` takes them by itself, see `take_graph`.
    """

    def __init__(self, model: Page4D, max_frames: int = MAX_FRAMES):
        self.model, self.max_frames = model, max_frames
        self._graphs: dict[tuple, Callable[..., Prediction]] = {}

    def __call__(
        self,
        images: Tensor,
        query_points: Tensor | None = None,
        *,
        outputs: Collection[str] | None = None,
        mask_strength: float | None = None,
    ) -> Prediction:
        """Arguments and result as in `Page4D.forward`. The result does not change in later calls."""
        inputs = {"images": images} if query_points is None else {"images": images, "query_points": query_points}
        options: dict[str, Any] = {"outputs": None if outputs is None else sorted(outputs), "mask_strength": mask_strength}
        device = self.model.aggregator.camera_token.device
        short = images.dim() in (4, 5) and images.shape[-4] <= self.max_frames
        if device.type != "cuda" or torch.is_grad_enabled() or not short:
            return self.model(**inputs, **options)
        key = _key(self.model, inputs, options)
        if key not in self._graphs:
            self._graphs[key] = _capture(self.model, inputs, options)
        return self._graphs[key](**inputs)


def _key(model: Page4D, inputs: dict[str, Tensor], options: dict[str, Any]) -> tuple:
    """All that a graph was captured with: shapes, options, dtypes, modes of torch, backends and the addresses of the weights."""
    shapes = tuple((name, x.shape, x.dtype) for name, x in inputs.items())
    backends = tuple(registry.requested() for registry in registries().values())
    weights = hash(tuple(x.data_ptr() for x in (*model.parameters(), *model.buffers())))
    modes = (
        model.training, torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"),
        torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32,
    )  # fmt: skip
    return shapes, str(options), model.aggregator.compute_dtype, modes, backends, weights


def _capture(model: Page4D, inputs: dict[str, Tensor], options: dict[str, Any]) -> Callable[..., Prediction]:
    """Capture the pass for these shapes. The returned function copies its inputs into the captured ones, replays and clones the outputs."""
    device = model.aggregator.camera_token.device
    budget = budget_of(device)  # queried once, as a capture must not query the driver
    with torch.inference_mode(False):  # calls outside inference mode cannot write to inference tensors
        static = {name: torch.empty_like(x, device=device).copy_(x.detach()) for name, x in inputs.items()}
    with torch.cuda.device(device):  # streams and graphs belong to the current device
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                model(**static, **options, memory_budget=budget)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            captured = model(**static, **options, memory_budget=budget)

    def replay(**given: Tensor) -> Prediction:
        with torch.cuda.device(device):
            for name, x in given.items():
                static[name].copy_(x)
            graph.replay()
        return Prediction(**{name: x.clone() for name, x in captured.tensors().items()})

    return replay


# --- graphs that the model takes by itself ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PassProblem:
    """A pass of the model, as the record of qualified kernels classifies it."""

    dtype: torch.dtype
    channels: int
    layers: int
    length: int  # tokens of the sequence
    needs_grad = False
    variant = ""

    @property
    def kind(self) -> str:
        return f"{self.channels} channels, {self.layers} layers"

    @classmethod
    def of(cls, model: Page4D, images: Tensor) -> PassProblem:
        """`images`: (..., S, 3, H, W)."""
        config = model.config
        frames, _, height, width = images.shape[-4:]
        per_frame = config.special_tokens + (height // config.patch_size) * (width // config.patch_size)
        return cls(model.aggregator.compute_dtype, config.embed_dim, config.depth, frames * per_frame)


class _Taken:
    """The graphs of one model, and the calls that were seen once."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.seen: set[tuple] = set()
        self.graphs: dict[tuple, Callable[..., Prediction] | None] = {}  # None: it could not be captured


_taken: weakref.WeakKeyDictionary[Page4D, _Taken] = weakref.WeakKeyDictionary()


def take_graph(model: Page4D, inputs: dict[str, Tensor], options: dict[str, Any]) -> Prediction | None:
    """The prediction by a graph, or None if the pass should run as usual.

    A graph is taken from the second call with the same shapes, options, weights and backends on, if `page4d qualify` found graphs of such
    passes equal and faster on this machine: on CUDA, without gradients, with at most `MAX_FRAMES` frames, for the first `KEPT` such calls.
    Not while stages are recorded or where modules have hooks, as a graph runs no Python, and only on the device's default stream.
    """
    images = inputs["images"]
    on_cuda = model.aggregator.camera_token.device.type == "cuda"
    if not on_cuda or images.shape[-4] > MAX_FRAMES or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if not record.advice("cuda_graph", "cuda", class_of(PassProblem.of(model, images))).faster:
        return None
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    if hooked or profiling.is_recording() or not _on_default_stream():
        return None
    key = _key(model, inputs, options)
    taken = _taken.setdefault(model, _Taken())
    with taken.lock:  # the inputs of a graph are shared by all its calls
        if key not in taken.graphs:
            if key not in taken.seen or len(taken.graphs) == KEPT:
                taken.seen = {*list(taken.seen)[:SEEN], key}
                return None
            try:
                taken.graphs[key] = _capture(model, inputs, options)
            except RuntimeError as error:
                logger.warning(f"no CUDA graph could be captured, so this pass runs without one ({str(error).splitlines()[0]})")
                taken.graphs[key] = None
        replay = taken.graphs[key]
        return None if replay is None else replay(**inputs)


def _on_default_stream() -> bool:
    return torch.cuda.current_stream() == torch.cuda.default_stream() and not torch.cuda.is_current_stream_capturing()
