"""From the bytes of a picture to red, green and blue, or the reason why not."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from toast.data.vision.source import BadSample

DECODING_ERRORS: Final = (
    OSError,  # not a picture, truncated, unreadable
    SyntaxError,  # Pillow's word for a broken PNG
    ValueError,
    ArithmeticError,
    LookupError,
    EOFError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What decoders raise on damaged bytes."""


def decode(file: Path | bytes, name: str) -> Image.Image:
    """Reads one picture whole, its first frame if it has several.

    Args:
        file: The picture's file, or its bytes.
        name: What the picture is called.

    Returns:
        The picture in mode RGB, as it lies in the file: a rotation that a camera noted is not applied, for
        boxes are counted in the file's pixels.

    Raises:
        BadSample: If it is not there, no picture, damaged or truncated.
    """
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            return to_rgb(image)
    except FileNotFoundError as error:
        raise BadSample(name, "the file is not there") from error
    except DECODING_ERRORS as error:
        raise BadSample(name, reason(error)) from error


def reason(error: BaseException) -> str:
    """Returns one line that says what a decoder met."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any picture to mode RGB; what is transparent shows the colour that lies under it."""
    image.load()
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow would cut 16 bits at 255 instead of scaling them
        grey = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    elif "transparency" in image.info and image.mode in ("1", "L", "P"):
        image = image.convert("RGBA")
    return image.convert("RGB")
