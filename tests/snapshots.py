"""Everything that a refused call could have changed in a model, to be compared before and after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn


def structure(model: nn.Module) -> dict[str, Any]:
    """Modules and their classes, instance attributes by identity, parameters and their trainability."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[name, "class"] = type(module)
        for attribute, value in module.__dict__.items():
            if isinstance(value, dict):
                found[name, attribute] = {key: id(held) for key, held in value.items()}
            else:
                found[name, attribute] = value if isinstance(value, bool | int | float | str) else id(value)
    for name, parameter in model.named_parameters():
        found[name, "requires_grad"] = parameter.requires_grad
    return found


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@contextmanager
def refused(model: nn.Module, message: str, kind: type[Exception] = ValueError) -> Iterator[None]:
    """Expects an error with this message, and the model to be exactly what it was."""
    parts, values = structure(model), tensors(model)
    with pytest.raises(kind, match=message):
        yield
    after = structure(model)
    changed = [key for key in parts.keys() | after.keys() if parts.get(key) != after.get(key)]
    assert not changed
    now = model.state_dict()
    assert now.keys() == values.keys()
    assert all(torch.equal(now[name], tensor) for name, tensor in values.items())
