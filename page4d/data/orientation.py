"""The eight ways in which a picture can be stored, and how it is turned upright. The numbers are those of the EXIF tag Orientation."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

UPRIGHT = 1
EXIF_ORIENTATION = 0x0112

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Signs of a, b, c, d in x' = a x + c y, y' = b x + d y, from stored to displayed pixels, y down.
MATRIX = {
    1: (1, 0, 0, 1),
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """The image turned and mirrored from its stored orientation. Numbers outside of 2 to 8 change nothing."""
    turn = _TRANSPOSE.get(orientation)
    return image if turn is None else image.transpose(turn)


def of_display_matrix(matrix: Sequence[int]) -> tuple[int, bool]:
    """The orientation next to a 3 x 3 display matrix, row by row as in a QuickTime track header, and whether the matrix is exactly that.

    Only directions count, not the scale. A matrix without a direction (all zeros) is upright.
    """
    a, b, c, d = matrix[0], matrix[1], matrix[3], matrix[4]
    x, y = abs(complex(a, b)) or 1.0, abs(complex(c, d)) or 1.0  # lengths of the images of the two axes
    directions = (a / x, b / x, c / y, d / y)
    likeness = {number: sum(p * q for p, q in zip(directions, signs, strict=True)) for number, signs in MATRIX.items()}
    best = max(likeness, key=lambda number: likeness[number])
    return (best, likeness[best] > 1.999) if any(directions) else (UPRIGHT, False)
