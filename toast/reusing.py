"""The first pass by itself, to be computed once for each sample and used in every epoch.

Without augmentation the first pass of a frozen model is a function of the sample, so a step on a stored one
costs a plain step. With `steer_from` the state that enters the steered blocks is stored too, and the step
skips the blocks below.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from toast.steering import steering_of
from toast.stored_pass import FirstPass, Origin, main_input, settings_of
from toast.thread_state import collecting, giving


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
    steering, adapter = steering_of(model, "first_pass")
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
    return giving(steering_of(model, "given_first_pass")[0], stored)
