"""`toast.fuse`: for inference, selector, feedback and value projections in one matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from toast.feedback import alike, fused_matrix
from toast.model import find_steering
from toast.selector import FUSED, ToastSelector
from toast.steering import Steering


@torch.no_grad()
def fuse(model: nn.Module) -> nn.Module:
    """Folds the channel map, the feedback path and the value projections of all blocks into one matrix.

    A call then has one product in the place of the chain. The adapter's own weights stay as they are, and are
    what is saved; after loading, fuse again. On a base whose projections are quantised the signals are
    computed at once, and pass through the projections as before.

    Args:
        model: A wrapped model with an active adapter that is not trained. It is changed in place.

    Returns:
        The model.

    Raises:
        ValueError: If the adapter is trained, or the blocks differ in tokens or width.
    """
    steering = _steering(model, "fuse")
    values, selector = steering.values, steering.selector
    trained = [name for name, p in model.named_parameters() if p.requires_grad and ".toast_" in name]
    if trained:
        raise ValueError(
            f"fuse is for inference, and {len(trained)} parameters of the adapter are trained, such as "
            f"{trained[0]}. Load it with is_trainable=False, or call model.requires_grad_(False) first."
        )
    if not alike(values):
        raise ValueError(
            "fuse needs blocks of the same tokens and width; those of "
            f"{type(steering.trunk).__name__} differ."
        )
    adapter: Any = selector.adapter
    matrix = fused_matrix(values, selector.toast_channel_transform[adapter])
    weight = next(values[-1].base_layer.parameters())
    dtype = weight.dtype if weight.dtype.is_floating_point else matrix.dtype
    selector.register_buffer(FUSED + adapter, matrix.to(dtype), persistent=False)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Undoes `fuse` for all adapters; outputs are then computed as before it.

    Args:
        model: A wrapped model, fused or not. It is changed in place.

    Returns:
        The model.
    """
    selector = _steering(model, "unfuse").selector
    for name in [name for name in selector._buffers if name.startswith(FUSED)]:
        del selector._buffers[name]
    return model


def is_fused(selector: ToastSelector) -> bool:
    """Whether the active adapter is fused."""
    return f"{FUSED}{selector.adapter}" in selector._buffers


def _steering(model: nn.Module, what: str) -> Steering:
    steering = find_steering(model)
    if steering is None or steering.selector.adapter is None:
        raise ValueError(f"{what} needs a model with an active TOAST adapter; wrap it with toast.wrap first.")
    return steering
