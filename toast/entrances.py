"""One call of a wrapped model, one adapter: what is called from outside holds it for all that runs within."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from toast.methods import StandIn
from toast.passes import held_adapter

if TYPE_CHECKING:
    from toast.steering import Steering

#: Methods of the wrapped model that are one call each.
ENTRANCES = ("forward", "generate")


class Entrance(StandIn):
    """Stands on the model in the place of a method that is called from outside, and holds the adapter for it.

    A model that generates calls its trunk once a token, and runs its head behind the trunk: all of that is
    one call, whatever another thread switches meanwhile.

    Args:
        steering: The wrapped model's parts.
        name: Name of the method.
    """

    def __init__(self, steering: Steering, name: str) -> None:
        super().__init__(steering.model, name)
        self.steering = steering

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the method with the adapter that is active now."""
        if self.steering.heads is None and not torch.compiler.is_compiling():
            self.steering.heads = hold_heads(self.steering)
        with self.steering.holding_adapter(generates=self.name == "generate"):
            return self.own(*args, **kwargs)


class HeldHead(StandIn):
    """Stands on a module that an adapter has its own copy of, and runs the copy of the adapter of the call.

    Args:
        steering: The wrapped model's parts.
        kept: PEFT's wrapper of the module.
    """

    def __init__(self, steering: Steering, kept: nn.Module) -> None:
        super().__init__(kept, "forward")
        self.steering = steering

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module."""
        held = held_adapter(self.steering)
        if held is None:
            return self.own(*args, **kwargs)
        copies: Any = self.module.modules_to_save
        name = None if held.adapter is None else held.adapter.name
        module = copies[name] if name in copies else self.module.original_module  # noqa: SIM401 - a ModuleDict
        return module(*args, **kwargs)  # type: ignore[operator]


def attach_entrances(steering: Steering) -> list[StandIn]:
    """Puts entrances in the place of the model's methods, but for those of a model that is its own trunk."""
    model = steering.model
    steered = steering.methods if model is steering.trunk else {}
    entrances: list[StandIn] = [
        Entrance(steering, name)
        for name in ENTRANCES
        if name not in steered and callable(getattr(model, name, None))
    ]
    for entrance in entrances:
        entrance.attach()
    return entrances


def hold_heads(steering: Steering) -> list[StandIn]:
    """Makes the modules that are saved with an adapter go by the adapter of the call, and returns how."""
    kept = [module for module in steering.model.modules() if isinstance(module, ModulesToSaveWrapper)]
    for module in kept:
        if not isinstance(module.__dict__.get("forward"), HeldHead):
            HeldHead(steering, module).attach()
    return [module.__dict__["forward"] for module in kept]
