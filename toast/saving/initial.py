"""What `init` makes and nothing has trained is not saved: a tensor without elements says that it is left out.

An identity of 576 x 576 would take 1.3 MB. Its place takes a tensor of shape `(0, 576, 576)` under the name
with `.initial` behind: so a file still lists all that belongs to it, and one that lacks tensors is found.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from toast.config import ToastConfig
from toast.families.layouts import is_plain
from toast.saving.names import CONTAINER, FACTORS

#: What stands behind the name of a tensor that is left out.
SUFFIX = ".initial"

# Where what `init` makes is an identity, and where it is zero.
_IDENTITIES, _ZEROS = ("channel_transform", "to_state"), ("to_signal",)
# Not any `lora_A` in a name: an adapter may be called so.
_FACTOR = re.compile(rf"\.lora_[AB]\.{FACTORS}\.weight(\{SUFFIX})?$")


def without_initial(config: ToastConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of an adapter, those left out that are frozen and exactly what `init` makes."""
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if _is_initial(config, name, tensor):
            kept[name + SUFFIX] = tensor.detach().new_empty((0, *tensor.shape))
        else:
            kept[name] = tensor
    return kept


def with_initial(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of an adapter with those that were left out."""
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if is_left_out(name, tuple(tensor.shape)):
            whole[name.removesuffix(SUFFIX)] = _made(name, tensor.shape[1:], tensor)
        else:
            whole[name] = tensor
    return whole


def whole_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of an adapter's tensors, those among them that were left out."""
    whole: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if is_left_out(name, shape):
            whole[name.removesuffix(SUFFIX)] = shape[1:]
        else:
            whole[name] = shape
    return whole


def is_left_out(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a saved tensor stands for one that is left out."""
    return name.endswith(SUFFIX) and shape[:1] == (0,) and _is_known(_group(name), shape[1:])


def _is_initial(config: ToastConfig, name: str, tensor: Tensor) -> bool:
    group = _group(name)
    if config.init != "identity" or group in config.trained_groups:
        return False
    # What is sharded, or on the meta device, cannot be compared.
    if not is_plain(tensor) or tensor.is_meta or not _is_known(group, tensor.shape):
        return False
    return torch.equal(tensor, _made(name, tensor.shape, tensor))


def _group(name: str) -> str | None:
    """Returns the group that a tensor is of, by its name in a model or a file; None for LoRA factors."""
    container = CONTAINER.search(name)
    return None if container is None or _FACTOR.search(name) else container[1]


def _is_known(group: str | None, shape: tuple[int, ...]) -> bool:
    """Whether `init` makes the same each time; where there is no identity, it draws an isometry."""
    square = len(shape) == 2 and shape[0] == shape[1]
    return square and group in (*_IDENTITIES, *_ZEROS)


def _made(name: str, shape: torch.Size, like: Tensor) -> Tensor:
    if _group(name) in _ZEROS:
        return like.new_zeros(shape)
    return torch.eye(*shape, dtype=like.dtype, device=like.device)
