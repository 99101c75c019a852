"""A model's forward pass as a CUDA graph: for short sequences, whose kernels are over before Python has launched the next one."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from page4d_kernels import registries

from ..execution.memory import budget_of
from ..prediction import Prediction
from .page4d import Page4D

WARM_UP = 3  # passes before a capture: kernels are compiled and timed, tables made, workspaces allocated


class GraphedPage4D:
    """Calls like the model's, without gradients, each served by a graph that was captured for its shapes and options.

        graphed = GraphedPage4D(model, max_frames=4)
        for clip in clips:
            prediction = graphed(clip)

    The first call with a shape is slow (it runs the model a few times), and every graph keeps the memory of one pass for itself. Longer
    sequences, models that are not on a CUDA device, and calls with gradients go to the model as they are. The weights may change in
    place, but not be replaced. Not yet run on a GPU.
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
        """Arguments and result as of `Page4D.forward`; the result is the caller's to keep."""
        inputs = {"images": images} if query_points is None else {"images": images, "query_points": query_points}
        options: dict[str, Any] = {"outputs": None if outputs is None else sorted(outputs), "mask_strength": mask_strength}
        device = self.model.aggregator.camera_token.device
        short = images.dim() in (4, 5) and images.shape[-4] <= self.max_frames
        if device.type != "cuda" or torch.is_grad_enabled() or not short:
            return self.model(**inputs, **options)
        shapes = tuple((name, x.shape, x.dtype) for name, x in inputs.items())
        backends = tuple(registry.requested() for registry in registries().values())  # a graph is that of the backends it was captured with
        key = (shapes, str(options), self.model.aggregator.compute_dtype, torch.is_autocast_enabled(device.type), backends)
        if key not in self._graphs:
            self._graphs[key] = _capture(self.model, inputs, options)
        return self._graphs[key](**inputs)


def _capture(model: Page4D, inputs: dict[str, Tensor], options: dict[str, Any]) -> Callable[..., Prediction]:
    """The pass for these shapes: copies new inputs into those of the capture, replays, and clones what came out."""
    device = model.aggregator.camera_token.device
    budget = budget_of(device)  # asked for once: a capture had better not ask the driver
    with torch.inference_mode(False):  # an inference tensor could not be written to by a later call outside of that mode
        static = {name: torch.empty_like(x, device=device).copy_(x.detach()) for name, x in inputs.items()}
    with torch.cuda.device(device):  # streams and graphs belong to the current one
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
