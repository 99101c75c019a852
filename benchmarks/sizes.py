"""The sizes that the cases share: the official image size and its tokens."""

from __future__ import annotations

SIZE = (336, 518)  # pixels
PATCH = 14
GRID = (SIZE[0] // PATCH, SIZE[1] // PATCH)
SPECIAL = 5  # camera and register tokens of a frame
PATCHES = GRID[0] * GRID[1]  # of a frame
PER_FRAME = SPECIAL + PATCHES  # tokens of a frame
HIDDEN = 256  # channels of the mask head's hidden layer
