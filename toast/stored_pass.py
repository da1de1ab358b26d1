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

from toast.config import ToastConfig
from toast.model import active_parts
from toast.passes import Pass, collecting, giving


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
    steering, adapter = active_parts(model, "first_pass")
    with steering.holding(adapter), collecting(steering) as collected:
        model(*inputs, **kwargs)
    if len(collected) != 1:
        raise ValueError(f"first_pass needs a call that runs the trunk once; it ran {len(collected)} times.")
    this = collected[0]
    assert this.features is not None
    read = adapter.config.select_features
    unnormed, normed = this.features
    known, given = this.known, main_input(this.inputs)
    return FirstPass(
        unnormed=None if read == "normed" else unnormed,
        normed=None if read == "unnormed" else normed,
        entering=known[0] if isinstance(known, tuple) else known,
        in_tuple=isinstance(known, tuple),
        origin=Origin(settings_of(adapter.config), tuple(given.shape[1:])),
    )


def given_first_pass(model: nn.Module, stored: FirstPass) -> AbstractContextManager[None]:
    """Makes the calls of a model use a stored first pass; they run the second pass only.

    It holds in this thread until the `with` block ends. One of a generator or a coroutine holds while that
    runs: not between two `yield`s, nor for other coroutines while it waits.

    Args:
        model: The wrapped model.
        stored: `toast.first_pass` of the same model, settings and inputs.

    Raises:
        ValueError: If the model has no active adapter; when called, also if the call keeps a key-value cache,
            or what is stored does not fit.
    """
    return giving(active_parts(model, "given_first_pass")[0], stored)
