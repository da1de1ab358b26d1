"""Steers attentions that multiply with the weight of their projection and do not call it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

#: `F.linear(input, weight, bias)` of a steered projection.
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class SteeredWeight(Tensor):
    """The weight of a projection in a pass that holds a signal for it, for attentions that multiply by hand.

    timm's BEiT, EVA and Swin V2 call `F.linear(x, self.qkv.weight, bias)`, which no adapter around `qkv`
    sees.
    """

    product: Product
    plain: Tensor

    @classmethod
    def of(cls, weight: Tensor, product: Product) -> SteeredWeight:
        """Returns a view of a weight that steers the product it is used in."""
        steered = weight.as_subclass(cls)
        steered.product, steered.plain = product, weight
        return steered

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Steers the product; everything else gets the plain weight."""
        named = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
        steered = named.get("weight")
        if func is F.linear and isinstance(steered, cls):
            return steered.product(named["input"], steered.plain, named.get("bias"))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))
