"""What a call takes of the active adapter at its beginning, and works with until its end.

Another thread may switch adapters, or delete one, while a call runs. The call reads once which one is active
and keeps hold of its parts, so its answer is that of one of the two states.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from toast.config import ToastConfig
from toast.families.anatomy import Unit
from toast.fusion import Fusion
from toast.layer import ToastLayer


@dataclass(frozen=True)
class FeedbackMaps:
    """The two maps of one adapter at one block:  y_l = A_l y_{l+1},  s_l = B_l y_l.

    Args:
        layer: The value layer that holds them.
        unit: Its place in the feedback path.
        tokens: The family's order of tokens, see `toast.families.tokens`.
        to_state: A_l.
        to_signal: B_l.
    """

    layer: ToastLayer
    unit: Unit
    tokens: str
    to_state: nn.Module
    to_signal: nn.Module

    @property
    def width(self) -> int:
        """Channels of the signal."""
        return self.unit.width

    @property
    def value_width(self) -> int:
        """Channels of the values."""
        return self.unit.layout.value_width

    @property
    def value_weight(self) -> Tensor | None:
        """W_V, `(value_width, width)`; None if the projection's weight does not say what it computes."""
        return self.unit.layout.value_weight(self.layer.base_layer)

    def bring_down(self, state: Tensor) -> Tensor:
        """Returns y_l = A_l y_{l+1}.

        Where the grid of tokens is finer here, A_l is a transposed convolution whose stride is its size: each
        coarse token gives the fine ones that it was made of.

        Args:
            state: y_{l+1}, `(batch, tokens, above)` or `(batch, rows, columns, above)`.
        """
        weight = next(self.to_state.parameters())
        down: Tensor = self.to_state(state.to(weight.device))
        scale = self.unit.scale
        if scale > 1:
            down = rearrange(down, "b h w (sh sw c) -> b (h sh) (w sw) c", sh=scale, sw=scale)
        return down

    def signal_like(self, shift: Tensor) -> Tensor:
        """Returns an empty signal for the tokens of a value shift, in the dtype of the feedback."""
        weight = next(self.to_signal.parameters())
        shape = (*shift.shape[:-1], self.width)
        return torch.empty(shape, dtype=weight.dtype, device=weight.device)


@dataclass(frozen=True)
class Adapter:
    """The parts of one adapter.

    Args:
        name: Its name.
        config: Its configuration.
        task_embedding: ξ, `(width,)`; one for each sample, `(batch, width)`, where the caller gave them.
        channel_transform: P, `(width, width)`.
        maps: Of every steered value projection, bottom block first.
        fused: See `toast.feedback.fused_matrix`; None if it is not fused.
        fusion: What is known of `fused`.
        attends: Whether the task embedding is the caller's (`toast.attend_to`), and not the adapter's own.
        generates: Whether the call is of `generate`, which may run several sequences of a sample.
    """

    name: str
    config: ToastConfig
    task_embedding: Tensor
    channel_transform: Tensor
    maps: list[FeedbackMaps]
    fused: Tensor | None = None
    fusion: Fusion | None = None
    attends: bool = False
    generates: bool = False

    def embedding_for(self, features: Tensor) -> Tensor:
        """Returns ξ in a shape that goes with features, `(batch, …, width)`.

        Raises:
            ValueError: If there is one for each sample, but of another number of samples.
        """
        if self.task_embedding.ndim == 1:
            return self.task_embedding
        samples, count = features.shape[0], self.task_embedding.shape[0]
        times = samples // count if self.generates else 1
        if times * count != samples:
            raise ValueError(
                f"attend_to was given {count} task embeddings, one for each sample; the call has {samples} "
                "samples. Pass as many, or one of shape (width,) for all."
            )
        each = self.task_embedding.repeat_interleave(times, 0)
        return each.view(samples, *[1] * (features.ndim - 2), -1)

    def mapped(self) -> Iterator[Tensor]:
        """Yields what of the adapter a fused matrix is made of: all but the task embedding."""
        yield self.channel_transform
        for maps in self.maps:
            yield from maps.to_state.parameters()
            yield from maps.to_signal.parameters()

    def fused_from(self, with_values: bool) -> Iterator[Tensor]:
        """Yields all weights that a fused matrix is made of, those of the base last."""
        yield from self.mapped()
        if with_values:
            for maps in self.maps:
                yield maps.layer.base_layer.weight  # type: ignore[misc]

    def refuse_training_fused(self) -> None:
        """Refuses a call that needs gradients of weights which a fused matrix stands for.

        Raises:
            ValueError: If it does.
        """
        fused = self.fusion is not None and torch.is_grad_enabled()
        if fused and any(weight.requires_grad for weight in self.mapped()):
            raise ValueError(
                f"adapter {self.name!r} is fused and trained: its matrix passes no gradient to the "
                "weights it was made of. Call toast.unfuse(model) to train, or "
                "model.requires_grad_(False) for inference."
            )

    def refuse_stale_fusion(self) -> None:
        """Refuses a fused matrix that is not that of the weights any more.

        Raises:
            ValueError: If they were changed since.
        """
        if self.fusion is not None and self.fusion.is_stale(self.fused_from(self.fusion.with_values)):
            raise ValueError(
                f"adapter {self.name!r} was fused, and its weights or those of the value projections were "
                "changed since. Call toast.fuse(model) again, or toast.unfuse(model)."
            )
