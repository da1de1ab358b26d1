"""Blocks of one call: bound to its pass, known beforehand, and a view of the trunk that runs over them."""

from __future__ import annotations

from typing import Any

from torch import nn

from toast.calls.hooks import BlockHook
from toast.compiled import COMPILED
from toast.passes import Pass
from toast.thread_state import running

REPLACED = (
    "{} was replaced on this instance (by a device hook of Accelerate, for example), which does not work "
    "with select_from or with timm's activation checkpointing."
)


class BoundBlock:
    """A block of one call: runs in that call's pass, now and when it is recomputed. Else like the block.

    It does the part of the block's hook, and hands the block its own signals, so that blocks which are
    compiled one by one are one program.

    Args:
        block: The block.
        this: The pass.
        hook: What stands at the block.
    """

    def __init__(self, block: nn.Module, this: Pass, hook: BlockHook) -> None:
        self.block = block
        self.this = this
        self.hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the block."""
        self.hook.enter(self.this, self.block, args, kwargs)
        with running(self.this, [self.this.signal_of(number) for number in self.hook.units]):
            out = self.block(*args, **kwargs)
        self.hook.leave(self.this, out)
        return out

    def __getattr__(self, name: str) -> Any:
        """Everything else is the block's."""
        return getattr(self.block, name)


class KnownBlock:
    """Stands for a block that ran already: gives what the highest such block gave. Else like the block."""

    def __init__(self, block: nn.Module, output: Any) -> None:
        self.block = block
        self.output = output

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what is known."""
        return self.output

    def __getattr__(self, name: str) -> Any:
        """Everything else is the block's."""
        return getattr(self.block, name)


class Blocks(list[Any]):
    """A list of blocks that also runs in sequence, as `nn.Sequential` does."""

    def __call__(self, x: Any) -> Any:
        """Runs the blocks one after the other."""
        for block in self:
            x = block(x)
        return x


def with_lists(module: nn.Module, lists: dict[str, Blocks], hidden: tuple[str, ...] = ()) -> nn.Module:
    """Returns a view of a module with other lists of blocks; weights, submodules and settings are its own.

    Args:
        module: The module, which is not changed.
        lists: What stands at which path in the view.
        hidden: Instance attributes that the view does not take over.
    """
    if module.__dict__.get("forward") is not None and "forward" not in hidden:
        raise ValueError(REPLACED.format(f"{type(module).__name__}.forward"))
    view = module.__class__.__new__(module.__class__)
    view.__dict__.update({name: value for name, value in module.__dict__.items() if name not in hidden})
    # What is compiled of a module that holds the blocks was compiled over its own list.
    view.__dict__.pop("_compiled_call_impl", None)
    view.__dict__["_modules"] = dict(module._modules)
    below: dict[str, dict[str, Blocks]] = {}
    for path, blocks in lists.items():
        first, _, rest = path.partition(".")
        if rest:
            below.setdefault(first, {})[rest] = blocks
        else:
            view.__dict__[first] = blocks
    for first, rests in below.items():
        child = module.get_submodule(first)
        while COMPILED in child._modules:
            child = child.get_submodule(COMPILED)
        view._modules[first] = with_lists(child, rests)
    return view
