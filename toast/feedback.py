"""The feedback path: from the selected features to what every block's values get.

It is linear, so it has two forms that compute the same:

- per token:  y_l = A_l y_{l+1},  s_l = B_l y_l  for every token, then the value projection of x_l + s_l;
- composed:   one matrix a block,  W_V B_l A_l … A_{L-1},  multiplied in weight space (differentiably, so the
  maps are trained through it), then applied to the selected features, and added to the values.

A composed step costs one product a token and block in the place of three (forward; three in the place of
eight with backward) and keeps no chain of states for backward, but a few products of whole matrices. It pays
when a call has more tokens than about the width.

Shapes: `width` channels, `value_width` channels of the values (fewer under grouped-query attention).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from toast.adapter import Adapter, FeedbackMaps
from toast.signals import ComposedSignal, FusedSignal, Selection, Signal


def feed_back(adapter: Adapter, selection: Selection) -> dict[int, Signal]:
    """Feeds the selected features back to every block.

    Args:
        adapter: The adapter of the call. Its `feedback_form` says in which form; a fused one has its own.
        selection: The selected features, `(batch, tokens, width)`, or a grid of tokens, channels last.

    Returns:
        By number of the unit, its signal `(batch, tokens, width)`, or another form of it.

    Raises:
        ValueError: If the composed form is asked for where it cannot be.
    """
    maps, form = adapter.maps, adapter.config.feedback_form
    found: Sequence[Signal]
    if adapter.fused is not None and adapter.fusion is not None:
        found = fused_signals(maps, selection.tokens, adapter.fused, adapter.fusion.with_values)
        return _by_number(maps, found)
    if form == "composed" and not can_compose(adapter):
        raise ValueError(
            "feedback_form='composed' needs blocks of the same tokens and width, value projections with "
            "plain weights, and no LoRA dropout in training; use 'auto' or 'per_token'."
        )
    tokens = selection.weights.numel()
    if form == "composed" or (form == "auto" and can_compose(adapter) and composing_pays(maps, tokens)):
        matrices = value_matrices(maps, selection.channel_transform)
        found = [ComposedSignal(selection, matrix) for matrix in matrices]
    else:
        found = signals(maps, selection.selected)
    return _by_number(maps, found)


def _by_number(maps: Sequence[FeedbackMaps], found: Sequence[Signal]) -> dict[int, Signal]:
    return {each.unit.number: signal for each, signal in zip(maps, found, strict=True)}


def fused_signals(
    maps: Sequence[FeedbackMaps], tokens: Tensor, matrix: Tensor, with_values: bool
) -> list[Signal]:
    """Returns the signals of a fused model: one product for all blocks.

    Args:
        maps: The maps of every block, bottom block first.
        tokens: Weighted features, `(batch, tokens, width)`.
        matrix: See `fused_matrix`.
        with_values: Whether it gives value shifts, and not signals.
    """
    sizes = [each.value_width if with_values else each.width for each in maps]
    parts = torch.split(tokens.to(matrix.dtype) @ matrix, sizes, dim=-1)
    return [FusedSignal(part) if with_values else part for part in parts]


def fused_matrix(maps: Sequence[FeedbackMaps], channel_transform: Tensor) -> tuple[Tensor, bool]:
    """Returns what maps weighted features to every block's value shift, side by side.

    Args:
        maps: The maps of every block, bottom block first.
        channel_transform: P, `(width, width)`.

    Returns:
        P (W_V B_l A_l … A_{L-1})ᵀ of all blocks, `(width, sum of value_width)`. Where a projection's weight
        does not say what it computes (a quantised one), without W_V: `(width, blocks * width)`. And whether
        W_V is part of it.
    """
    with_values = all(each.value_weight is not None for each in maps)
    matrices = value_matrices(maps, channel_transform, with_values)
    return torch.cat([each.to(channel_transform.device) for each in matrices], dim=-1), with_values


def signals(maps: Sequence[FeedbackMaps], selected: Tensor) -> list[Tensor]:
    """Returns the top-down signal of every block, one token at a time.

    Args:
        maps: The maps of every block, bottom block first.
        selected: The selected features, `(batch, tokens, width)`.

    Returns:
        A signal for each block, bottom first, each `(batch, tokens, width)`; where the grid of tokens gets
        coarser on the way up, it gets finer on the way down.
    """
    state, found = selected, []
    for each in reversed(maps):
        state = each.bring_down(state)
        found.append(each.to_signal(state))
    return found[::-1]


def value_matrices(
    maps: Sequence[FeedbackMaps], channel_transform: Tensor, with_values: bool = True
) -> list[Tensor]:
    """Returns what maps weighted features to each block's value shift, composed in weight space.

    The rows of P go down the feedback path as tokens do, so what is trained is trained through them; low-rank
    factors stay factors.

    Args:
        maps: The maps of every block, bottom block first; each projection with a plain weight.
        channel_transform: P, `(width, width)`.
        with_values: Whether W_V is part of it; else it maps to the signals.

    Returns:
        P (W_V B_l A_l … A_{L-1})ᵀ for each block, bottom first, each `(width, value_width)`.
    """
    # Without autocast: rounding would pile up along the chain.
    with torch.autocast(channel_transform.device.type, enabled=False):
        rows = signals(maps, channel_transform)
        if not with_values:
            return rows
        weights = [each.value_weight for each in maps]
        return [F.linear(each, weight.to(each.dtype)) for each, weight in zip(rows, weights, strict=True)]  # type: ignore[union-attr]


def can_compose(adapter: Adapter) -> bool:
    """Whether the feedback can be composed.

    Not where blocks differ in tokens or width, nor with dropout between the LoRA factors, nor if a value
    projection's weight does not say what it computes (quantised, wrapped, sharded, fetched from elsewhere).
    """
    maps = adapter.maps
    if not alike(maps):
        return False
    if adapter.config.lora_dropout > 0 and maps[0].layer.training:
        return False
    return all(each.value_weight is not None for each in maps)


def alike(maps: Sequence[FeedbackMaps]) -> bool:
    """Whether all blocks have the same tokens and width."""
    top = maps[-1].unit.above
    return all(m.tokens == "sequence" and m.unit.scale == 1 and m.unit.above == top for m in maps)


def composing_pays(maps: Sequence[FeedbackMaps], tokens: int) -> bool:
    """Whether the composed form does fewer multiplications than the chain, for a call of so many tokens."""
    width = maps[0].width
    per_token = composed = 0
    for each in maps:
        value_width = each.value_width
        # a separate projection takes x + s in the product that it does anyway
        own_product = not each.unit.layout.whole
        per_token += tokens * width * (2 * width + own_product * value_width)
        composed += width * (tokens * value_width + width * (width + 2 * value_width))
    return composed < per_token
