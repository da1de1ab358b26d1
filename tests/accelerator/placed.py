"""Wrapped models on a device, each beside its twin in double precision on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tests.steered import steered


def twins(kind: str, device: torch.device, dtype: torch.dtype, **options: Any) -> tuple[Any, Any]:
    """Returns a wrapped model on a device, and one on the CPU that computes with the same numbers."""
    model = steered(kind, **options).to(dtype)
    return copy.deepcopy(model).to(device), model.double()


def to_device(x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns pictures in the format of a model, or tokens, on its device."""
    return x.to(device, dtype) if x.is_floating_point() else x.to(device)


def relative_error(found: Tensor | Iterable[Tensor], expected: Tensor | Iterable[Tensor]) -> float:
    """Returns the length of what differs over the length of what was expected, of all tensors together."""
    found, expected = (_joined(each) for each in (found, expected))
    return float((found - expected).norm() / expected.norm())


def _joined(tensors: Tensor | Iterable[Tensor]) -> Tensor:
    parts = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    return torch.cat([part.detach().cpu().double().flatten() for part in parts])
