"""What one forward pass returns: a dataclass of tensors with stated shapes, units and frames of reference."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .files import AtomicFiles
from .geometry import decode_pose, unproject


class EqualByValue:
    """A dataclass that is equal to another of its class if all fields are: tensors by shape, dtype and values, on any device."""

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(_same(getattr(self, field.name), getattr(other, field.name)) for field in fields(self))  # type: ignore[arg-type]

    __hash__ = None  # type: ignore[assignment]  # tensors can be changed


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())
    return type(a) is type(b) and bool(a == b)


@dataclass(frozen=True, eq=False)
class Cameras(EqualByValue):
    """OpenCV pinhole cameras: x_cam = R x_world + t, pixels = K x_cam / z."""

    extrinsics: Tensor  # (B, S, 3, 4) camera-from-world; the world is (by training) the first camera
    intrinsics: Tensor  # (B, S, 3, 3) in pixels of `Prediction.images`

    @property
    def centers(self) -> Tensor:
        """Camera positions in the world, (B, S, 3)."""
        return -torch.einsum("...ji,...j->...i", self.extrinsics[..., :3], self.extrinsics[..., 3])

    @property
    def world_from_camera(self) -> Tensor:
        """Poses (B, S, 3, 4): columns of R^T and the camera centre."""
        return torch.cat([self.extrinsics[..., :3].transpose(-1, -2), self.centers[..., None]], -1)


@dataclass(frozen=True, eq=False, repr=False)
class Prediction(EqualByValue):
    """Outputs for B sequences of S frames of H x W pixels, patch grid h x w. Heads that were not run are None.

    Lengths are in the scene's own unit: the model normalises by the mean distance of the scene points.
    """

    images: Tensor  # (B, S, 3, H, W) in [0, 1], as the network saw them
    mask: Tensor | None = None  # (B, S, h, w) in (-1/2, 1/2): the key bias of each patch; low = the camera tokens attend less to it
    pose_enc: Tensor | None = None  # (B, S, 9): translation, quaternion x y z w, fov_h, fov_w (radians)
    pose_enc_list: Tensor | None = None  # (4, B, S, 9): the refinement iterations, the last one is pose_enc
    depth: Tensor | None = None  # (B, S, H, W, 1), along the camera's z
    depth_conf: Tensor | None = None  # (B, S, H, W), >= 1
    world_points: Tensor | None = None  # (B, S, H, W, 3), in the first camera's frame
    world_points_conf: Tensor | None = None  # (B, S, H, W), >= 1
    query_points: Tensor | None = None  # (B, N, 2): x, y in pixels of frame 0
    track: Tensor | None = None  # (B, S, N, 2): x, y in pixels
    track_list: Tensor | None = None  # (4, B, S, N, 2): the refinement iterations
    vis: Tensor | None = None  # (B, S, N) in (0, 1): probability of being visible
    conf: Tensor | None = None  # (B, S, N) in (0, 1): confidence of the track
    attention: str | None = None  # the attention plan, as `AttentionPlan.to_json` writes it; None = exact
    attention_deviation: Tensor | None = None  # (depth,): see `Page4D.forward`; 0 where a layer is dense
    intrinsics: Tensor | None = None  # (B, S, 3, 3) in pixels of `images`, if they are known; None = those of pose_enc
    valid: Tensor | None = None  # (B, S, H, W) bool: pixels that show the original; `export` writes it if there is padding

    @property
    def cameras(self) -> Cameras:
        if self.pose_enc is None:
            raise ValueError("this prediction has no cameras: run the model with 'camera' among its outputs")
        extrinsics, intrinsics = decode_pose(self.pose_enc, (self.images.shape[-2], self.images.shape[-1]))
        return Cameras(extrinsics, intrinsics if self.intrinsics is None else self.intrinsics)

    @property
    def motion(self) -> Tensor:
        """(B, S, h, w) in (0, 1): 1/2 - mask. High where the camera tokens are told to ignore the patch, that is, at moving things."""
        if self.mask is None:
            raise ValueError("this prediction has no dynamics mask: run the model with 'mask' among its outputs")
        return 0.5 - self.mask

    def points(self, source: str = "depth") -> tuple[Tensor, Tensor]:
        """World points (B, S, H, W, 3) and confidence (B, S, H, W).

        `source`: "depth" = the depth map unprojected with the predicted cameras (usually sharper), "head" = the point head.
        """
        if source == "depth":
            if self.depth is None or self.depth_conf is None:
                raise ValueError("this prediction has no depth: run the model with 'depth' and 'camera' among its outputs")
            cameras = self.cameras
            return unproject(self.depth[..., 0], cameras.extrinsics, cameras.intrinsics), self.depth_conf
        if source == "head":
            if self.world_points is None or self.world_points_conf is None:
                raise ValueError("this prediction has no point map: run the model with 'points' among its outputs")
            return self.world_points, self.world_points_conf
        raise ValueError(f"unknown point source {source!r}: use 'depth' or 'head'")

    def frame(self, index: int) -> Prediction:
        """One frame, as S = 1. Its tensors share the memory."""
        return self.frames(slice(index, index + 1))

    def frames(self, part: slice) -> Prediction:
        """Some of the frames. Their tensors share the memory."""
        changed: dict[str, Any] = {
            name: value[:, :, part] if name in ("pose_enc_list", "track_list") else value[:, part]
            for name, value in self.tensors().items()
            if name not in ("query_points", "attention_deviation")  # which have no frames
        }
        return replace(self, **changed)

    def to(self, *args, **kwargs) -> Prediction:
        """Every tensor through `Tensor.to`; `valid` changes its device alone."""
        moved: dict[str, Any] = {name: value.to(*args, **kwargs) for name, value in self.tensors().items()}
        if self.valid is not None:
            moved["valid"] = self.valid.to(moved["images"].device)
        return replace(self, **moved)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def __repr__(self) -> str:
        """Names and shapes, not values."""
        return f"Prediction({', '.join(f'{name}={tuple(value.shape)}' for name, value in self.tensors().items())})"

    def save(self, path: str | Path) -> Path:
        """Write every present field to a compressed .npz; the file appears whole or not at all."""
        path = Path(path)
        arrays = {name: _numpy(value) for name, value in self.tensors().items()}
        if self.attention is not None:
            arrays["attention"] = np.array(self.attention)
        with AtomicFiles() as files, open(files.add(path), "wb") as file:  # by name, numpy would append a suffix
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # the stubs mistake arrays for options
        return path

    @classmethod
    def load(cls, path: str | Path) -> Prediction:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            values: dict[str, Any] = {name: torch.from_numpy(file[name]) for name in file.files if name != "attention"}
            if "attention" in file.files and file["attention"].dtype.kind == "U":
                values["attention"] = str(file["attention"])
        return cls(**values)


def _numpy(value: Tensor) -> np.ndarray:
    """The tensor as a numpy array. numpy has no bf16, so half precision becomes fp32."""
    value = value.detach().cpu()
    return (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).numpy()
