"""How much memory a run needs, estimated before it starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

#: Bytes of state that an optimiser keeps for each byte of a parameter.
_STATES = {"sgd": 1, "momentum": 1, "nesterov": 1, "lion": 1, "adamw": 2, "adam": 2, "nadamw": 2, "lamb": 2}


def estimate(model: nn.Module, optimizer: str, activations: int) -> dict[str, int]:
    """Returns bytes on one device, by what needs them.

    Args:
        model: The model, with what is trained marked.
        optimizer: timm's name of the optimiser.
        activations: Bytes that a micro-batch of one process keeps for backward.
    """
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return {
        "frozen weights": frozen,
        "trained weights": trained,
        "gradients": trained,
        "optimizer": trained * _STATES.get(optimizer.lower(), 2),
        "activations": activations,
    }


def kept_for_backward(
    objective: nn.Module, batch: dict[str, Any], forward: Callable[[dict[str, Any]], Any]
) -> int:
    """Returns the bytes that a forward pass keeps for backward, beside parameters and inputs.

    Counted on a real forward pass; each storage once.

    Args:
        objective: What runs.
        batch: Its input.
        forward: Runs it.
    """
    known = {t.untyped_storage().data_ptr() for t in (*objective.parameters(), *objective.buffers())}
    known |= {t.untyped_storage().data_ptr() for t in batch.values() if isinstance(t, Tensor)}
    seen: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in known:
            seen[place] = tensor.untyped_storage().nbytes()
            alive.append(tensor)  # else its place could be given to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(batch)
    return sum(seen.values())
