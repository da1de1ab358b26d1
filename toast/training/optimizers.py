"""Optimiser and schedule from their section of the configuration, both timm's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn

from toast.rates import NO_SIZES, Groups, optimizer_groups
from toast.training.run_config import OptimizerConfig

#: In the names of optimisers whose steps do not have the size of the rate in every entry: they follow the
#: gradient, or are brought to the norm of a whole matrix. Rates scaled by width are not for them.
_OTHER_STEPS = ("sgd", "momentum", "nesterov", "lars", "larc", "lamb", "novograd", "muon")


def scales_rates(config: OptimizerConfig) -> bool:
    """Returns whether rates follow from group, width and inputs, or all groups have the same one."""
    if config.scaled is not None:
        return config.scaled
    return not any(kind in config.name.lower() for kind in _OTHER_STEPS)


def rated_groups(
    model: nn.Module, groups: Groups, config: OptimizerConfig, input_sizes: Mapping[str, float] = NO_SIZES
) -> list[dict[str, Any]]:
    """Returns the optimiser's groups, each with `params`, `lr`, `weight_decay` and `name`.

    Args:
        model: What is trained.
        groups: What of it is trained.
        config: Optimiser, rates and decay.
        input_sizes: What `toast.input_sizes` measured.

    Raises:
        ValueError: If a rate is given for a group that is not trained.
    """
    try:
        return optimizer_groups(
            model, groups, config.learning_rate, weight_decay=config.weight_decay, rates=config.rates,
            scaled=scales_rates(config), input_sizes=input_sizes,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"optimizer.{error}") from error


def make_optimizer(
    model: nn.Module, groups: Groups, config: OptimizerConfig, input_sizes: Mapping[str, float] = NO_SIZES
) -> torch.optim.Optimizer:
    """Returns the optimiser, with rates by `toast.parameter_groups`.

    Args:
        model: What is trained.
        groups: What of it is trained.
        config: Optimiser, rates and decay.
        input_sizes: What `toast.input_sizes` measured.

    Raises:
        ValueError: If a rate is given for a group that is not trained, or timm has no such optimiser.
    """
    parts = rated_groups(model, groups, config, input_sizes)
    try:
        return create_optimizer_v2(  # type: ignore[no-any-return]
            parts, opt=config.name, lr=config.learning_rate, momentum=config.momentum, weight_decay=0.0,
            **config.options,
        )  # fmt: skip
    except (ValueError, AssertionError, TypeError) as error:
        raise ValueError(f"optimizer: timm could not make {config.name!r}: {error}") from error


#: Our schedules in timm's terms; a step schedule that never decays is constant.
_SCHEDULES: dict[str, dict[str, Any]] = {
    "cosine": {"sched": "cosine"},
    "linear": {"sched": "poly", "decay_rate": 1.0},
    "constant": {"sched": "step", "decay_rate": 1.0, "decay_epochs": 1},
}


def make_schedule(optimizer: torch.optim.Optimizer, config: OptimizerConfig, steps: int) -> Any:
    """Returns timm's schedule; `set_rates` sets the rates of a step.

    The rates are a function of the step alone, so a resumed run needs no state of it.
    """
    warm_up = min(round(config.warm_up * steps), steps - 1)
    for group in optimizer.param_groups:  # so that the least rate is a share of each group's own peak
        group["lr_scale"] = group["lr"] / config.learning_rate
        group["lr"] = config.learning_rate
    schedule, _ = create_scheduler_v2(
        optimizer,
        num_epochs=steps - warm_up,
        warmup_epochs=warm_up,
        warmup_lr=0.0,
        warmup_prefix=True,
        min_lr=config.least * config.learning_rate,
        step_on_epochs=False,
        updates_per_epoch=1,
        **_SCHEDULES[config.schedule],
    )
    return schedule


def set_rates(schedule: Any, step: int) -> None:
    """Sets the rates of a step, counted from 0: those at its middle, so that neither end has rate 0."""
    schedule.step_update(step + 0.5)
