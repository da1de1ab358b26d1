"""Measures of where a model looks: attention on target, pointing game, entropy, change between two maps."""

from __future__ import annotations

import math

import torch
from einops import einsum
from torch import Tensor
from torch.nn import functional as F

from toast.visual.grids import Pair


def coverage(target: Tensor, rows: int, columns: int, cell: Pair) -> Tensor:
    """Returns which share of each cell of a grid a target covers.

    Args:
        target: Boxes `(batch, 4)`, x0, y0, x1, y1 in pixels, the ends exclusive; or masks
            `(batch, height, width)`, one value a pixel, 0 to 1 or boolean.
        rows: Rows of the grid.
        columns: Columns of the grid.
        cell: Height and width of a cell in pixels.

    Returns:
        `(batch, rows, columns)`, 0 to 1.

    Raises:
        ValueError: If the target is neither boxes nor masks, or one that counts otherwise: boxes in shares of
            the picture, masks up to 255.
    """
    if target.ndim == 2 and target.shape[1] == 4:
        _refuse_shares(target)
        across = _covered(target[:, 0], target[:, 2], columns, cell[1])
        down = _covered(target[:, 1], target[:, 3], rows, cell[0])
        return down[:, :, None] * across[:, None, :]
    if target.ndim == 3:
        if target.numel() and float(target.max()) > 1:
            raise ValueError(
                f"target: masks need values from 0 to 1; got some up to {float(target.max()):g}. Divide them "
                "by what stands for the target."
            )
        height, width = target.shape[1:]
        down = _covered(torch.arange(height), torch.arange(height) + 1, rows, cell[0])
        across = _covered(torch.arange(width), torch.arange(width) + 1, columns, cell[1])
        masks = target.to(down.dtype)
        covered: Tensor = einsum(masks, down, across, "b y x, y rows, x columns -> b rows columns")
        return covered
    raise ValueError(
        f"target: needs boxes (batch, 4) or masks (batch, height, width); got {tuple(target.shape)}."
    )


def _refuse_shares(boxes: Tensor) -> None:
    """Refuses boxes in 0..1: as pixels they would lie within the first one, all of them."""
    inside = len(boxes) and bool((boxes.abs() <= 1).all())
    if inside and bool((boxes != boxes.round()).any()):
        raise ValueError(
            f"target: boxes need pixels; got {[round(x, 4) for x in boxes[0].tolist()]} and the like, which "
            "are shares of the picture. Multiply x by its width and y by its height."
        )


def _covered(start: Tensor, end: Tensor, count: int, side: float) -> Tensor:
    """Returns the share of each of `count` intervals of a side that lies from start to end, `(n, count)`."""
    edges = torch.arange(count) * side
    start, end = start[:, None].cpu(), end[:, None].cpu()
    return (torch.minimum(end, edges + side) - torch.maximum(start, edges)).clamp(min=0) / side


def share_in_target(maps: Tensor, target: Tensor, cell: Pair) -> Tensor:
    """Attention on target: the share of each map inside its target; a cell counts by the part covered.

    The energy-based pointing game of Wang et al. 2020 (Score-CAM, arXiv 1910.01279, section 4.3), on tokens.

    Args:
        maps: `(batch, rows, columns)`, each summing to 1.
        target: Boxes or masks, see `coverage`.
        cell: Height and width of a cell in pixels.

    Returns:
        `(batch,)`, 0 to 1.
    """
    covered = coverage(target, maps.shape[1], maps.shape[2], cell).to(maps)
    shares: Tensor = einsum(maps, covered, "batch rows columns, batch rows columns -> batch")
    return shares


def share_of_area(target: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns the share of the picture that a target covers, `(batch,)`: what even attention would reach.

    Args:
        target: Boxes or masks, see `coverage`.
        size: Height and width of the picture in pixels.
    """
    return coverage(target, 1, 1, (float(size[0]), float(size[1])))[:, 0, 0]


def pointing_game(maps: Tensor, target: Tensor, cell: Pair, tolerance: float = 0.0) -> Tensor:
    """Pointing game: 1 where the centre of a map's greatest cell lies in the target, else 0.

    Zhang et al. 2016, "Top-down Neural Attention by Excitation Backprop", arXiv 1608.00507, section 4.1,
    which tolerates 15 pixels.

    Args:
        maps: `(batch, rows, columns)`.
        target: Boxes or masks, see `coverage`.
        cell: Height and width of a cell in pixels.
        tolerance: How far from the target a hit may lie, in pixels, along both axes.

    Returns:
        `(batch,)`.
    """
    greatest = maps.flatten(1).argmax(1)
    y = (greatest // maps.shape[2] + 0.5) * cell[0]
    x = (greatest % maps.shape[2] + 0.5) * cell[1]
    if target.ndim == 2:
        x0, y0, x1, y1 = target.to(maps.device).unbind(1)
        inside = (x >= x0 - tolerance) & (x < x1 + tolerance) & (y >= y0 - tolerance) & (y < y1 + tolerance)
        return inside.to(maps.dtype)
    masks = target.to(maps.device, maps.dtype)
    reach = int(tolerance)
    if reach:
        masks = F.max_pool2d(masks[:, None], 2 * reach + 1, stride=1, padding=reach)[:, 0]
    rows = y.long().clamp(max=masks.shape[1] - 1)  # the last cell may reach beyond the picture
    columns = x.long().clamp(max=masks.shape[2] - 1)
    return (masks[torch.arange(len(maps)), rows, columns] > 0.5).to(maps.dtype)


def entropy(maps: Tensor) -> Tensor:
    """Returns the entropy of each map as a share of that of an even one, `(batch,)`: 0 one cell, 1 all alike.

    Args:
        maps: `(batch, rows, columns)`, each summing to 1.
    """
    cells = maps.shape[1] * maps.shape[2]
    total: Tensor = torch.special.entr(maps).sum((1, 2))
    return total / math.log(max(cells, 2))


def total_variation(maps: Tensor, others: Tensor) -> Tensor:
    """Returns ½ Σ |p - q|, `(batch,)`: the share of the attention that went elsewhere, 0 to 1.

    Args:
        maps: `(batch, rows, columns)`, each summing to 1.
        others: The same shape.
    """
    return (maps - others).abs().sum((1, 2)) / 2


def jensen_shannon(maps: Tensor, others: Tensor) -> Tensor:
    """Returns the Jensen-Shannon divergence in bits, `(batch,)`: 0 for the same maps, 1 for disjoint ones.

    Args:
        maps: `(batch, rows, columns)`, each summing to 1.
        others: The same shape.
    """
    middle = (maps + others) / 2
    gap = torch.special.entr(middle) - (torch.special.entr(maps) + torch.special.entr(others)) / 2
    bits: Tensor = gap.sum((1, 2)) / math.log(2)
    return bits.clamp(min=0)
