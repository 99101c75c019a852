"""Which keys each global layer's patches see: all, those of their own frame, or one patch of every cell."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from page4d_kernels import TokenLayout, select_keys

from ..config import DENSE, FRAME, Layer, Page4DConfig, checked_layers
from ..errors import ConfigError, InputError, one_line
from ..layers import Sparsity, cache_tensors

EXAMPLE = '{"layers": ["dense", "frame", [2, 2], ...]}'
CHECKED_ROWS = 64  # of a sparse layer that are computed densely as well, by default
PARTS = (9 / 24, 7 / 24, 8 / 24)  # of the layers, from the first: early, middle and late ones
PRESETS: dict[str, tuple[Layer, Layer, Layer]] = {  # early, middle, late
    "exact": (DENSE, DENSE, DENSE),
    "balanced": (FRAME, (2, 2), (2, 3)),
    "fast": (FRAME, (3, 3), (4, 4)),
}


@dataclass(frozen=True)
class AttentionPlan:
    """What the patches of each global layer see. Special tokens see everything in every layer, with the mask.

    Attributes:
        layers: for each global layer "dense" (all keys), "frame" (the tokens of the own frame), or (rows, columns) of a cell: one patch of
            each cell, see `page4d_kernels.thin_attention`.
        name: what reports call it.

    Raises:
        InputError: a layer is something else.
    """

    layers: tuple[Layer, ...]
    name: str = "custom"

    def __post_init__(self) -> None:
        if not isinstance(self.layers, (tuple, list)) or not self.layers:
            raise InputError(f"an attention plan is a list of layers, at least one, not {self.layers!r:.40}")
        try:
            object.__setattr__(self, "layers", checked_layers(self.layers))  # tuples: keys of the cache of selections
        except ConfigError as error:
            raise InputError(error) from None
        if self.name == "exact" and not self.exact:
            raise InputError("an attention plan that is not dense cannot have the name 'exact': give it another one")

    @classmethod
    def of(cls, plan: AttentionPlan | str | Path | Sequence[Layer] | None, config: Page4DConfig) -> AttentionPlan:
        """A plan for a model, by what a caller may give: a plan, its layers, a preset's name, "2x2" (that cell in all layers), or the path
        of a .json file. None: exact.

        Raises:
            InputError: it is none of these, or does not have a layer for each of the model's.
        """
        if plan is None:
            return cls.preset("exact", config)
        if isinstance(plan, (str, Path)):
            plan = cls._named(str(plan), config)
        elif not isinstance(plan, AttentionPlan):
            plan = cls(plan)  # type: ignore[arg-type]  # it is checked
        if len(plan.layers) != config.depth:
            raise InputError(f"the attention plan has {len(plan.layers)} layers, and the model {config.depth}")
        return plan

    @classmethod
    def preset(cls, name: str, config: Page4DConfig) -> AttentionPlan:
        """exact, balanced or fast: the model's own of that name, if its configuration has one, or else the general one, see `general`."""
        own = vars(config.plans).get(name)
        return cls.general(name, config.depth) if own is None else cls(own, name)

    @classmethod
    def general(cls, name: str, depth: int) -> AttentionPlan:
        """exact, balanced or fast, for any model of that depth.

        balanced: of 24 layers the first 9 within frames, then 7 that keep one patch of 2 x 2, then 8 that keep one of 2 x 3. fast: the
        same layers, with cells of 3 x 3 and 4 x 4. With another depth the layers are in proportion.
        """
        if name not in PRESETS:
            raise InputError(f"unknown attention plan {name!r}: choose from {', '.join(PRESETS)}, give a cell such as 2x2, or a .json file")
        early, middle = (round(share * depth) for share in PARTS[:2])
        counts = (early, middle, depth - early - middle)
        return cls(tuple(kind for kind, count in zip(PRESETS[name], counts, strict=True) for _ in range(count)), name)

    @classmethod
    def _named(cls, name: str, config: Page4DConfig) -> AttentionPlan:
        cell = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", name)
        if cell:
            return cls(((int(cell[1]), int(cell[2])),) * config.depth, name)
        if not name.lower().endswith(".json"):
            return cls.preset(name, config)
        try:
            return cls.from_json(Path(name).read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the attention plan {name!r} ({getattr(error, 'strerror', error)}): check the path") from error
        except InputError as error:
            raise InputError(f"{name!r}: {error}") from None

    @property
    def exact(self) -> bool:
        return all(layer in (DENSE, (1, 1)) for layer in self.layers)

    def sparsity(self, layer: int, layout: TokenLayout, grid: tuple[int, int], checked: int, device: torch.device) -> Sparsity | None:
        """What the patches of a layer do not see. None if it is dense. `checked` patch rows are to be computed densely too."""
        return _sparsity(self.layers[layer], layer, layout, grid, checked, device)

    def to_json(self) -> str:
        return json.dumps({"name": self.name, "layers": [list(layer) if isinstance(layer, tuple) else layer for layer in self.layers]})

    @classmethod
    def from_json(cls, text: str) -> AttentionPlan:
        """The plan that `to_json` wrote. InputError if it is something else."""
        try:
            whole: Any = json.loads(text)
            return cls(whole["layers"], one_line(str(whole.get("name", "custom"))))
        except InputError:
            raise
        except KeyError as error:
            raise InputError(f"an attention plan needs {error}: {EXAMPLE}") from None
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise InputError(f"not an attention plan: it should be {EXAMPLE}") from None


def check_rows(count: int) -> None:
    """InputError unless it is a number of rows to check."""
    if type(count) is not int or count < 0:
        raise InputError(f"attention_check must be a number of rows, at least 0, not {count!r}")


def kept_share(plan: AttentionPlan | None, config: Page4DConfig, frames: int, size: tuple[int, int]) -> float:
    """The largest share of the keys that a layer with cells keeps, and copies. 0 if no layer has cells."""
    grid = (size[0] // config.patch_size, size[1] // config.patch_size)
    patches = grid[0] * grid[1]
    cells = [layer for layer in plan.layers if isinstance(layer, tuple)] if plan is not None and frames > 1 else []
    kept = [frames * config.special_tokens + patches + (frames - 1) * kept_patches(grid, cell) for cell in cells]
    return max(kept, default=0) / (frames * (config.special_tokens + patches))


def kept_patches(grid: tuple[int, int], cell: tuple[int, int]) -> int:
    """How many patches of a frame are kept: one for each cell that fits."""
    return max(1, grid[0] // cell[0]) * max(1, grid[1] // cell[1])


@cache_tensors
def _sparsity(kind: Layer, shift: int, layout: TokenLayout, grid: tuple[int, int], checked: int, device: torch.device) -> Sparsity | None:
    if kind in (DENSE, (1, 1)) or layout.frames == 1:
        return None
    keys = select_keys(layout, grid, kind, shift, device) if isinstance(kind, tuple) else None
    return Sparsity(layout, keys, checked_rows(layout, checked, device))


def checked_rows(layout: TokenLayout, count: int, device: torch.device) -> Tensor:
    """(R,) int64: up to `count` patch rows, evenly spread over the sequence."""
    patches = layout.tokens_per_frame - layout.special_tokens
    count = min(count, layout.frames * patches)
    chosen = (torch.arange(count) * 2 + 1) * (layout.frames * patches) // (2 * max(1, count))
    rows = chosen // patches * layout.tokens_per_frame + layout.special_tokens + chosen % patches
    return rows.to(device)
