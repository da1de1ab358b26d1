"""Floating-point operations, counted at the operators that PyTorch dispatches."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

_ATEN = torch.ops.aten
_KNOWN: dict[Any, Any] = flop_registry


def _attention(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> int:
    return 4 * prod(query.shape) * key.shape[-2]


def _attention_backward(gradient: Tensor, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> int:
    return 10 * prod(query.shape) * key.shape[-2]  # the scores are computed once more


#: What PyTorch's table has no formula for. As there, a causal mask saves nothing.
_FURTHER: dict[Any, Any] = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class Flops:
    """Counts as `torch.utils.flop_counter` does, with what grows with the batch apart.

    Args:
        batch: A number of samples that divides no other size of the computation.

    Attributes:
        fixed: Operations whose number does not depend on the batch.
        sample: Operations of each sample.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.fixed = self.sample = 0.0

    def count(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Counts an operator that was run."""
        formula = _FURTHER.get(func._overloadpacket)
        if formula is not None:
            found = formula(*args, **kwargs)
        elif func._overloadpacket in _KNOWN:
            found = _KNOWN[func._overloadpacket](*args, **kwargs, out_val=out)
        else:
            return
        if found % self.batch:
            self.fixed += found
        else:
            self.sample += found / self.batch
