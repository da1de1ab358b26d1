"""From tokens back to the picture: prefix tokens, the grid of patches, windows, hierarchies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from toast.families.layouts import stride
from toast.families.tokens import like_windows
from toast.visual.seeing import Parts

Pair = tuple[float, float]

#: Where a trunk says how large its patches are.
_PATCH_SIZES = ("patch_embed.patch_size", "config.patch_size")
#: What a class token is called, in timm and in transformers.
_CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")
#: Families whose attention is not over tokens: XCiT's is over channels.
_NOT_OVER_TOKENS = ("timm-xcit",)


@dataclass(frozen=True)
class Map:
    """Values on the grid of tokens of one picture.

    Args:
        values: `(rows, columns)`.
        cell: As of `Maps`.
    """

    values: Tensor
    cell: Pair


@dataclass(frozen=True)
class Maps:
    """Values on the grids of tokens of a batch of pictures.

    Args:
        values: `(batch, rows, columns)`.
        cell: Height and width of a token's place in the picture, in pixels. The grid begins in the upper left
            corner; its last row or column may reach beyond the picture (padding) or end before its edge.
    """

    values: Tensor
    cell: Pair

    def __getitem__(self, index: int) -> Map:
        """Returns the map of one picture."""
        return Map(self.values[index], self.cell)


@dataclass(frozen=True)
class Grid:
    """Where the patches lie in a sequence of tokens.

    Args:
        prefix: Tokens before the patches: class token, distillation token, registers.
        rows: Rows of patches.
        columns: Columns of patches.
        cell: Height and width of a patch in pixels.
    """

    prefix: int
    rows: int
    columns: int
    cell: Pair

    def lay_out(self, tokens: Tensor) -> Maps:
        """Lays values of tokens, `(batch, tokens)`, out as maps; the prefix is left out."""
        patches = tokens[:, self.prefix :]
        return Maps(rearrange(patches, "b (r c) -> b r c", r=self.rows, c=self.columns), self.cell)


def has_token_attention(parts: Parts) -> bool:
    """Whether the blocks have an attention over tokens."""
    return parts.family.tokens != "map" and parts.family.name not in _NOT_OVER_TOKENS


def has_class_token(parts: Parts, grid: Grid) -> bool:
    """Whether the first token of a sequence is a class token."""
    inside = {id(parameter) for block in parts.blocks for parameter in block.parameters()}
    return grid.prefix > 0 and any(
        name.rpartition(".")[2] in _CLASS_TOKENS and id(parameter) not in inside
        for name, parameter in parts.trunk.named_parameters()
    )


def sequence_grid(parts: Parts, tokens: int, size: Sequence[int]) -> Grid:
    """Finds the patches in a sequence of tokens.

    Args:
        parts: Of the model.
        tokens: Length of the sequence.
        size: Height and width of the picture in pixels.

    Raises:
        ValueError: If no grid of patches of this picture fits the sequence.
    """
    patch = _patch_size(parts)
    known = getattr(parts.trunk, "num_prefix_tokens", None)
    for whole in (math.floor, math.ceil):  # timm's `dynamic_img_pad` fills the last patches up
        rows, columns = (whole(side / of) for side, of in zip(size, patch, strict=True))
        prefix = tokens - rows * columns
        # Where the class token joins above the blocks (CaiT), theirs are the patches alone.
        if prefix in (known, 0) or (known is None and prefix > 0):
            return Grid(prefix, rows, columns, patch)
    raise ValueError(
        f"a picture of {size[0]} x {size[1]} pixels in patches of {patch[0]:g} x {patch[1]:g} and "
        f"{'an unknown number of' if known is None else known} prefix tokens do not make the {tokens} tokens "
        f"of {type(parts.trunk).__name__}. Tokens that are dropped or merged have no place in the picture."
    )


def _patch_size(parts: Parts) -> Pair:
    """Returns height and width of a patch in pixels, as the live model says it."""
    for path in _PATCH_SIZES:
        found: Any = parts.trunk
        for name in path.split("."):
            found = getattr(found, name, None)
        if isinstance(found, int):
            return float(found), float(found)
        if isinstance(found, Sequence) and len(found) == 2:
            return float(found[0]), float(found[1])
    inside = {id(module) for block in parts.blocks for module in block.modules()}
    for module in parts.trunk.modules():  # such as a family that a user registered
        if isinstance(module, nn.Conv2d) and id(module) not in inside and module.stride == module.kernel_size:
            return float(module.stride[0]), float(module.stride[1])
    raise ValueError(
        f"{type(parts.trunk).__name__} does not say how large its patches are: it has none of "
        f"{', '.join(_PATCH_SIZES)}, and no convolution that cuts them out."
    )


def cell_in(parts: Parts, number: int, shapes: dict[int, tuple[int, ...]], entering: bool = True) -> Pair:
    """Returns the size of a token's place in the picture, where the grid of tokens gets coarser.

    Args:
        parts: Of the model.
        number: Place of the module that makes the values, counted from the bottom.
        shapes: By block, the shape of what entered it.
        entering: Whether what enters that module is meant, or what leaves the block.
    """
    if parts.family.tokens == "map":
        below = parts.values[: number + (0 if entering else 1)]
        factor = math.prod(stride(module) for module in below)
        return float(factor), float(factor)
    widths = [shapes[block][-1] for block in parts.block_of[: number + 1]]
    changes = sum(width != before for before, width in itertools.pairwise(widths))
    patch, factor = _patch_size(parts), parts.family.coarsens**changes
    return patch[0] * factor, patch[1] * factor


def real_tokens(block: Any, batch: int, rows: int, columns: int, like: Tensor) -> Tensor:
    """Returns 1 for the tokens in a block's windows that are in the map, and 0 for those that fill it up.

    Args:
        block: A block of a Swin transformer.
        batch: Number of maps.
        rows: Rows of the map.
        columns: Columns of the map.
        like: Gives dtype and device.

    Returns:
        `(batch * windows, tokens of a window)`.
    """
    ones = torch.ones((batch, rows, columns, 1), dtype=like.dtype, device=like.device)
    return like_windows(ones, ones, block)[..., 0]


def put_back(windows: Tensor, block: Any, rows: int, columns: int) -> Tensor:
    """Puts values of a block's windows back in their place; the inverse of `tokens.like_windows`.

    Args:
        windows: `(batch * windows, tokens of a window)`.
        block: A block of a Swin transformer; its `window_size` and `shift_size` are those of the call.
        rows: Rows of the map.
        columns: Columns of the map.

    Returns:
        `(batch, rows, columns)`, without the tokens that filled the map up to whole windows.
    """
    (height, width), shift = block.window_size, block.shift_size
    down, across = -(-rows // height), -(-columns // width)
    grid = rearrange(windows, "(b h w) (wh ww) -> b (h wh) (w ww)", h=down, w=across, wh=height, ww=width)[
        :, :rows, :columns
    ]
    return torch.roll(grid, tuple(shift), (1, 2))
