"""From the bytes of a picture to red, green and blue, or the reason why not."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from toast.data.vision.source import BadSample

VERSION: Final = 2
"""Of what is done to the bytes; it is part of a source's fingerprint and rises when pixels change."""
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

_ORIENTATION: Final = 0x0112
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings a picture upright, by EXIF's orientation (JEITA CP-3451, 4.6.4)."""

TURNED: Final = "is turned upright as its EXIF data says"
FRAMES: Final = "has several frames, of which the first is taken"


@dataclass(frozen=True)
class Depth:
    """How the numbers of a picture with one channel of more than eight bits are read.

    Args:
        called: What they are called in messages.
        whites: The numbers that may be white, from which the first is taken that none exceeds.
        certain: Whether the format says so; what is guessed is noted.
    """

    called: str
    whites: tuple[float, ...]
    certain: bool = False


_SIXTEEN: Final = Depth("16-bit numbers", (65535,), certain=True)
_DEPTHS: Final = {
    "I": Depth("32-bit numbers", (255, 65535)),
    "F": Depth("floating-point numbers", (1, 255)),
}


class Unsuitable(ValueError):
    """A picture that is whole, but cannot be read in one certain way."""


@dataclass(frozen=True)
class Decoded:
    """A picture that was read.

    Args:
        image: The picture in mode RGB, upright.
        notes: What was met and how it was taken, each in words that go behind "the picture".
    """

    image: Image.Image
    notes: tuple[str, ...] = ()


def decode(file: Path | bytes, name: str) -> Image.Image:
    """Reads one picture as `read_picture` does, without notes."""
    return read_picture(file, name).image


def read_picture(file: Path | bytes, name: str) -> Decoded:
    """Reads one picture whole, its first frame if it has several, turned upright as its camera noted.

    Args:
        file: The picture's file, or its bytes.
        name: What the picture is called.

    Raises:
        BadSample: If it is not there, no picture, damaged or truncated, or its numbers have no known white.
    """
    try:
        _refuse_empty(file)
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            frames = (FRAMES,) if _has_frames(image) else ()
            decoded = to_rgb(image)
            return Decoded(decoded.image, frames + decoded.notes)
    except FileNotFoundError as error:
        raise BadSample(name, "the file does not exist") from error
    except DECODING_ERRORS as error:
        raise BadSample(name, reason(error)) from error


def _refuse_empty(file: Path | bytes) -> None:
    if (len(file) if isinstance(file, bytes) else file.stat().st_size) == 0:
        raise Unsuitable("the file is empty")


def reason(error: BaseException) -> str:
    """Returns one line that says what a decoder met."""
    reason = str(error) if isinstance(error, Unsuitable) else f"{type(error).__name__}: {error}"
    return reason.splitlines()[0]


def to_rgb(image: Image.Image) -> Decoded:
    """Converts any picture to mode RGB and turns it upright.

    What is transparent shows the colour that lies under it. Of one channel of 16 bits, 65535 is white. Of one
    of 32 bits or of floating-point numbers white is not known: it is 255 or 1 if none is larger, else 65535
    or 255.

    Raises:
        Unsuitable: If its numbers are beyond that, negative or not finite.
    """
    image.load()
    orientation = _orientation(image)
    notes: list[str] = []
    depth = _SIXTEEN if _has_sixteen_bits(image) else _DEPTHS.get(image.mode)
    if depth is not None:
        image, white = _eight_bits(image, depth)
        if not depth.certain:
            notes.append(f"holds {depth.called}, of which {white:g} is taken as white")
    elif "transparency" in image.info and image.mode in ("1", "L", "P"):
        image = image.convert("RGBA")
    image = image.convert("RGB")
    if orientation in _TURNS:
        image = image.transpose(_TURNS[orientation])
        notes.append(TURNED)
    return Decoded(image, tuple(notes))


def shown_size(image: Image.Image) -> tuple[int, int]:
    """Returns width and height of an opened picture as it is shown, turned upright, without reading it."""
    width, height = image.size
    lies = image.format != "TIFF" and _orientation(image) in (5, 6, 7, 8)  # Pillow turns TIFF itself
    return (height, width) if lies else (width, height)


def _has_frames(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except DECODING_ERRORS:  # of the second frame; the first may be whole
        return True


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(_ORIENTATION)
    except DECODING_ERRORS:  # a damaged note does not make a damaged picture
        return None


def _has_sixteen_bits(image: Image.Image) -> bool:
    """Whether the format says that a picture has 16 bits; older versions of Pillow keep them in 32."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _eight_bits(image: Image.Image, depth: Depth) -> tuple[Image.Image, float]:
    """Scales one channel to 0 to 255, and returns what was white."""
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    fits: Callable[[float], bool] = lambda white: -1e-3 * white <= low and high <= white * 1.001  # noqa: E731
    white = next(filter(fits, depth.whites), None)
    if white is None:  # so are NaN and infinities
        known = " or ".join(f"0 to {most:g}" for most in depth.whites)
        raise Unsuitable(
            f"holds {depth.called} from {low:g} to {high:g}; needs {known}, since other ranges do not show "
            "which value is white. Save it with 8 or 16 bits."
        )
    scaled = (values * (255 / white)).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(scaled), white
