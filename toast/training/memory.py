"""How much memory a run needs, estimated before it starts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from toast.training.allocations import Allocations
from toast.training.run_config import OptimizerConfig


@dataclass(frozen=True)
class OptimizerMemory:
    """Bytes that an optimiser needs beside parameters and gradients.

    Args:
        states: What it keeps between steps.
        momentary: What a step needs for a moment.
    """

    states: int
    momentary: int


def optimizer_memory(trained: Iterable[nn.Parameter], config: OptimizerConfig) -> OptimizerMemory:
    """Measures the optimiser in a step on parameters of the same shapes without memory.

    It is stepped as on an accelerator, where PyTorch updates all parameters at once (`foreach`). An optimiser
    that looks at values cannot be measured so, and is taken for Adam.

    Args:
        trained: The parameters.
        config: Name and options of the optimiser.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    parameters = [nn.Parameter(without_memory(parameter, mode)) for parameter in trained]
    sizes = sum(p.numel() * p.element_size() for p in parameters)
    for parameter in parameters:
        parameter.grad = without_memory(parameter, mode)
    options = {"foreach": True} | config.options
    seen = Allocations()
    try:
        try:
            optimizer = _made(parameters, config, options)
        except (TypeError, ValueError, AssertionError):  # one that updates parameter by parameter
            optimizer = _made(parameters, config, config.options)
        with seen:
            optimizer.step()
    except (RuntimeError, AssertionError):
        return OptimizerMemory(states=2 * sizes, momentary=sizes)
    held = {
        id(value): value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.ndim  # counters of steps stay with the host
    }
    states = sum(held.values())
    return OptimizerMemory(states, max(0, int(seen.timeline.peak(0)) - states))


def without_memory(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """Returns a tensor of the same shape and precision, as one of the CPU, that has no memory."""
    return FakeTensor(mode, tensor.detach().to("meta"), torch.device("cpu"))


def _made(
    parameters: list[nn.Parameter], config: OptimizerConfig, options: dict[str, object]
) -> torch.optim.Optimizer:
    return create_optimizer_v2(  # type: ignore[no-any-return]
        [{"params": parameters}], opt=config.name, lr=config.learning_rate, momentum=config.momentum,
        weight_decay=0.0, **options,
    )  # fmt: skip


def estimate(model: nn.Module, optimizer: int, activations: int) -> dict[str, int]:
    """Returns bytes on one device, by what needs them.

    Args:
        model: The model, with what is trained marked.
        optimizer: Bytes of the optimiser's states.
        activations: Bytes that a micro-batch of one process keeps for backward.
    """
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return {
        "frozen weights": frozen,
        "trained weights": trained,
        "gradients": trained,
        "optimizer": optimizer,
        "activations": activations,
    }
