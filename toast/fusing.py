"""`toast.fuse`: for inference, selector, feedback and value projections in one matrix."""

from __future__ import annotations

import torch
from torch import nn

from toast.feedback import alike, fused_matrix
from toast.fusion import FUSED, Fusion
from toast.saving.names import is_of_adapter
from toast.steering import steering_of


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
    steering, adapter = steering_of(model, "fuse")
    selector = steering.selector
    trained = [name for name, p in model.named_parameters() if p.requires_grad and is_of_adapter(name)]
    if trained:
        raise ValueError(
            f"fuse is for inference, and {len(trained)} parameters of the adapter are trained, such as "
            f"{trained[0]}. Load it with is_trainable=False, or call model.requires_grad_(False) first."
        )
    if not alike(adapter.maps):
        raise ValueError(
            "fuse needs blocks of the same tokens and width; those of "
            f"{type(steering.trunk).__name__} differ."
        )
    matrix, with_values = fused_matrix(adapter.maps, adapter.channel_transform)
    weight = next(adapter.maps[-1].layer.base_layer.parameters())
    dtype = weight.dtype if weight.dtype.is_floating_point else matrix.dtype
    selector.register_buffer(FUSED + adapter.name, matrix.to(dtype), persistent=False)
    selector.fusions[adapter.name] = Fusion(with_values, adapter.fused_from(with_values))
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Undoes `fuse` for all adapters; outputs are then computed as before it.

    Args:
        model: A wrapped model, fused or not. It is changed in place.

    Returns:
        The model.
    """
    selector = steering_of(model, "unfuse")[0].selector
    for name in list(selector.fusions):
        selector.drop_fused(name)
    return model
