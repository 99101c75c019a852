"""A reconstruction on several ranks. Rank 0 leads: it reads, decides, aligns and writes. The others run their frames of each pass.

Images and dense results lie in files that all ranks map, so that each touches only its own frames of them.
"""

from __future__ import annotations

import socket
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from page4d_kernels import use_backend

from ..config import Page4DConfig
from ..errors import InputError
from ..execution.across import Mesh, shares
from ..execution.attention_plan import AttentionPlan
from ..execution.memory import budget_of
from ..execution.ranks import Ranks
from ..files import Allocate, SharedArrays, open_shared, part_of
from ..long_video.passes import Passes
from ..long_video.run import DESCRIBED
from ..model import Page4D
from ..model.opening import open_model
from ..prediction import Prediction
from ..system import ranks_of_a_node

SAME = ("query_points", "attention_deviation")  # on all ranks
ITERATED = ("pose_enc_list", "track_list")  # have the frames in their third dimension
Outputs = dict[str, Tensor]


class Leader:
    """Rank 0 of a group whose other ranks `serve`.

    Args:
        group: of all ranks.
        device: of this one.
        folder: for the arrays that are shared.
        weights, dtype, attn: see `reconstruct`. The others open their model at once.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, folder: Path, weights: str, dtype: torch.dtype, attn: str | None):
        self.group, self.device, self.ranks, self.arrays = group, device, Ranks.of(group, device), SharedArrays(folder)
        self._parts: list[Path] = []  # files of the pass that runs
        self._mapped: set[str] = set()  # files that all have mapped for all passes
        self._one_host = False
        self.ranks.tell({"do": "open", "weights": weights, "dtype": str(dtype).removeprefix("torch."), "attn": attn})

    @property
    def size(self) -> int:
        return self.ranks.size

    def budget(self) -> int | None:
        """The smallest memory budget of all ranks, whose models are open then. InputError if their devices differ."""
        budget, self._one_host = _introduced(self.ranks, self.device)
        return budget

    def share(self, images: Tensor) -> None:
        """All map the images of the passes to come."""
        given = self.arrays.place(images)
        self.ranks.tell({"do": "map", "array": given})
        self._all_have_mapped([given])
        self._mapped.add(given["path"])

    def _all_have_mapped(self, places: Iterable[dict[str, Any]]) -> None:
        """Wait for it. Then the files lose their names, so that nothing stays if all are killed. Not so with several hosts: those that read
        from a network would lose the files.
        """
        self.ranks.agree({}, patient=True)
        for place in places if self._one_host else ():
            self.arrays.unlink(place)

    def in_words(self, config: Page4DConfig, frames: int) -> str:
        """Who does what in a pass over so many frames."""
        if frames < self.size:
            return f"{self.size} processes are more than a pass has frames, {frames}: one of them does all"
        counts, mesh = shares(frames, self.size), Mesh.of(self.size, config.num_heads, ranks_of_a_node())
        each = f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[-1]} or {counts[0]}"
        return f"{self.size} processes: {each} frames each; global attention by {mesh}"

    def predict(self, model: Page4D, images: Tensor, options: Mapping[str, Any], describe: bool) -> tuple[Prediction, Tensor | None]:
        """One pass over images (S, 3, H, W) on all ranks, and with `describe` the descriptions of its frames.

        `options` are those of `Page4D.forward`; `allocate` among them gives the memory if there are fewer frames than ranks.
        """
        options = dict(options)
        allocate: Allocate | None = options.pop("allocate", None)
        if len(images) < self.size:
            return _run(model, images, options | {"allocate": allocate}, describe)
        whole = self._results(model, images, options["outputs"])
        places = {name: self.arrays.place(array) for name, array in whole.items()}
        given = self.arrays.place(images)
        queries, plan = options.get("query_points"), options.get("attention")
        sent = {
            **{name: options[name] for name in ("mask_strength", "memory_budget", "attention_check")},
            "outputs": sorted(options["outputs"]),
            "query_points": None if queries is None else queries.tolist(),
            "attention": None if plan is None else plan.to_json(),
        }
        parts = self.arrays.folder / f".{uuid.uuid4().hex[:8]}"
        self._parts = [_part_file(parts, rank) for rank in range(1, self.size)]
        self.ranks.tell({"do": "pass", "images": given, "results": places, "options": sent, "describe": describe, "parts": str(parts)})
        self._all_have_mapped([given, *places.values()])
        mine = _own_part(model, self.group, images, whole, options, describe)
        self.ranks.agree({}, patient=True)  # all have written
        found = [mine, *map(_read, self._parts)]
        if not self._one_host:
            whole = {name: open_shared(place) for name, place in places.items()}  # what the other hosts wrote is seen once it is opened
        for place in (*places.values(), *([] if given["path"] in self._mapped else [given])):
            self.arrays.forget(place)
        fields: dict[str, Any] = {name: array[None] for name, array in whole.items()}
        for name in mine:
            dim = 2 if name in ITERATED else 0 if name == DESCRIBED else 1
            fields[name] = mine[name] if name in SAME else torch.cat([part[name] for part in found], dim)
        described = fields.pop(DESCRIBED, None)
        stored = None if plan is None or plan.exact else plan.to_json()
        return Prediction(images=images[None], attention=stored, **fields), described

    def passes(self, model: Page4D, options: Mapping[str, Any]) -> Callable[[Tensor], tuple[Prediction, Tensor]]:
        """As `long_video.passes.Passes`, on all ranks."""

        def predict(images: Tensor) -> tuple[Prediction, Tensor]:
            prediction, described = self.predict(model, images, options, True)
            assert described is not None
            return prediction, described

        return predict

    def end(self) -> None:
        """The others are done."""
        self.ranks.tell({"do": "end"})

    def close(self) -> None:
        """Remove all temporary files."""
        self.arrays.close()
        for path in self._parts:
            path.unlink(missing_ok=True)

    def _results(self, model: Page4D, images: Tensor, outputs: list[str]) -> Outputs:
        """The arrays for depth and points of all frames."""
        heads = {"depth": model.depth_head, "points": model.point_head}
        made: Outputs = {}
        for output, head in heads.items():
            if output in outputs and head is not None:
                made |= {name: self.arrays.allocate(name, (len(images), *images.shape[-2:], *rest)) for name, rest in head.results}
        return made


def serve(group: dist.ProcessGroup, device: torch.device) -> None:
    """Run this rank's part of what rank 0 leads, until it is done.

    Raises:
        RankError: another rank failed.
        UserError: this one cannot do its part. The others have been told.
    """
    ranks = Ranks.of(group, device)
    with ranks.guard():
        command = ranks.listen()
        if command["do"] == "end":
            return
        dtype = getattr(torch, command["dtype"])
        model = open_model(command["weights"], device, dtype, say=lambda text: None)
        with use_backend(command["attn"]) if command["attn"] else nullcontext():
            _introduced(ranks, device)
            mapped: dict[str, Tensor] = {}  # whole arrays by path
            while (command := ranks.listen())["do"] != "end":
                if command["do"] == "map":
                    place = command["array"]
                    mapped[place["path"]] = open_shared(place | {"first": 0, "shape": [place["values"]]})
                    ranks.agree({}, patient=True)
                else:
                    _serve_pass(model, group, ranks, command, mapped)
                    ranks.agree({}, patient=True)  # what was mapped for the pass alone is let go


def _serve_pass(model: Page4D, group: dist.ProcessGroup, ranks: Ranks, command: dict[str, Any], mapped: dict[str, Tensor]) -> None:
    given = command["images"]
    array = mapped.get(given["path"])
    images = open_shared(given) if array is None else part_of(array, given)
    whole = {name: open_shared(place) for name, place in command["results"].items()}
    ranks.agree({}, patient=True)
    options = dict(command["options"])
    if options["query_points"] is not None:
        options["query_points"] = torch.tensor(options["query_points"])
    if options["attention"] is not None:
        options["attention"] = AttentionPlan.from_json(options["attention"])
    part = _own_part(model, group, images, whole, options, command["describe"])
    safetensors.torch.save_file({name: x.contiguous() for name, x in part.items()}, _part_file(Path(command["parts"]), ranks.rank))


def _own_part(model: Page4D, group: dist.ProcessGroup, images: Tensor, whole: Outputs, options: dict[str, Any], describe: bool) -> Outputs:
    """Run the pass. Depth and points go to their places in `whole`; the rest of what was found for this rank's frames."""
    counts, rank = shares(len(images), dist.get_world_size(group)), dist.get_rank(group)
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    allocate = (lambda name, shape: whole[name][own].view(shape)) if whole else None
    prediction, described = _run(model, images[own], options | {"group": group, "allocate": allocate}, describe)
    found = {name: x for name, x in prediction.tensors().items() if name not in whole and name != "images"}
    return found if described is None else {**found, DESCRIBED: described}


def _run(model: Page4D, images: Tensor, options: dict[str, Any], describe: bool) -> tuple[Prediction, Tensor | None]:
    if describe:
        return Passes(model, options)(images)
    with torch.inference_mode():
        return model(images[None], **options).to("cpu"), None


def _part_file(parts: Path, rank: int) -> Path:
    return parts.with_name(f"{parts.name}.{rank}")


def _read(path: Path) -> Outputs:
    found = safetensors.torch.load(path.read_bytes())
    path.unlink()
    return found


def _introduced(ranks: Ranks, device: torch.device) -> tuple[int | None, bool]:
    """The smallest budget of all ranks, and whether all are on one host. On CPUs, the ranks of a node share its memory."""
    own = budget_of(device)
    if own is not None and device.type == "cpu":
        own //= ranks_of_a_node() or ranks.size
    found = ranks.agree({"device": device.type, "budget": own, "host": socket.gethostname()}, patient=True)
    for rank, other in enumerate(found):
        if other["device"] != found[0]["device"]:
            raise InputError(f"all ranks need devices of one kind: rank 0 has {found[0]['device']}, rank {rank} has {other['device']}")
    known = [other["budget"] for other in found if other["budget"] is not None]
    return min(known, default=None), len({other["host"] for other in found}) == 1
