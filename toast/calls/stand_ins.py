"""Objects that stand on a module in the place of one of its methods."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from toast.calls.arguments import cache_name, under_name
from toast.calls.wrapped import WrappedModel
from toast.passes import Pass
from toast.thread_state import current_pass, replayed_output, running


class StandIn:
    """Stands on one module in the place of one of its methods; all others of the class keep theirs.

    Args:
        steering: The parts of the wrapped model that it belongs to.
        module: The module.
        name: Name of the method.
    """

    def __init__(self, steering: WrappedModel, module: nn.Module, name: str) -> None:
        self.steering = steering
        self.module = module
        self.name = name
        #: What stood on the instance before, such as a device hook of Accelerate; None if nothing did.
        self.before: Callable[..., Any] | None = module.__dict__.get(name)
        self._look_like_the_method()

    def _look_like_the_method(self) -> None:
        original = getattr(type(self.module), self.name)
        functools.update_wrapper(self, original, updated=())
        self.__signature__ = inspect.Signature(list(inspect.signature(original).parameters.values())[1:])

    def __getstate__(self) -> dict[str, Any]:
        # What it looks like is code, which is not pickled.
        return {name: value for name, value in vars(self).items() if not name.startswith("__")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._look_like_the_method()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs in the place of the method."""
        raise NotImplementedError

    @property
    def own(self) -> Callable[..., Any]:
        """The module's own method."""
        return self.before or functools.partial(getattr(type(self.module), self.name), self.module)

    def attach(self) -> None:
        """Takes the place of the method."""
        self.module.__dict__[self.name] = self

    def detach(self) -> None:
        """Gives the module its own method back, also if Accelerate has put a device hook around this."""
        held = self.module.__dict__
        if held.get("_old_forward") is self:
            held["_old_forward"] = self.own
        elif held.get(self.name) is self:
            del held[self.name]
            if self.before is not None:
                held[self.name] = self.before


class SteeredMethod(StandIn):
    """Stands on the trunk in the place of one of its methods and runs it in two passes.

    Args:
        steering: The wrapped model's parts.
        name: Name of the method.
    """

    def __init__(self, steering: WrappedModel, name: str) -> None:
        super().__init__(steering, steering.trunk, name)
        self.cache_name = cache_name(self.__signature__.parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the method, steered if an adapter is active."""
        steering = self.steering
        this = current_pass()
        if this is not None and this.owner is steering:
            return steering.plain(self.name)(*args, **kwargs)  # the trunk's own methods call each other
        with steering.holding_adapter() as adapter:
            if adapter is None or steering.continues_prompt(self, adapter, args, kwargs):
                with running(Pass(steering, 0)):
                    return steering.plain(self.name)(*args, **kwargs)
            replayed = replayed_output(steering)
            return steering.forward(self, adapter, args, kwargs) if replayed is None else replayed

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Returns positional and keyword arguments by name; the cache by the name that the method knows."""
        names = [p.name for p in self.__signature__.parameters.values() if p.kind is not p.VAR_KEYWORD]
        if len(args) > len(names):
            raise TypeError(f"{self.name}() takes at most {len(names)} arguments; got {len(args)}.")
        return under_name(self.cache_name, dict(zip(names[: len(args)], args, strict=True)) | kwargs)
