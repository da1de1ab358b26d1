"""Blocks on several devices, as a `device_map` places them: signals and matrices cross them.

The devices are fake: there are shapes, dtypes and devices, and errors where those do not agree, no numbers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import toast
from tests.models import decoder, vit
from tests.steered import call
from toast.steering import find_steering

HEADS = ("head", "lm_head", "fc_norm")


@pytest.fixture
def fake() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)


def place(module: nn.Module, device: str) -> None:
    """Moves a module to a device, and lets its inputs follow."""
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    moved: Any = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    held[name] = nn.Parameter(moved, tensor.requires_grad) if is_parameter else moved
    add_hook_to_module(module, AlignDevicesHook(device))


def split(model: nn.Module) -> None:
    """Puts the lowest block and what is below onto one device, and all else onto another."""
    steering = find_steering(model)
    assert steering is not None
    place(model, "cuda:0")
    heads = [getattr(steering.model, name, None) for name in HEADS]
    above = [*steering.blocks[1:], steering.selector, *(h for h in heads if isinstance(h, nn.Module))]
    for module in above:
        place(module, "cuda:1")


def an_input(kind: str) -> Tensor:
    """More tokens than widths, for which the composed form pays."""
    if kind == "vit":
        return torch.empty(4, 3, 16, 16, device="cuda:0")
    return torch.zeros(6, 20, dtype=torch.long, device="cuda:0")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "vit"])
@pytest.mark.parametrize("form", ["per_token", "composed", "auto"])
@pytest.mark.parametrize("options", [{}, {"lora_rank": 2, "value_bias": "twice"}], ids=["full", "lite"])
def test_signals_cross_devices(fake: FakeTensorMode, kind: str, form: str, options: dict[str, Any]) -> None:
    base = vit() if kind == "vit" else decoder(kind, **({"attention_bias": True} if kind == "llama" else {}))
    model = toast.wrap(base.float(), feedback_form=form, **options)
    with fake:
        split(model)
        traced = toast.trace(model, an_input(kind))
        places = [signal.device.index for signal in traced.signals]
        assert places == [0, 1, 1]
        assert call(model, an_input(kind)).device.index == 1


@pytest.mark.parametrize("kind", ["llama", "gpt2", "vit"])
def test_a_fused_matrix_crosses_devices(
    fake: FakeTensorMode, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "equal", lambda *_: True)  # whether it is stale: there are no numbers
    base = vit() if kind == "vit" else decoder(kind)
    model = toast.wrap(base.float()).requires_grad_(False)
    with fake:
        split(model)
        toast.fuse(model)
        assert call(model, an_input(kind)).device.index == 1
