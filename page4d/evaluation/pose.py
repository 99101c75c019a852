"""Metrics of a camera trajectory: ATE and RPE after a Sim(3) alignment, in float64.

Poses are camera-from-world extrinsics (S, 3, 4), as everywhere in this package. The trajectory consists of their inverses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..geometry import umeyama


def trajectory(extrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """World-from-camera rotations (S, 3, 3) and camera centres (S, 3), in float64, from camera-from-world extrinsics (S, 3, 4)."""
    rotation = extrinsics[..., :3].double().mT
    return rotation, -(rotation @ extrinsics[..., 3:].double()).squeeze(-1)


def pose_metrics(predicted: Tensor, true: Tensor) -> dict[str, float]:
    """Errors of predicted against true extrinsics, (S, 3, 4) each, after the Sim(3) alignment of the camera centres.

    ate: RMS distance of the centres, in the unit of the truth. It is 0 for one or two frames, or if the true camera is static.
    rpe_trans, rpe_rot: RMS translation, and RMS angle in degrees, of (Q_i^-1 Q_i+1)^-1 (P_i^-1 P_i+1) over all pairs of neighbouring
      frames. P and Q are the aligned and the true world-from-camera poses. NaN with a single frame.
    ate_constant: the ate of a static camera, that is the RMS distance of the true centres to their mean. The baseline for ate.
    All are NaN if a prediction is not finite.
    """
    if not predicted.isfinite().all():
        return dict.fromkeys(("ate", "rpe_trans", "rpe_rot", "ate_constant"), float("nan"))
    rotation, centres = trajectory(predicted)
    true_rotation, true_centres = trajectory(true)
    alignment = umeyama(centres, true_centres)
    aligned = alignment.apply(centres)
    step = _relative(alignment.rotation @ rotation, aligned)
    true_step = _relative(true_rotation, true_centres)
    return {
        "ate": _rms((aligned - true_centres).norm(dim=1)),
        "rpe_trans": _rms((step[1] - true_step[1]).norm(dim=1)),  # the relative rotation does not change the length
        "rpe_rot": _rms(torch.rad2deg(rotation_angle(true_step[0].mT @ step[0]))),
        "ate_constant": _rms((true_centres - true_centres.mean(0)).norm(dim=1)),
    }


def rotation_angle(rotation: Tensor) -> Tensor:
    """Angles (...) in [0, pi] of rotation matrices (..., 3, 3). From sine and cosine, so that small angles are precise."""
    axis = rotation - rotation.mT
    sine = torch.stack([axis[..., 2, 1], axis[..., 0, 2], axis[..., 1, 0]], -1).norm(dim=-1) / 2
    cosine = (rotation.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2
    return torch.atan2(sine, cosine)


def _relative(rotation: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Pose of each frame relative to the previous one: rotations (S - 1, 3, 3) and translations (S - 1, 3)."""
    back = rotation[:-1].mT
    return back @ rotation[1:], (back @ (centres[1:] - centres[:-1])[..., None]).squeeze(-1)


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
