"""One pass of one call, and how the layers find it.

Signals belong to the call: they are never kept on a module. The pass that runs now is a variable of the
thread, so two threads may use one model at once. Activation checkpointing recomputes blocks when that
variable is long gone, and maybe in another thread; `Carrying` and `bind_blocks` take the pass along.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from toast.feedback import ComposedSignal
    from toast.layer import ToastSelector, ToastValue


class Observer:
    """Is told what happens in the two passes of a call; `toast.trace` is one. Does nothing by itself."""

    wants_states = False

    def on_block(self, number: int, layer: ToastValue) -> None:
        """The value projection of a block is about to run, in pass 1 or 2."""

    def on_states(self, number: int, index: int, entering: Tensor, leaving: Tensor) -> None:
        """A block ran, in pass 1 or 2; only if `wants_states`."""

    def on_selection(self, features: Tensor, weights: Tensor, selected: Tensor) -> None:
        """Features were selected, and are fed back."""

    def on_output(self, number: int, output: Any) -> None:
        """The trunk returned, in pass 1 or 2."""


class Pass:
    """What the layers of a model may know of the pass that runs.

    Args:
        number: 1 or 2.
        signals: Top-down signal of each steered projection, `(batch, tokens, width)` or the composed form of
            it; none in pass 1.
        reads: The selector that leaves the features here; None in the second pass.
        observer: Is told of every block, if there is one.
    """

    def __init__(
        self,
        number: int,
        signals: dict[ToastValue, Tensor | ComposedSignal],
        reads: ToastSelector | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.number = number
        self.signals = signals
        self.reads = reads
        self.observer = observer
        self.features: tuple[Tensor, Tensor] | None = None

    def enter(self, layer: ToastValue) -> None:
        """Tells the observer which block runs."""
        if self.observer is not None:
            self.observer.on_block(self.number, layer)


class _Thread(threading.local):
    running: Pass | None = None
    observer: tuple[object, Observer] | None = None  # the model that is observed, and by whom
    replayed: tuple[object, Any] | None = None  # the model that does not run, and what it returns instead


_thread = _Thread()


def current_pass() -> Pass | None:
    """Returns the pass that runs in this thread."""
    return _thread.running


def current_observer(model: object) -> Observer | None:
    """Returns who observes this model's calls in this thread; models called within it are not observed."""
    seen = _thread.observer
    return seen[1] if seen is not None and seen[0] is model else None


def replayed_output(model: object) -> Any:
    """Returns the output that this model's trunk is to return instead of running, or None."""
    replayed = _thread.replayed
    return replayed[1] if replayed is not None and replayed[0] is model else None


@contextmanager
def _holding(name: str, value: Any) -> Iterator[None]:
    before = getattr(_thread, name)
    setattr(_thread, name, value)
    try:
        yield
    finally:
        setattr(_thread, name, before)


def running(this: Pass | None) -> AbstractContextManager[None]:
    """Makes a pass the one that runs in this thread; None lets the plain model run."""
    return _holding("running", this)


def observing(model: object, observer: Observer) -> AbstractContextManager[None]:
    """Makes an observer see the calls of one model, known by its `Steering`, in this thread."""
    return _holding("observer", (model, observer))


def replaying(model: object, output: Any) -> AbstractContextManager[None]:
    """Makes one model's trunk return `output`, so that only what stands around it (the head) runs."""
    return _holding("replayed", (model, output))


class Carrying:
    """A checkpointing function that runs what it checkpoints, and recomputes it, in the pass of the call."""

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoints `function(*args)`."""
        this = current_pass()
        if this is None:
            return self.checkpoint(function, *args, **kwargs)

        def in_pass(*inputs: Any) -> Any:
            with running(this):
                return function(*inputs)

        return self.checkpoint(in_pass, *args, **kwargs)


class BoundBlock:
    """A block of one call: runs in that call's pass, now and when it is recomputed. Else like the block."""

    def __init__(self, block: nn.Module, index: int, this: Pass) -> None:
        self.block = block
        self.index = index
        self.this = this

    def __call__(self, entering: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Runs the block."""
        with running(self.this):
            out = self.block(entering, *args, **kwargs)
        observer = self.this.observer
        if observer is not None and observer.wants_states:
            observer.on_states(
                self.this.number, self.index, entering, out[0] if isinstance(out, tuple) else out
            )
        return out

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


def bind_blocks(blocks: list[nn.Module], this: Pass) -> Blocks:
    """Returns the blocks of one call."""
    return Blocks(BoundBlock(block, index, this) for index, block in enumerate(blocks))


def with_blocks(module: nn.Module, path: str, blocks: Blocks, hidden: tuple[str, ...] = ()) -> nn.Module:
    """Returns a view of a module with other blocks; weights, submodules and settings are the module's.

    Args:
        module: The module, which is not changed.
        path: Path of the list of blocks.
        blocks: What stands there in the view.
        hidden: Instance attributes that the view does not take over.
    """
    view = module.__class__.__new__(module.__class__)
    view.__dict__.update({name: value for name, value in module.__dict__.items() if name not in hidden})
    first, _, rest = path.partition(".")
    if rest:
        view.__dict__["_modules"] = dict(module._modules)
        view._modules[first] = with_blocks(module.get_submodule(first), rest, blocks)
    else:
        view.__dict__[first] = blocks
    return view
