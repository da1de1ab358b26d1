"""What a pass has to know of the blocks of the trunk: what enters each, and what leaves it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from toast.calls.wrapped import WrappedModel
from toast.families.tokens import channels_last, like_windows
from toast.passes import Pass
from toast.thread_state import current_pass


class BlockHook:
    """Stands at one block of a wrapped model, and acts in the passes of that model only.

    `BoundBlock` calls it where it has a part in a pass. It is registered with the block only where the trunk
    cannot run over other blocks than its own, as a device hook replaced its method: PyTorch calls a module
    that has a hook more slowly.

    Args:
        steering: The wrapped model's parts.
        index: Its number, counted from 0.
        units: Numbers of the units of the feedback path in it.
    """

    def __init__(self, steering: WrappedModel, index: int, units: list[int]) -> None:
        self.steering = steering
        self.index = index
        self.units = units
        self.handles: list[RemovableHandle] = []

    def register(self, block: nn.Module) -> None:
        """Has the block itself call it."""
        self.handles += [
            block.register_forward_pre_hook(self.before, with_kwargs=True),
            block.register_forward_hook(self.after),
        ]

    def remove(self) -> None:
        """Takes the hook off."""
        while self.handles:
            self.handles.pop().remove()

    def before(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Is called by the block that it is registered with; a `BoundBlock` has called `enter`."""
        this = current_pass()
        if this is not None and not this.bound and this.owner is self.steering:
            self.enter(this, block, args, kwargs)

    def after(self, block: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        """The same behind the block."""
        this = current_pass()
        if this is not None and not this.bound and this.owner is self.steering:
            self.leave(this, out)

    def enter(self, this: Pass, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Brings the signals of the block into its order of tokens, and tells the observer what enters."""
        windows = self.steering.family.tokens == "windows"
        if this.adapter is None or (not this.wants_states and not (windows and this.signals)):
            return
        entering = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        for maps in this.adapter.maps:
            unit = maps.unit
            if unit.block != self.index:
                continue
            if this.wants_states and unit.layout.name != "input":  # else the layer itself tells
                assert this.observer is not None
                this.observer.on_states(this.number, unit.number, entering)
            signal = this.signals.get(unit.number)
            if windows and isinstance(signal, Tensor):
                this.arranged[unit.number] = like_windows(signal, entering, block)

    def leave(self, this: Pass, out: Any) -> None:
        """Leaves the features with the pass if they are read here, and tells the observer what leaves."""
        steering = self.steering
        if this.number == 1 and this.once and self.index == this.once - 1:
            this.known = out
        reads = this.reads is not None and steering.family.reads != "norm"
        if reads and this.adapter is not None and self.index == steering.last_read(this.adapter):
            leaving = out[0] if isinstance(out, tuple) else out
            this.features = steering.selector.read(leaving, None)
        if this.wants_states and self.index == len(steering.block_names) - 1:
            assert this.observer is not None
            leaving = channels_last(out[0] if isinstance(out, tuple) else out, steering.family.tokens)
            this.observer.on_states(this.number, len(steering.value_paths), leaving)
