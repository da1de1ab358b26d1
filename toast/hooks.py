"""What a pass has to know of the blocks of the trunk: what enters each, and what leaves it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from toast.passes import Pass, current_pass
from toast.tokens import channels_last, like_windows

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from toast.steering import Steering


class BlockHook:
    """Stands at one block of a wrapped model, and acts in the passes of that model only.

    Args:
        steering: The wrapped model's parts.
        block: The block.
        index: Its number, counted from 0.
    """

    def __init__(self, steering: Steering, block: nn.Module, index: int) -> None:
        self.steering = steering
        self.index = index
        self.handles: list[RemovableHandle] = [
            block.register_forward_pre_hook(self.before, with_kwargs=True),
            block.register_forward_hook(self.after),
        ]

    def remove(self) -> None:
        """Takes the hook off."""
        for handle in self.handles:
            handle.remove()

    def _pass(self) -> Pass | None:
        this = current_pass()
        return this if this is not None and this.owner is self.steering else None

    def before(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Brings the signals of the block into its order of tokens, and tells the observer what enters."""
        this = self._pass()
        if this is None:
            return
        windows = self.steering.family.tokens == "windows"
        if not this.wants_states and not (windows and this.signals):
            return
        entering = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        for value in self.steering.values:
            if value.unit.block != self.index:
                continue
            if this.wants_states and value.layout.name != "input":  # else the layer itself tells
                assert this.observer is not None
                this.observer.on_states(this.number, value.unit.number, entering)
            signal = this.signals.get(value)
            if windows and isinstance(signal, Tensor):
                this.arranged[value] = like_windows(signal, entering, block)

    def after(self, block: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        """Leaves the features with the pass if they are read here, and tells the observer what leaves."""
        this = self._pass()
        if this is None:
            return
        steering = self.steering
        if this.number == 1 and self.index == this.once - 1:
            this.known = out
        if this.reads is not None and steering.family.reads != "norm" and self.index == steering.last_read:
            leaving = out[0] if isinstance(out, tuple) else out
            this.features = this.reads.read(leaving, None)
        if this.wants_states and self.index == len(steering.blocks) - 1:
            assert this.observer is not None
            leaving = channels_last(out[0] if isinstance(out, tuple) else out, steering.family.tokens)
            this.observer.on_states(this.number, len(steering.value_paths), leaving)
