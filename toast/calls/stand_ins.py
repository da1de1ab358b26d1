"""Objects that stand on a module in the place of one of its methods."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from toast.steering import Steering


class StandIn:
    """Stands on one module in the place of one of its methods; all others of the class keep theirs.

    Args:
        steering: The parts of the wrapped model that it belongs to.
        module: The module.
        name: Name of the method.
    """

    def __init__(self, steering: Steering, module: nn.Module, name: str) -> None:
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
