"""A video in, a coloured point cloud of what stands still out.

    python examples/video_to_point_cloud.py [VIDEO] [OUT.ply]

Without arguments it reads the bundled clip and writes static.ply. For real videos use weights such as "page4d-mask".
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import trimesh

from page4d import Page4D
from page4d.data import bundled_clip, load_frames


def main(video: str | Path | None = None, out: str | Path = "static.ply", weights: str = "nano") -> int:
    """Write the static points and return how many there are."""
    model = Page4D.from_pretrained(weights)
    frames = load_frames([video or bundled_clip()], size=model.config.image_size or 518, max_frames=8)
    with torch.inference_mode():
        prediction = model(frames.images.to(next(model.parameters()).device)).to("cpu")

    points, confidence = prediction.points()  # (1, S, H, W, 3), (1, S, H, W)
    motion = F.interpolate(prediction.motion, size=points.shape[2:4], mode="bilinear")  # from patches to pixels, (1, S, H, W)
    keep = (confidence > confidence.median()) & (motion < motion.median())
    colors = (prediction.images.permute(0, 1, 3, 4, 2)[keep] * 255).round().numpy().astype(np.uint8)
    trimesh.PointCloud(points[keep].numpy(), colors).export(out)
    return int(keep.sum())


if __name__ == "__main__":
    print(f"{main(*sys.argv[1:])} static points")
