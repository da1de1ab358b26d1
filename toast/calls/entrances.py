"""One call of a wrapped model, one adapter: what is called from outside holds it for all that runs within."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from toast.adapter import Adapter
from toast.calls.stand_ins import StandIn
from toast.calls.wrapped import WrappedModel
from toast.mixed import MixedAdapter, MixedHead
from toast.thread_state import held_adapter

#: Methods of the wrapped model that are one call each.
ENTRANCES = ("forward", "generate")


class Entrance(StandIn):
    """Stands on the model in the place of a method that is called from outside, and holds the adapter for it.

    A model that generates calls its trunk once a token, and runs its head behind the trunk: all of that is
    one call, whatever another thread switches meanwhile.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the method with the adapter that is active now."""
        generates = self.name == "generate"
        with self.steering.holding_adapter(generates) as adapter:
            if generates and isinstance(adapter, MixedAdapter):
                with self.steering.holding(adapter.generating((*args, *kwargs.values()))):
                    return self.own(*args, **kwargs)
            return self.own(*args, **kwargs)


class HeldHead(StandIn):
    """Stands on a module that an adapter has its own copy of, and runs the copy of the adapter of the call.

    Args:
        steering: The wrapped model's parts.
        kept: PEFT's wrapper of the module.
        place: Its place among those of the model.
    """

    def __init__(self, steering: WrappedModel, kept: nn.Module, place: int) -> None:
        super().__init__(steering, kept, "forward")
        self.place = place

    def chosen(self, adapter: Adapter | None) -> Callable[..., Any] | None:
        """Returns what an adapter's calls run; None if another method's adapter has its copy active."""
        kept: Any = self.module
        if isinstance(adapter, MixedAdapter):
            parts = [self.chosen(part) for part, _ in adapter.parts]
            if all(part is parts[0] for part in parts):
                return parts[0]
            return MixedHead(adapter, [self.own if part is None else part for part in parts])
        if adapter is not None and adapter.name in kept.modules_to_save:
            return kept.modules_to_save[adapter.name]  # type: ignore[no-any-return]
        active = [] if kept.disable_adapters else kept.active_adapters
        foreign = [name for name in active if name not in self.steering.selector.configs]
        if any(name in kept.modules_to_save for name in foreign):
            return None
        return kept.original_module  # type: ignore[no-any-return]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module."""
        held = held_adapter(self.steering)
        module = None
        if held is not None and self.place < len(held.heads):
            module = held.heads[self.place]
        return self.own(*args, **kwargs) if module is None else module(*args, **kwargs)


def attach_entrances(steering: WrappedModel) -> list[StandIn]:
    """Puts entrances in the place of the model's methods, but for those of a model that is its own trunk."""
    model = steering.model
    steered = steering.methods if model is steering.trunk else {}
    entrances: list[StandIn] = [
        Entrance(steering, model, name)
        for name in ENTRANCES
        if name not in steered and callable(getattr(model, name, None))
    ]
    for entrance in entrances:
        entrance.attach()
    return entrances


def hold_heads(steering: WrappedModel) -> list[HeldHead]:
    """Makes the modules that are saved with an adapter go by the adapter of the call, and returns how."""
    kept = [module for module in steering.model.modules() if isinstance(module, ModulesToSaveWrapper)]
    heads = []
    for place, module in enumerate(kept):
        held = module.__dict__.get("forward")
        if isinstance(held, HeldHead):
            held.detach()
        heads.append(HeldHead(steering, module, place))
        heads[-1].attach()
    return heads
