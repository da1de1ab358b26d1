"""How a family lays out its tokens, and how a signal gets into the same order.

TOAST itself keeps the channels last: `(batch, tokens, width)`, or `(batch, rows, columns, width)`.

- `sequence`: `(batch, tokens, width)`, everywhere.
- `map`: `(batch, width, rows, columns)`, as convolutions take it.
- `windows`: blocks take `(batch, rows, columns, width)`; the value projection sees windows of it,
  rolled and padded as timm's Swin transformers do.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

TOKENS = ("sequence", "map", "windows")


def channels_last(x: Tensor, tokens: str) -> Tensor:
    """Returns what a family's blocks pass on, with its channels last."""
    return x.permute(0, 2, 3, 1) if tokens == "map" else x


def like_map(signal: Tensor, x: Tensor) -> Tensor:
    """Returns a signal, `(batch, rows, columns, width)`, in the order and size of a map `x`."""
    return fit(signal, x.shape[2], x.shape[3]).permute(0, 3, 1, 2)


def fit(grid: Tensor, rows: int, columns: int) -> Tensor:
    """Cuts a grid of tokens at the bottom and right, or fills it there with zeros.

    Where a grid is odd, coarsening pads it (Swin) or drops its last row (convolutions), so that refining
    gives one row more or less. Nothing else moves: each coarse token covers its own fine ones.
    """
    return F.pad(grid, (0, 0, 0, columns - grid.shape[2], 0, rows - grid.shape[1]))


def like_windows(signal: Tensor, entering: Tensor, block: Any) -> Tensor:
    """Returns a signal in the order in which a block of a Swin transformer gives tokens to its attention.

    Args:
        signal: `(batch, rows, columns, width)`.
        entering: What enters the block, of that shape.
        block: The block; its `window_size` and `shift_size` are those of the call.

    Returns:
        `(batch * windows, tokens of a window, width)`.
    """
    window, shift = block.window_size, block.shift_size
    signal = fit(signal, entering.shape[1], entering.shape[2])
    signal = torch.roll(signal, (-shift[0], -shift[1]), (1, 2))
    # up to whole windows
    signal = fit(signal, *(-(-size // of) * of for size, of in zip(signal.shape[1:3], window, strict=True)))
    windows: Tensor = rearrange(signal, "b (h wh) (w ww) c -> (b h w) (wh ww) c", wh=window[0], ww=window[1])
    return windows
