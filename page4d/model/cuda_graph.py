"""The forward pass as a CUDA graph, for short sequences that are bound by kernel launches."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from page4d_kernels import registries

from ..execution.memory import budget_of
from ..prediction import Prediction
from .page4d import Page4D

WARM_UP = 3  # passes before a capture: they compile and time kernels, fill caches and allocate workspaces


class GraphedPage4D:
    """Calls the model through CUDA graphs, one per combination of shapes and options. Without gradients only.

        graphed = GraphedPage4D(model, max_frames=4)
        for clip in clips:
            prediction = graphed(clip)

    The first call with a shape is slow: it runs the model a few times. Every graph holds the memory of one pass. Longer sequences, models
    on other devices and calls with gradients go to the model directly. Weights may change in place but must not be replaced. Not yet run
    on a GPU.
    """

    def __init__(self, model: Page4D, max_frames: int = 8):
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
        shapes = tuple((name, x.shape, x.dtype) for name, x in inputs.items())
        backends = tuple(registry.requested() for registry in registries().values())  # a graph holds the backends it was captured with
        key = (shapes, str(options), self.model.aggregator.compute_dtype, torch.is_autocast_enabled(device.type), backends)
        if key not in self._graphs:
            self._graphs[key] = _capture(self.model, inputs, options)
        return self._graphs[key](**inputs)


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
        with torch.cuda.graph(graph):
            captured = model(**static, **options, memory_budget=budget)

    def replay(**given: Tensor) -> Prediction:
        with torch.cuda.device(device):
            for name, x in given.items():
                static[name].copy_(x)
            graph.replay()
        return Prediction(**{name: x.clone() for name, x in captured.tensors().items()})

    return replay
