"""Masks of targets from files of pictures, whatever number stands for the target."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from toast.data.vision.decoding import DECODING_ERRORS, reason

#: Largest difference of red, green and blue that a grey picture may have; JPEG leaves some.
_GREY = 32


def read_mask(file: Path) -> Image.Image:
    """Reads a mask as a grey picture, 255 where the target is.

    The target is white, or 1 where there is nothing but 0 and 1 (labels of two classes, with a palette or
    without). Values between black and white are shares of a pixel.

    Raises:
        ValueError: If it cannot be read, is coloured, or its greatest value is neither of the two.
    """
    try:
        with Image.open(file) as picture:
            picture.load()
            values, white = _values(picture)
    except DECODING_ERRORS as error:
        raise ValueError(f"{file}: the mask cannot be read: {reason(error)}") from error
    found = sorted({float(value) for value in np.unique(values)})
    if set(found) <= {0.0, 1.0}:
        white = 1.0
    elif found[0] < 0 or not white / 2 <= found[-1] <= white:
        raise ValueError(
            f"{file}: a mask needs {white:g} (white) where the target is, or 1 beside nothing but 0; its "
            f"values are {', '.join(f'{value:g}' for value in found[:5])}{', …' if len(found) > 5 else ''}. "
            "Write the one that is the target as white."
        )
    return Image.fromarray((values / white * 255).round().astype(np.uint8))


def _values(picture: Image.Image) -> tuple[np.ndarray, float]:
    """Returns the values of a mask, and which of them is white.

    Raises:
        ValueError: If it has colours.
    """
    if picture.mode == "P":
        labels = np.asarray(picture).astype(np.float64)
        colours = np.asarray(picture.convert("RGB")).astype(np.float64)
        if np.ptp(colours, axis=-1).max() <= _GREY and colours.max() > 1:
            return colours[..., 0], 255.0
        return labels, 255.0
    if picture.mode in ("RGB", "RGBA", "LA"):
        colours = np.asarray(picture.convert("RGB")).astype(np.float64)
        if np.ptp(colours, axis=-1).max() > _GREY:
            raise ValueError("it has colours; a mask is grey, white where the target is")
        return colours.mean(-1), 255.0
    if picture.mode == "1":
        return np.asarray(picture.convert("L")).astype(np.float64), 255.0
    values = np.asarray(picture).astype(np.float64)
    return values, {"L": 255.0, "F": 1.0}.get(picture.mode, 65535.0)
