"""What an injection fills into a configuration, so that one object can serve one model after another.

PEFT keeps the very object that it is given: it writes into it, and what the user changes there later is
saved. What depends on the model is therefore filled in with a note of what stood there before.
"""

from __future__ import annotations

import copy

from torch import nn

from toast.config import ToastConfig
from toast.layer import LIVE

#: Fields that are taken from the model, or from the pre-tuned adapter, or made of a share of the depth.
FILLED = (
    "target_modules", "select_features", "select_from", "steer_from", "family", "backbone",
    "feedback_checksum", "anatomy",
)  # fmt: skip


def as_written(config: ToastConfig) -> ToastConfig:
    """Returns a copy of a configuration without what was filled in for an earlier model."""
    written = copy.copy(config)
    for name, (before, filled) in config.filled.items():
        if getattr(config, name) == filled:  # otherwise the user has set it since
            setattr(written, name, before)
    written.filled = {}  # type: ignore[misc]
    return written


def fill(config: ToastConfig, ready: ToastConfig, model: nn.Module) -> ToastConfig:
    """Gives a configuration what was filled into its copy for a model.

    Args:
        config: The object that PEFT was given.
        ready: What `as_written` returned, filled in.
        model: The model.

    Returns:
        `config`; or `ready`, where another live model needs something else filled into the same object.
    """
    written = as_written(config)
    ready.filled = {  # type: ignore[misc]
        name: (getattr(written, name), getattr(ready, name))
        for name in FILLED
        if getattr(written, name) != getattr(ready, name)
    }
    differs = any(getattr(config, name) != getattr(ready, name) for name in FILLED)
    if config.filled and differs and _is_used_elsewhere(config, model):
        return ready
    config.__dict__.update(ready.__dict__)
    return config


def _is_used_elsewhere(config: ToastConfig, model: nn.Module) -> bool:
    own = {id(module) for module in model.modules()}
    return any(used is config for layer in LIVE if id(layer) not in own for used in layer.configs.values())
