"""Wrapped tiny models whose signals are far from zero, and what tests ask of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import toast
from tests.models import awaken, decoder, images, tokens, vit
from toast.steering import find_steering

MODELS = ["vit", "llama", "gpt2", "mistral"]
Loss = Callable[[Any, Tensor], Tensor]


def inputs(kind: str, count: int = 1) -> list[Tensor]:
    return [images(2) if kind == "vit" else tokens(2) for _ in range(count)]


def call(model: Any, x: Tensor) -> Tensor:
    return model(x) if x.is_floating_point() else model(input_ids=x, use_cache=False).logits


def steer(bare: nn.Module, kind: str, **options: Any) -> Any:
    """A wrapped model whose signals are far from zero: the task embedding resembles what is read."""
    for module in bare.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # so that training and evaluation can be compared
    model = awaken(toast.wrap(bare, **options)).eval()
    (x,) = inputs(kind)
    toast.calibrate(model, x) if kind == "vit" else toast.calibrate(model, input_ids=x, use_cache=False)
    return model


def steered(kind: str, **options: Any) -> Any:
    return steer(vit() if kind == "vit" else decoder(kind), kind, **options)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: Any, x: Tensor, run: Loss = call) -> tuple[Tensor, ...]:
    return torch.autograd.grad(run(model, x).square().mean(), list(trained(model).values()))


def assert_same(found: Any, expected: Any) -> None:
    """Up to the last digits of the largest entry of each tensor."""
    pairs = [(found, expected)] if isinstance(found, Tensor) else zip(found, expected, strict=True)
    for this, other in pairs:
        digits = 1e-12 if other.dtype == torch.float64 else 1e-5
        assert (this - other).abs().max() <= digits * max(1.0, other.abs().max().item())


def blocks_of(model: Any) -> list[nn.Module]:
    return find_steering(model).blocks


def set_checkpointing(bare: Any, enable: bool = True, **options: Any) -> None:
    """Switches checkpointing of a timm or transformers model; transformers renamed it within version 5."""
    if hasattr(bare, "set_grad_checkpointing"):
        bare.set_grad_checkpointing(enable)
        return
    name = "activation" if hasattr(bare, "activation_checkpointing_enable") else "gradient"
    if enable:
        given = {f"{name}_checkpointing_kwargs": options} if options else {}
        getattr(bare, f"{name}_checkpointing_enable")(**given)
    else:
        getattr(bare, f"{name}_checkpointing_disable")()


def checkpoint(model: Any, **options: Any) -> None:
    set_checkpointing(model.train().base_model.model, **options)
