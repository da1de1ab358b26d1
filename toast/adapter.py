"""What a call takes of the active adapter at its beginning, and works with until its end.

Another thread may switch adapters, or delete one, while a call runs. The call reads once which one is active
and keeps hold of its parts, so its answer is that of one of the two states.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor, nn

from toast.compiled import is_transformed
from toast.config import ToastConfig
from toast.families.layouts import is_plain

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
        made_of: The weights that it was computed from: the adapter's, then the base's.
    """

    def __init__(self, with_values: bool, made_of: Iterable[Tensor]) -> None:
        self.with_values = with_values
        self.replaced = False  # whether other weights were loaded since
        weights = list(made_of)
        self._versions = [_version(weight) for weight in weights]
        self._samples = [_sample(weight) for weight in weights]

    def is_stale(self, made_of: Iterable[Tensor]) -> bool:
        """Whether a weight is another than it was.

        PyTorch counts what is written, but not by fused optimisers nor through `.data`, so a few values are
        compared, too. A weight of another precision, or one that is quantised, was right.

        Args:
            made_of: The weights as they are now.
        """
        if self.replaced or is_transformed():  # what is traced has no values
            return self.replaced
        weights = list(made_of)
        if any(
            version is not None and _version(weight) not in (version, None)
            for weight, version in zip(weights, self._versions, strict=True)
        ):
            return True
        now, then = [], []
        for weight, sample in zip(weights, self._samples, strict=True):
            if _is_readable(weight) and weight.dtype == sample.dtype:
                now.append(_sample(weight))
                then.append(sample.to(weight.device))
        return bool(now) and not torch.equal(torch.cat(now), torch.cat(then))

    def __deepcopy__(self, memo: dict[int, Any]) -> Fusion:
        return _copied(self.with_values, self.replaced, self._samples)

    def __reduce__(self) -> tuple[Any, ...]:
        return _copied, (self.with_values, self.replaced, self._samples)


def _copied(with_values: bool, replaced: bool, samples: list[Tensor]) -> Fusion:
    """Returns what is known of the matrix of a copied model, whose weights count their writes anew."""
    fusion = Fusion(with_values, [])
    fusion.replaced = replaced
    fusion._versions, fusion._samples = [None] * len(samples), samples
    return fusion


def _version(weight: Tensor) -> int | None:
    """Returns how often a tensor was written to; None of one that does not count."""
    return None if weight.is_inference() or not _is_readable(weight) else weight._version


def _is_readable(weight: Tensor) -> bool:
    return is_plain(weight) and not weight.is_meta


def _sample(weight: Tensor) -> Tensor:
    """Returns a few values of a weight, copied."""
    flat = weight.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // 8)].clone()


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
