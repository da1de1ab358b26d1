"""The first pass by itself, to be computed once for each sample and used in every epoch.

Without augmentation the first pass of a frozen model is a function of the sample, so a step on a stored one
costs a plain step. With `steer_from` the state that enters the steered blocks is stored too, and the step
skips the blocks below.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toast.model import find_steering
from toast.passes import Pass, collecting, giving
from toast.steering import Steering


@dataclass
class FirstPass:
    """What the second pass needs of the first.

    Args:
        unnormed: Features before the final norm, `(batch, tokens, width)`, channels last; None if not read.
        normed: Features after it; None if not read.
        entering: What enters the lowest steered block, `(batch, tokens, width)`; None if all are steered.
        in_tuple: Whether blocks give it as the first of a tuple.
    """

    unnormed: Tensor | None
    normed: Tensor | None
    entering: Tensor | None = None
    in_tuple: bool = False

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors by name; the first dimension of each is the batch."""
        named = {"unnormed": self.unnormed, "normed": self.normed, "entering": self.entering}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to(self, *args: Any, **kwargs: Any) -> FirstPass:
        """Moves or casts all tensors, as `Tensor.to` does."""
        moved = {name: tensor.to(*args, **kwargs) for name, tensor in self.tensors().items()}
        return FirstPass(
            moved.get("unnormed"), moved.get("normed"), moved.get("entering"), in_tuple=self.in_tuple
        )

    def fill(self, this: Pass, inputs: dict[str, Any]) -> None:
        """Puts what is stored where the first pass would have left it.

        Args:
            this: The first pass of a call, which does not run.
            inputs: The call's inputs.

        Raises:
            ValueError: If it is of another batch or another steer_from.
        """
        given = next(x for x in inputs.values() if isinstance(x, Tensor))
        wrong = [name for name, tensor in self.tensors().items() if tensor.shape[0] != given.shape[0]]
        if wrong:
            raise ValueError(
                f"the stored first pass has {self.tensors()[wrong[0]].shape[0]} samples, the call "
                f"{given.shape[0]}."
            )
        if this.once and self.entering is None:
            raise ValueError(
                "the stored first pass has no state that enters the steered blocks, which steer_from needs; "
                "it was made with another setting. Make it again with this model."
            )
        this.features = (self.unnormed, self.normed)
        this.known = (self.entering, None, None) if self.in_tuple else self.entering


@torch.no_grad()
def first_pass(model: nn.Module, *inputs: Any, **kwargs: Any) -> FirstPass:
    """Runs the first pass of a call alone.

    Args:
        model: A wrapped model; dropout and the like act as its mode says, so call `model.eval()` first.
        *inputs: Inputs of the model.
        **kwargs: Further inputs.

    Raises:
        ValueError: If the model has no active adapter, or the call keeps a key-value cache.

    Example:
        >>> import timm, toast, torch
        >>> model = toast.wrap(timm.create_model("vit_tiny_patch16_224"), steer_from=6).eval()
        >>> images = torch.randn(1, 3, 224, 224)
        >>> stored = toast.first_pass(model, images)
        >>> {name: tuple(tensor.shape) for name, tensor in stored.tensors().items()}
        {'normed': (1, 197, 192), 'entering': (1, 197, 192)}
        >>> with toast.given_first_pass(model, stored), torch.no_grad():
        ...     logits = model(images)
        >>> torch.equal(logits, model(images))
        True
    """
    steering = _steering(model, "first_pass")
    with collecting(steering) as collected:
        model(*inputs, **kwargs)
    if len(collected) != 1:
        raise ValueError(f"first_pass needs a call that runs the trunk once; it ran {len(collected)} times.")
    this = collected[0]
    assert this.features is not None
    read = steering.selector.config.select_features
    unnormed, normed = this.features
    known = this.known
    return FirstPass(
        unnormed=None if read == "normed" else unnormed,
        normed=None if read == "unnormed" else normed,
        entering=known[0] if isinstance(known, tuple) else known,
        in_tuple=isinstance(known, tuple),
    )


def given_first_pass(model: nn.Module, stored: FirstPass) -> AbstractContextManager[None]:
    """Makes the calls of a model in this thread use a stored first pass; they run the second pass only.

    Args:
        model: The wrapped model.
        stored: `toast.first_pass` of the same model, settings and inputs.

    Raises:
        ValueError: If the model has no active adapter; when called, also if the call keeps a key-value cache,
            or what is stored does not fit.
    """
    return giving(_steering(model, "given_first_pass"), stored)


def _steering(model: nn.Module, what: str) -> Steering:
    steering = find_steering(model)
    if steering is None or steering.selector.adapter is None:
        raise ValueError(f"{what} needs a model with an active TOAST adapter; wrap it with toast.wrap first.")
    return steering
