"""Pictures with a map over them, small enough to lie in a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from toast.visual.figure import ALPHA, SEQUENTIAL, require_matplotlib
from toast.visual.grids import Pair
from toast.visual.panels import Panel, Row

#: Longer side of a picture in pixels, and the quality of its JPEG.
SIDE, QUALITY = 240, 80


def shown(
    picture: Tensor,
    values: Tensor | None = None,
    cell: Pair = (1.0, 1.0),
    high: float = 1.0,
    low: float = 0.0,
    box: Sequence[float] | None = None,
    side: int = SIDE,
) -> Image.Image:
    """Returns a picture, greyed under a map if there is one.

    Args:
        picture: `(height, width, 3)`, 0 to 1.
        values: The map, `(rows, columns)`, interpolated between the centres of its cells.
        cell: Height and width of a cell in pixels of the picture.
        high: Value that has the brightest colour.
        low: Value that has the darkest.
        box: Drawn in: x0, y0, x1, y1 in pixels of the picture.
        side: Longer side of what is returned, in pixels.
    """
    height, width = picture.shape[:2]
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    drawn = _resized(picture, size)
    if values is not None:
        require_matplotlib("train")
        from matplotlib import colormaps

        rows, columns = values.shape
        whole = (max(1, round(columns * cell[1] * scale)), max(1, round(rows * cell[0] * scale)))
        shares = (values - low) / ((high - low) or 1.0)
        smooth = Image.fromarray(shares.float().numpy()).resize(whole, Image.Resampling.BILINEAR)
        # The grid may reach beyond the picture, or end before its edge.
        map_ = np.asarray(smooth)[: size[1], : size[0]]
        faint = np.repeat(np.asarray(drawn.convert("L"), np.float32)[..., None] / 510 + 0.5, 3, axis=2)
        over = faint[: map_.shape[0], : map_.shape[1]]
        over[:] = (1 - ALPHA) * over + ALPHA * colormaps[SEQUENTIAL](map_.clip(0, 1))[..., :3]
        drawn = Image.fromarray((faint.clip(0, 1) * 255).round().astype(np.uint8))
    if box is not None:
        x0, y0, x1, y1 = (value * scale for value in box)
        line = ImageDraw.Draw(drawn)
        line.rectangle((x0 - 1, y0 - 1, x1, y1), outline="black", width=3)
        line.rectangle((x0, y0, x1 - 1, y1 - 1), outline="white", width=1)
    return drawn


def drawn(row: Row, panel: Panel, side: int = SIDE) -> Image.Image:
    """Returns a panel of a row as a picture; arguments as of `shown`."""
    return shown(row.picture, panel.values, panel.cell, panel.high, panel.low, row.box, side)


def _resized(picture: Tensor, size: tuple[int, int]) -> Image.Image:
    pixels = (picture.clamp(0, 1) * 255).round().byte().numpy()
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def as_uri(image: Image.Image) -> str:
    """Returns a picture as a data URI, in JPEG without loss of the colours' places."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY, subsampling=0, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
