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
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from toast.products import weighted_product

if TYPE_CHECKING:
    from toast.selector import Selection
    from toast.value import ToastValue


@dataclass(frozen=True)
class ComposedSignal:
    """What a block's values get in the composed form.

    Args:
        selection: The selected tokens, `(batch, tokens, width)`.
        matrix: What maps them to the value shift, the channel map included, `(width, value_width)`.
    """

    selection: Selection
    matrix: Tensor

    def value_shift(self, dtype: torch.dtype) -> Tensor:
        """Returns `W_V s`, `(batch, tokens, value_width)`."""
        device = self.matrix.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        selection, matrix = self.selection, self.matrix.to(dtype)
        if selection.features.requires_grad:  # something beside TOAST is trained
            return selection.tokens.to(dtype) @ matrix
        return weighted_product(selection.weights, selection.detached_tokens(dtype), matrix)


@dataclass(frozen=True)
class FusedSignal:
    """What a block's values get where all blocks' shifts were computed at once (`toast.fuse`).

    Args:
        shift: `W_V s`, `(batch, tokens, value_width)`.
    """

    shift: Tensor

    def value_shift(self, dtype: torch.dtype) -> Tensor:
        """Returns `W_V s`, `(batch, tokens, value_width)`."""
        return self.shift.to(dtype)


#: What a block gets: a signal for every token, with the channels last, or what its values get.
Signal = Tensor | ComposedSignal | FusedSignal


def feed_back(
    values: Sequence[ToastValue], selection: Selection, form: str = "auto"
) -> dict[ToastValue, Signal]:
    """Feeds the selected features back to every block.

    Args:
        values: The steered value projections, bottom block first.
        selection: The selected features, `(batch, tokens, width)`, or a grid of tokens, channels last.
        form: `per_token`, `composed`, or `auto` for the cheaper one. A fused model has its own.

    Returns:
        By projection, its signal `(batch, tokens, width)`, or another form of it.

    Raises:
        ValueError: If `composed` is asked for where it cannot be.
    """
    if selection.fused is not None:
        return fused_signals(values, selection.tokens, selection.fused)
    if form == "composed" and not can_compose(values):
        raise ValueError(
            "feedback_form='composed' needs blocks of the same tokens and width, value projections with "
            "plain weights, and no LoRA dropout in training; use 'auto' or 'per_token'."
        )
    tokens = selection.weights.numel()
    if form == "composed" or (form == "auto" and can_compose(values) and composing_pays(values, tokens)):
        matrices = value_matrices(values, selection.channel_transform)
        return {value: ComposedSignal(selection, m) for value, m in zip(values, matrices, strict=True)}
    return dict(zip(values, signals(values, selection.selected), strict=True))


def fused_signals(values: Sequence[ToastValue], tokens: Tensor, matrix: Tensor) -> dict[ToastValue, Signal]:
    """Returns the signals of a fused model: one product for all blocks.

    Args:
        values: The steered value projections, bottom block first.
        tokens: Weighted features, `(batch, tokens, width)`.
        matrix: See `fused_matrix`.
    """
    shifted = all(value.can_shift for value in values)
    sizes = [value.value_width if shifted else value.width for value in values]
    parts = torch.split(tokens.to(matrix.dtype) @ matrix, sizes, dim=-1)
    return {v: FusedSignal(part) if shifted else part for v, part in zip(values, parts, strict=True)}


def fused_matrix(values: Sequence[ToastValue], channel_transform: Tensor) -> Tensor:
    """Returns what maps weighted features to every block's value shift, side by side.

    Args:
        values: The steered value projections, bottom block first.
        channel_transform: P, `(width, width)`.

    Returns:
        P (W_V B_l A_l … A_{L-1})ᵀ of all blocks, `(width, sum of value_width)`. Where a projection's weight
        does not say what it computes (a quantised one), without W_V: `(width, blocks * width)`.
    """
    shifted = all(value.can_shift for value in values)
    return torch.cat(value_matrices(values, channel_transform, with_values=shifted), dim=-1)


def signals(values: Sequence[ToastValue], selected: Tensor) -> list[Tensor]:
    """Returns the top-down signal of every block, one token at a time.

    Args:
        values: The steered value projections, bottom block first.
        selected: The selected features, `(batch, tokens, width)`.

    Returns:
        A signal for each block, bottom first, each `(batch, tokens, width)`; where the grid of tokens gets
        coarser on the way up, it gets finer on the way down.
    """
    state, found = selected, []
    for value in reversed(values):
        to_signal = value.maps[1]
        state = value.bring_down(state)
        found.append(to_signal(state))
    return found[::-1]


def value_matrices(
    values: Sequence[ToastValue], channel_transform: Tensor, with_values: bool = True
) -> list[Tensor]:
    """Returns what maps weighted features to each block's value shift, composed in weight space.

    The rows of P go down the feedback path as tokens do, so what is trained is trained through them; low-rank
    factors stay factors.

    Args:
        values: The steered value projections, bottom block first, each with a plain weight.
        channel_transform: P, `(width, width)`.
        with_values: Whether W_V is part of it; else it maps to the signals.

    Returns:
        P (W_V B_l A_l … A_{L-1})ᵀ for each block, bottom first, each `(width, value_width)`.
    """
    # Without autocast: rounding would pile up along the chain.
    with torch.autocast(channel_transform.device.type, enabled=False):
        maps = signals(values, channel_transform)
        if not with_values:
            return maps
        weights = [value.layout.value_weight(value.base_layer) for value in values]
        return [F.linear(rows, weight.to(rows.dtype)) for rows, weight in zip(maps, weights, strict=True)]  # type: ignore[union-attr]


def can_compose(values: Sequence[ToastValue]) -> bool:
    """Whether the feedback can be composed.

    Not where blocks differ in tokens or width, nor with dropout between the LoRA factors, nor if a value
    projection's weight does not say what it computes (quantised, wrapped, fetched from elsewhere), nor across
    devices.
    """
    if not alike(values):
        return False
    if values[0].config.lora_dropout > 0 and values[0].training:
        return False
    weights = [value.layout.value_weight(value.base_layer) for value in values]
    known = [weight for weight in weights if weight is not None]
    return len(known) == len(values) and len({weight.device for weight in known}) == 1


def alike(values: Sequence[ToastValue]) -> bool:
    """Whether all blocks have the same tokens and width."""
    top = values[-1].unit.above
    return all(v.tokens == "sequence" and v.unit.scale == 1 and v.unit.above == top for v in values)


def composing_pays(values: Sequence[ToastValue], tokens: int) -> bool:
    """Whether the composed form does fewer multiplications than the chain, for a call of so many tokens."""
    width = values[0].width
    per_token = composed = 0
    for value in values:
        value_width = value.value_width
        # a separate projection takes x + s in the product that it does anyway
        own_product = not value.layout.whole
        per_token += tokens * width * (2 * width + own_product * value_width)
        composed += width * (tokens * value_width + width * (width + 2 * value_width))
    return composed < per_token
