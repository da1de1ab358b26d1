"""What the second pass of a call needs of the first, stored; see `toast.first_pass`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toast.config import ToastConfig
from toast.passes import Pass


@dataclass(frozen=True)
class Origin:
    """What a first pass was made of, so that it is not used for something else.

    Args:
        settings: The adapter's settings that decide what is stored.
        shape: Shape of the model's main input, without the batch.
    """

    settings: dict[str, Any]
    shape: tuple[int, ...]


@dataclass
class FirstPass:
    """What the second pass needs of the first.

    Args:
        unnormed: Features before the final norm, `(batch, tokens, width)`, channels last; None if not read.
        normed: Features after it; None if not read.
        entering: What enters the lowest steered block, `(batch, tokens, width)`; None if all are steered.
        in_tuple: Whether blocks give it as the first of a tuple.
        origin: What it was made of; None leaves it to the caller to know.
    """

    unnormed: Tensor | None
    normed: Tensor | None
    entering: Tensor | None = None
    in_tuple: bool = False
    origin: Origin | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors by name; the first dimension of each is the batch."""
        named = {"unnormed": self.unnormed, "normed": self.normed, "entering": self.entering}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to(self, *args: Any, **kwargs: Any) -> FirstPass:
        """Moves or casts all tensors, as `Tensor.to` does."""
        moved = {name: tensor.to(*args, **kwargs) for name, tensor in self.tensors().items()}
        return FirstPass(
            moved.get("unnormed"), moved.get("normed"), moved.get("entering"), self.in_tuple, self.origin
        )

    def fill(self, this: Pass, inputs: dict[str, Any]) -> None:
        """Puts what is stored where the first pass would have left it.

        Args:
            this: The first pass of a call, which does not run.
            inputs: The call's inputs.

        Raises:
            ValueError: If it is of another batch, shape of input or other settings, or the call needs a
                gradient that only a first pass that runs could give.
        """
        assert this.adapter is not None
        settings = settings_of(this.adapter.config)
        given = main_input(inputs)
        wrong = [name for name, tensor in self.tensors().items() if tensor.shape[0] != given.shape[0]]
        if wrong:
            raise ValueError(
                f"the stored first pass has {self.tensors()[wrong[0]].shape[0]} samples, the call "
                f"{given.shape[0]}."
            )
        differ = [
            key
            for key, value in (self.origin.settings if self.origin else {}).items()
            if settings[key] != value
        ]
        if differ:
            assert self.origin is not None
            raise ValueError(
                f"the stored first pass was made with {differ[0]}={self.origin.settings[differ[0]]!r}, the "
                f"adapter has {settings[differ[0]]!r}. Make it again with this model."
            )
        if this.once and self.entering is None:
            raise ValueError(
                "the stored first pass has no state that enters the steered blocks, which steer_from needs; "
                "it was made with another setting. Make it again with this model."
            )
        reads = settings["select_features"]
        missing = [n for n in NEEDED[reads] if getattr(self, n) is None]
        if missing:
            raise ValueError(
                f"the stored first pass has no {missing[0]} features, which select_features={reads!r} needs. "
                "Make it again with this model."
            )
        self._check_origin(given)
        if torch.is_grad_enabled() and given.requires_grad:
            raise ValueError(
                "the inputs require a gradient, and a part of it goes through the first pass; a stored one "
                "has no graph. Call the model without toast.given_first_pass."
            )
        this.features = (self.unnormed, self.normed)
        this.known = (self.entering, None, None) if self.in_tuple else self.entering

    def _check_origin(self, given: Tensor) -> None:
        if self.origin is None:
            return
        if tuple(given.shape[1:]) != self.origin.shape:
            raise ValueError(
                f"the stored first pass is of inputs of shape {self.origin.shape}, the call's are "
                f"{tuple(given.shape[1:])}, without the batch."
            )


#: What the selector reads -> which features have to be stored.
NEEDED = {"normed": ("normed",), "unnormed": ("unnormed",), "mixed": ("unnormed", "normed")}


def settings_of(config: ToastConfig) -> dict[str, Any]:
    """Returns the settings of an adapter that decide what its first pass leaves."""
    return {name: getattr(config, name) for name in ("select_features", "select_from", "steer_from")}


def main_input(inputs: dict[str, Any]) -> Tensor:
    """Returns the first tensor among the inputs of a call: pictures, tokens or embeddings."""
    return next(x for x in inputs.values() if isinstance(x, Tensor))
