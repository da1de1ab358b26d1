"""Queries, keys and values of an attention as its own code computes them, seen from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

PRODUCTS = ("matmul", "__matmul__", "bmm", "baddbmm")
Call = tuple[tuple[Any, ...], dict[str, Any]]


class Spy(TorchFunctionMode):
    """Keeps what the first attention works with: from the fused kernel, or from the products by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def clear(self) -> None:
        self.seen: dict[str, Tensor] = {}
        self.weighed = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if "value" in self.seen:
            return out
        if func is nn.functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            self.seen = {what: named[what].clone() for what in ("query", "key", "value")}
        elif name in PRODUCTS:
            left, right = (
                (*args, *(kwargs or {}).values())[:2] if name != "baddbmm" else _batches(args, kwargs)
            )
            if self.weighed:
                self.seen["value"] = right.clone()
            else:
                self.seen = {"query": left.clone(), "key": right.clone()}
        elif name == "softmax" and out.ndim >= 3:
            self.weighed = True
        return out


def _batches(args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
    named = dict(zip(("input", "batch1", "batch2"), args, strict=False)) | (kwargs or {})
    return named["batch1"], named["batch2"]


@dataclass
class Attentions:
    """The last call of each of some modules while they are watched, and what the spy saw in it."""

    calls: dict[str, Call] = field(default_factory=dict)
    seen: dict[str, dict[str, Tensor]] = field(default_factory=dict)


@contextmanager
def watched(model: nn.Module, names: list[str]) -> Iterator[Attentions]:
    found, spy, handles = Attentions(), Spy(), []
    for name in names:

        def before(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            found.calls[name] = (args, kwargs)
            spy.clear()

        def after(*_: Any, name: str = name) -> None:
            found.seen[name] = spy.seen

        module = model.get_submodule(name)
        handles += [
            module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)
        ]  # fmt: skip
    with spy:
        yield found
    for handle in handles:
        handle.remove()


def states(call: Call) -> Tensor:
    """The tokens that a block or an attention is given."""
    args, kwargs = call
    return next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))


def with_states(call: Call, change: Callable[[Tensor], Tensor]) -> Call:
    """The same call with other tokens."""
    args, kwargs = call
    given = states(call)
    swap = lambda x: change(x) if x is given else x  # noqa: E731
    return tuple(map(swap, args)), {name: swap(x) for name, x in kwargs.items()}


def run_alone(module: nn.Module, call: Call) -> dict[str, Tensor]:
    """What the attention of a module works with in one call."""
    with Spy() as spy, torch.no_grad():
        module(*call[0], **call[1])
    return spy.seen
