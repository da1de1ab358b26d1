"""What a call takes of the active adapter at its beginning, and works with until its end.

Another thread may switch adapters, or delete one, while a call runs. The call reads once which one is active
and keeps hold of its parts, so its answer is that of one of the two states.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor, nn

from toast.config import ToastConfig

#: What stands before the adapter's name in the name of the buffer that holds its fused matrix.
FUSED = "fused_"

if TYPE_CHECKING:
    from toast.selector import ToastSelector
    from toast.value import ToastValue


@dataclass(frozen=True)
class FeedbackMaps:
    """The two maps of one adapter at one block:  y_l = A_l y_{l+1},  s_l = B_l y_l.

    Args:
        layer: The value layer that holds them.
        to_state: A_l.
        to_signal: B_l.
    """

    layer: ToastValue
    to_state: nn.Module
    to_signal: nn.Module

    def bring_down(self, state: Tensor) -> Tensor:
        """Returns y_l = A_l y_{l+1}.

        Where the grid of tokens is finer here, A_l is a transposed convolution whose stride is its size: each
        coarse token gives the fine ones that it was made of.

        Args:
            state: y_{l+1}, `(batch, tokens, above)` or `(batch, rows, columns, above)`.
        """
        weight = next(self.to_state.parameters())
        down: Tensor = self.to_state(state.to(weight.device))
        scale = self.layer.unit.scale
        if scale > 1:
            down = rearrange(down, "b h w (sh sw c) -> b (h sh) (w sw) c", sh=scale, sw=scale)
        return down

    def signal_like(self, shift: Tensor) -> Tensor:
        """Returns an empty signal for the tokens of a value shift, in the dtype of the feedback."""
        weight = next(self.to_signal.parameters())
        return weight.new_empty((*shift.shape[:-1], self.layer.width))


class Fusion:
    """What is known of an adapter's fused matrix (`toast.fuse`) since it was made.

    Args:
        with_values: Whether W_V is part of it. A weight that is quantised or traced afterwards would say
            something else if it were asked in each call.
        own: The adapter's weights that it was computed from.
        frozen: The base's weights that are part of it. One that is replaced, by a quantised one, was right.
        replaced: Whether other weights were loaded since.
    """

    def __init__(
        self, with_values: bool, own: Iterable[Tensor], frozen: Iterable[Tensor], replaced: bool = False
    ) -> None:
        self.with_values = with_values
        self.replaced = replaced
        self._own = [(weight, _version(weight)) for weight in own]
        self._frozen = [(weakref.ref(weight), _version(weight)) for weight in frozen]

    def is_stale(self, own: Iterable[Tensor]) -> bool:
        """Whether a weight was written to or replaced since.

        Args:
            own: The adapter's weights as they are now.
        """
        if self.replaced or torch.compiler.is_compiling():  # traced tensors count no writes
            return self.replaced
        if any(
            now is not then or _version(now) != at for now, (then, at) in zip(own, self._own, strict=True)
        ):
            return True
        frozen = [(weight(), version) for weight, version in self._frozen]
        return any(weight is not None and _version(weight) != version for weight, version in frozen)

    def __reduce__(self) -> tuple[Any, ...]:
        # The weights of a copy count their writes anew.
        own = [weight for weight, _ in self._own]
        frozen = [weight for weight in (held() for held, _ in self._frozen) if weight is not None]
        return Fusion, (self.with_values, own, frozen, self.is_stale(own))


def _version(weight: Tensor) -> int | None:
    """Returns how often a tensor was written to; None of one that does not count."""
    return None if weight.is_inference() else weight._version


@dataclass(frozen=True)
class Adapter:
    """The parts of one adapter.

    Args:
        name: Its name.
        config: Its configuration.
        task_embedding: ξ, `(width,)`.
        channel_transform: P, `(width, width)`.
        maps: Of every steered value projection, bottom block first.
        fused: See `toast.feedback.fused_matrix`; None if it is not fused.
        fusion: What is known of `fused`.
    """

    name: str
    config: ToastConfig
    task_embedding: Tensor
    channel_transform: Tensor
    maps: list[FeedbackMaps]
    fused: Tensor | None = None
    fusion: Fusion | None = None

    def mapped(self) -> Iterator[Tensor]:
        """Yields the weights that a fused matrix is made of: all but the task embedding."""
        yield self.channel_transform
        for maps in self.maps:
            yield from maps.to_state.parameters()
            yield from maps.to_signal.parameters()

    def check_fusion(self) -> None:
        """Refuses to go on with a fused matrix that is not, or will not stay, that of the weights.

        Raises:
            ValueError: If the call needs gradients of the fused weights, or they were written to.
        """
        if self.fusion is None:
            return
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in self.mapped()):
            raise ValueError(
                f"adapter {self.name!r} is fused and trained: its matrix gives no gradient to what it was "
                "made of. Call toast.unfuse(model) to train, or model.requires_grad_(False) for inference."
            )
        if self.fusion.is_stale(self.mapped()):
            raise ValueError(
                f"adapter {self.name!r} was fused, and its weights were changed since. Call "
                "toast.fuse(model) again, or toast.unfuse(model)."
            )


def take(selector: ToastSelector, layers: Sequence[ToastValue]) -> Adapter | None:
    """Returns the parts of the adapter that is active now; None if none is.

    Args:
        selector: The selector, whose active adapter counts for the whole model.
        layers: The value layers, bottom block first. Those that the adapter does not steer are left out.
    """
    name = selector.adapter
    if name is None:
        return None
    maps = [
        FeedbackMaps(layer, layer.toast_to_state[name], layer.toast_to_signal[name])
        for layer in layers
        if name in layer.configs
    ]
    return Adapter(
        name,
        selector.configs[name],
        selector.toast_task_embedding[name],
        selector.toast_channel_transform[name],
        maps,
        selector._buffers.get(f"{FUSED}{name}"),
        selector.fusions.get(name),
    )
