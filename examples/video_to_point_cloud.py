"""A video in, a coloured point cloud of what stands still out.

    python examples/video_to_point_cloud.py [VIDEO] [OUT.ply]

Without arguments it reads the bundled clip and writes static.ply. For real videos set WEIGHTS to "page4d-mask", for example.
"""

import sys
from dataclasses import replace

import torch
import torch.nn.functional as F

from page4d import Page4D
from page4d.data import bundled_clip, load_frames
from page4d.export.ply import write_ply

WEIGHTS = "nano"
video = sys.argv[1] if len(sys.argv) > 1 else bundled_clip()
out = sys.argv[2] if len(sys.argv) > 2 else "static.ply"

model = Page4D.from_pretrained(WEIGHTS)
frames = load_frames([video], size=model.config.image_size or 518, max_frames=8)
with torch.inference_mode():
    prediction = model(frames.images.to(next(model.parameters()).device)).to("cpu")

# One value per patch, (1, S, h, w). Above 1/2 the mask suppresses the patch: it moves. Resized to pixels, (1, S, H, W).
motion = F.interpolate(prediction.motion, size=prediction.images.shape[-2:], mode="bilinear")
static = motion <= 0.5
confidence = torch.where(static, prediction.depth_conf, torch.nan)  # points without a finite confidence are not written
write_ply(out, replace(prediction, depth_conf=confidence), frames)
print(f"{int(static.sum())} of {static.numel()} pixels stand still; the more confident half of them is in {out}")
