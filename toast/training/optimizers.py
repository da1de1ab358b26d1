"""Optimiser and schedule from their section of the configuration, both timm's."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn

from toast.training.config import OptimizerConfig

#: Names of the trained parameters by group, such as `head` or `to_state`.
Groups = dict[str, dict[str, nn.Parameter]]


def make_optimizer(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Returns the optimiser; vectors and biases get no weight decay.

    Args:
        groups: What is trained.
        config: Optimiser, rates and decay.

    Raises:
        ValueError: If a rate is given for a group that is not trained, or timm has no such optimiser.
    """
    unknown = sorted(set(config.rates) - set(groups))
    if unknown:
        raise ValueError(
            f"optimizer.rates: no parameters are trained in {', '.join(unknown)}; the trained groups are "
            f"{', '.join(groups)}."
        )
    parts: list[dict[str, Any]] = []
    for group, parameters in groups.items():
        rate = config.rates.get(group, config.learning_rate)
        for decays in (True, False):
            held = [p for p in parameters.values() if (p.ndim > 1) == decays]
            if held:
                decay = config.weight_decay if decays else 0.0
                parts.append({"params": held, "lr": rate, "weight_decay": decay})
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
