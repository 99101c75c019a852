"""The model as a long video needs it: a pass over a chunk, and the chunk that suits it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..config import Page4DConfig
from ..errors import InputError
from ..execution.attention_plan import AttentionPlan
from ..files import Allocate
from ..model import Page4D
from ..prediction import Cameras, Prediction
from .chunks import Chunk, Chunking
from .loops import describe
from .run import LongVideo, Predict, run
from .store import Store

NEEDED = ("camera", "depth")  # outputs by which chunks are aligned
HELPFUL = "mask"  # keeps what moves out of the alignment
LARGEST = 120  # frames of a chunk that is chosen here, however much memory there is: beyond, attention takes most of the time


@dataclass(frozen=True)
class Passes:
    """See `run.Predict`. `options` are those of `Page4D.forward`."""

    model: Page4D
    options: Mapping[str, Any]

    def __call__(self, images: Tensor) -> tuple[Prediction, Tensor]:
        aggregator, tokens = self.model.aggregator, list[Tensor]()
        hook = aggregator.patch_embed.register_forward_hook(lambda module, args, out: tokens.append(out.cpu()))
        try:
            with torch.inference_mode():
                prediction = self.model(images[None], **self.options).to("cpu")
        finally:
            hook.remove()
        if sum(map(len, tokens)) != len(images):  # some frames were tried again, after they ran out of memory
            device = aggregator.camera_token.device
            with torch.inference_mode():
                tokens = [aggregator.patch_embed(aggregator.normalise(image[None].to(device))).cpu() for image in images]
        patch = self.model.config.patch_size
        motion = None if prediction.mask is None else prediction.motion[0]
        return prediction, describe(torch.cat(tokens), (images.shape[-2] // patch, images.shape[-1] // patch), motion)


def predict_in_chunks(
    model: Page4D,
    images: Tensor,
    chunking: Chunking,
    store: Store,
    allocate: Allocate,
    *,
    outputs: Collection[str],
    attention: AttentionPlan,
    loops: bool = True,
    known: tuple[list[int], Cameras] | None = None,
    valid: Tensor | None = None,
    advance: Callable[[Chunk], None] = lambda chunk: None,
    passes: Callable[[Page4D, Mapping[str, Any]], Predict] = Passes,
    **options: Any,
) -> LongVideo:
    """`run` with a model. `options` are those of `Page4D.forward`. Known intrinsics replace those of the cameras."""
    check_outputs(model)
    predict = passes(model, {**options, "outputs": {*outputs, *needed(model)}, "attention": attention})
    anchors = None if known is None else (known[0], known[1].extrinsics)
    chunks = chunking.divide(len(images))
    found = run(images, chunks, predict, store, allocate, loops=loops, known=anchors, valid=valid, advance=advance)
    prediction = replace(found.prediction, attention=None if attention.exact else attention.to_json())
    return replace(found, prediction=prediction if known is None else with_intrinsics(prediction, *known))


def needed(model: Page4D) -> set[str]:
    """The outputs that a pass over a chunk has beside those that are asked for."""
    return {*NEEDED, HELPFUL} & set(model.available)


def check_outputs(model: Page4D) -> None:
    """InputError unless the model has the heads by which chunks are aligned."""
    missing = [name for name in NEEDED if name not in model.available]
    if missing:
        raise InputError(
            f"chunks are aligned by cameras and depth, and these weights have no head for {', '.join(missing)}: use --chunk off"
        )


def with_intrinsics(prediction: Prediction, frames: list[int], cameras: Cameras) -> Prediction:
    """The prediction with the known intrinsics (n, 3, 3) of some frames, in pixels of its images. NaN: not known."""
    intrinsics = prediction.cameras.intrinsics.clone()
    found = cameras.intrinsics.isfinite().all(-1).all(-1)
    intrinsics[0, torch.tensor(frames)[found]] = cameras.intrinsics[found].to(intrinsics.dtype)
    return replace(prediction, intrinsics=intrinsics) if bool(found.any()) else prediction


def chosen_chunking(config: Page4DConfig, frames: int, fits: Callable[[int], bool]) -> Chunking | None:
    """The chunks for a sequence when nobody asked for any. None: one pass.

    Weights that were measured say from which length on chunks are better (`Page4DConfig.chunk`). Else only memory counts: the chunks are
    then as long as fits, up to 120 frames. `fits(n)` says whether n frames fit.
    """
    if config.chunk is not None and frames >= config.chunk[0] and fits(config.chunk[1]):
        return Chunking(*config.chunk[1:])
    if frames <= 2 or fits(frames) or not fits(2):  # in the last case nothing helps
        return None
    low, high = 2, min(LARGEST, frames - 1)  # the longest that fits lies between
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    number = len(Chunking.of(low).divide(frames))
    while low > 2 and len(Chunking.of(low - 1).divide(frames)) == number:  # as many, but the last one overlaps less
        low -= 1
    return Chunking.of(low)
