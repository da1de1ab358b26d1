"""What goes from the selector to the blocks: the selected features, and the kinds of signal made of them.

Shapes: `width` channels, `value_width` channels of the values (fewer under grouped-query attention).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Selection:
    """What the selector makes of the features. Channels last.

    Args:
        features: The features that were read, h, `(batch, tokens, width)`.
        weights: The selection weights, w, `(batch, tokens)`, from 0 to 1.
        channel_transform: P, `(width, width)`.
    """

    features: Tensor
    weights: Tensor
    channel_transform: Tensor
    _cast: dict[tuple[torch.dtype, torch.device], Tensor] = field(default_factory=dict, repr=False)

    @property
    def tokens(self) -> Tensor:
        """Features after token selection: w · h."""
        return self.weights[..., None] * self.features

    @property
    def selected(self) -> Tensor:
        """Features after token and channel selection: (w · h) P."""
        return self.tokens @ self.channel_transform

    def product(self, matrix: Tensor) -> Tensor:
        """Returns (w · h) N of the selected tokens, computed as w · (h N).

        The features are frozen, so their product with N has one product in its backward, that for N; and the
        gradient of a weight, ⟨∂y, h N⟩, is as fine for a weight near 0, which half precision would lose.

        Args:
            matrix: N, `(width, out)`.
        """
        return self.weights[..., None].to(matrix) * (self._features_like(matrix) @ matrix)

    def _features_like(self, matrix: Tensor) -> Tensor:
        """Returns the features like a matrix (dtype, device); of frozen ones a copy is made only once."""
        wanted = (matrix.dtype, matrix.device)
        if self.features.requires_grad or wanted == (self.features.dtype, self.features.device):
            return self.features.to(matrix)
        if wanted not in self._cast:
            self._cast[wanted] = self.features.to(matrix)
        return self._cast[wanted]


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
        return self.selection.product(self.matrix.to(dtype))


@dataclass(frozen=True)
class FusedSignal:
    """What a block's values get where the shifts are computed before the second pass.

    That is so in a fused model (`toast.fuse`), and for a batch of several adapters.

    Args:
        shift: `W_V s`, `(batch, tokens, value_width)`.
    """

    shift: Tensor

    def value_shift(self, dtype: torch.dtype) -> Tensor:
        """Returns `W_V s`, `(batch, tokens, value_width)`."""
        return self.shift.to(dtype)


#: What a block gets: a signal for every token, with the channels last, or what its values get.
Signal = Tensor | ComposedSignal | FusedSignal
