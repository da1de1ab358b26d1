"""What counts on a picture's target: one rule for all who measure it, and the names of what is measured.

Measured are pictures whose target is in sight. One that is not known, or that the preparation has cropped
away, makes no figure 0: the picture is left out, and how many were measured stands beside the figure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from einops import einsum
from torch import Tensor

from toast.visual.grids import Maps
from toast.visual.measures import coverage, share_in_target

#: What is measured of each picture: share of the attention on the target, and the mean selection weight
#: inside and outside of it.
ATTENTION, INSIDE, OUTSIDE = "attention_on_target", "selection_inside", "selection_outside"
#: The mean weight inside over that outside, of means over pictures.
RATIO = "selection_ratio"
#: Area in tokens, below which there is only what rounding leaves.
_LEAST = 1e-4


def is_known(target: Tensor) -> Tensor:
    """Returns which pictures have a target at all, `(batch,)`: a box or mask of not-a-number is none."""
    return ~target.float().flatten(1).isnan().any(1)


def in_sight(target: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Returns which targets are in sight, `(batch,)`.

    Of a mask at least one pixel is the target's by half or more: what is less is what resampling has left of
    a target beyond the edge. A box has to have a part in the picture.

    Args:
        target: Boxes `(batch, 4)` in pixels or masks `(batch, height, width)`; not-a-number where there is
            none.
        size: Height and width of the picture in pixels; a mask has its own.
    """
    if target.ndim == 3:
        return (target.float() >= 0.5).flatten(1).any(1)
    assert size is not None
    x0, y0, x1, y1 = target.float().unbind(1)
    across = x1.clamp(max=size[1]) - x0.clamp(min=0)
    return (across > 0) & (y1.clamp(max=size[0]) - y0.clamp(min=0) > 0)


def frame(target: Tensor) -> list[float] | None:
    """Returns what is drawn around a target: x0, y0, x1, y1 in pixels; None if none is in sight.

    Args:
        target: A box `(4,)`, which is returned as it is, or a mask `(height, width)`, 0 to 1.
    """
    if target.ndim == 1:
        return target.tolist() if bool(is_known(target[None])) else None
    inside = (target >= 0.5).nonzero()
    if not len(inside):
        return None
    (y0, x0), (y1, x1) = inside.amin(0).tolist(), inside.amax(0).tolist()
    return [x0, y0, x1 + 1, y1 + 1]


def measure(
    attention: Maps | None, selection: Maps | None, target: Tensor, size: tuple[int, int]
) -> dict[str, Tensor]:
    """Measures pictures against their targets.

    Args:
        attention: Each map sums to 1; None measures no attention.
        selection: Selection weights; None of a model that selects nothing.
        target: As of `in_sight`.
        size: Height and width of the picture in pixels.

    Returns:
        Name -> `(batch,)`, float32 or finer; not a number where no target is in sight, and for the selection
        where nothing lies outside of it.
    """
    seen = in_sight(target, size).cpu()
    visible = target[seen.to(target.device)].cpu()
    found: dict[str, Tensor] = {}
    if attention is not None:
        shares = share_in_target(attention.values[seen], visible, attention.cell)
        found[ATTENTION] = _spread(shares, seen)
    if selection is not None:
        inside, outside = inside_and_outside(Maps(selection.values[seen], selection.cell), visible, size)
        found |= {INSIDE: _spread(inside, seen), OUTSIDE: _spread(outside, seen)}
    return found


def _spread(values: Tensor, seen: Tensor) -> Tensor:
    """Returns values of the pictures that were measured at their places among all."""
    spread = torch.full((len(seen),), torch.nan, dtype=values.dtype)
    spread[seen] = values
    return spread


def inside_and_outside(weights: Maps, target: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Returns the mean weight of the tokens inside a target and of those outside, `(batch,)` each.

    A token counts by the part of its place that the target covers, and outside by the rest of it that is in
    the picture. Not a number, both, where the target covers nothing of the grid or all of it.

    Args:
        weights: Weights of tokens.
        target: Boxes in pixels or masks, one a map, all in sight.
        size: Height and width of the picture in pixels.
    """
    rows, columns = weights.values.shape[1:]
    covered = coverage(target, rows, columns, weights.cell).to(weights.values)
    whole = torch.tensor([[0, 0, size[1], size[0]]])
    rest = (coverage(whole, rows, columns, weights.cell).to(weights.values) - covered).clamp(min=0)
    inside, outside = (part.sum((1, 2)) for part in (covered, rest))
    known = (inside > _LEAST) & (outside > _LEAST)

    def mean(part: Tensor, area: Tensor) -> Tensor:
        total = einsum(weights.values, part, "batch rows columns, batch rows columns -> batch")
        return torch.where(known, total / area, torch.nan)

    return mean(covered, inside), mean(rest, outside)


def ratio(means: Mapping[str, float]) -> float | None:
    """Returns how much more is selected inside of targets than outside: above 1 the selector selects them.

    It is the ratio of the two means over pictures, not the mean of the pictures' ratios, which one picture
    with no weight outside would make infinite. None where even the mean outside is 0, and where there is no
    selection: the two means say it then.

    Args:
        means: Figures by name, `selection_inside` and `selection_outside` among them if there are any.
    """
    inside, outside = means.get(INSIDE), means.get(OUTSIDE)
    if inside is None or not outside or math.isnan(inside) or math.isnan(outside):
        return None
    return inside / outside
