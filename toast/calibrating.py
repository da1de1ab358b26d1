"""`toast.calibrate`: where the task embedding starts, from a few samples.

The selection weight of a token is its cosine with the task embedding, and features share a direction: that of
their mean. So an embedding that is a mean feature selects everything, and most of all what is common: the
ground of pictures. An embedding that points from the mean to what differs from it gives the ground negative
cosines, which are cut off, and passes what stands out; the equation of the selector is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from toast.compiled import eagerly
from toast.files.tensors import is_finite
from toast.reusing import first_pass
from toast.steering import steering_of
from toast.visual.grids import sequence_grid
from toast.visual.seeing import find_parts


@torch.no_grad()
def calibrate(model: nn.Module, *inputs: Any, **kwargs: Any) -> None:
    """Points the task embedding to what the selector should pass, by the features of a few samples.

    A random embedding is nearly orthogonal to every feature, so about half of the tokens are cut off and the
    others pass with weights of a few hundredths.

    In pictures it is pointed to what stands out, see `stands_out`. In text, where what stands out is
    punctuation and every token may matter, it is pointed to the mean feature, so that all tokens pass from
    the start. Its length is 1: the cosine does not see it, but the smaller it is, the more a step of the
    optimiser turns it.

    Args:
        model: A wrapped model.
        *inputs: Inputs of one call of the model, such as a batch of images.
        **kwargs: The same.

    Raises:
        ValueError: If the model has no active TOAST adapter, or the samples give no finite features. The
            embedding is as it was.
    """
    steering, adapter = steering_of(model, "calibrate")
    for given in (*inputs, *kwargs.values()):
        if isinstance(given, Tensor) and not given.numel():
            raise ValueError(f"calibrate needs samples; got an empty batch of shape {tuple(given.shape)}.")
    with eagerly(model):
        stored = first_pass(model, *inputs, **kwargs)
    features = stored.unnormed if stored.normed is None else stored.normed  # those that are compared
    assert features is not None
    if steering.family.kind == "vision":
        read = features.flatten(1, -2)[:, _prefix_tokens(model, features, (*inputs, *kwargs.values())) :]
        direction = stands_out(read)
    else:
        mask = kwargs.get("attention_mask")
        read = features.flatten(0, -2) if mask is None else features[mask.bool()]
        direction = F.normalize(read, dim=-1).mean(0)
    if not read.numel() or not is_finite(direction):
        what = "features that are not finite (NaN or infinite)" if read.numel() else "no token but padding"
        raise ValueError(
            f"calibrate needs samples with finite features; these give {what}. Pass samples that hold more "
            "than padding, in a precision that the model can compute with."
        )
    own = steering.selector.toast_task_embedding[adapter.name]  # toast.attend_to may have replaced the call's
    own.copy_(F.normalize(direction, dim=0))
    steering.selector.start.forget(adapter.name)  # it is no draw any more, which might be turned round


def stands_out(features: Tensor) -> Tensor:
    """Returns the direction of what stands out in pictures, `(width,)`.

    It is the mean of ‖d‖ d over all patches, where d is what a patch differs by from the mean of its
    picture's patches, less its part along the mean of all. So what all share has a cosine of 0, and in every
    picture some patches have a positive one. Where all patches are the same it is the mean.

    Args:
        features: Of patches, `(pictures, patches, width)`.
    """
    differs = features - features.mean(1, keepdim=True)
    direction = (differs * differs.norm(dim=-1, keepdim=True)).mean((0, 1))
    mean = F.normalize(features.mean((0, 1)), dim=0)
    across = direction - (direction @ mean) * mean
    rounding = torch.finfo(features.dtype).eps * features.square().mean((0, 1)).sum()
    return mean if across.norm() <= rounding else across


def _prefix_tokens(model: nn.Module, features: Tensor, inputs: Sequence[Any]) -> int:
    """Returns how many tokens stand before the patches: class token, registers."""
    parts = find_parts(model)
    known = getattr(parts.trunk, "num_prefix_tokens", None)
    pictures = next((each for each in inputs if isinstance(each, Tensor) and each.ndim == 4), None)
    if features.ndim > 3 or pictures is None or isinstance(known, int):
        return known if isinstance(known, int) and features.ndim == 3 else 0
    try:
        return sequence_grid(parts, features.shape[1], pictures.shape[-2:]).prefix
    except ValueError:  # no grid of patches is known of this model
        return 0
