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
    from toast.feedback import Signal
    from toast.selector import Selection, ToastSelector
    from toast.stored import FirstPass
    from toast.value import ToastValue


class Observer:
    """Is told what happens in the two passes of a call; `toast.trace` is one. Does nothing by itself."""

    wants_states = False

    def on_block(self, number: int, layer: ToastValue) -> None:
        """The value projection of a block is about to run, in pass 1 or 2."""

    def on_states(self, number: int, index: int, state: Tensor) -> None:
        """What enters a unit, in pass 1 or 2; under the number of units, what leaves the last block.

        Channels last. Only if `wants_states`.
        """

    def on_signals(self, signals: dict[ToastValue, Signal]) -> dict[ToastValue, Signal]:
        """Signals were computed; what is returned is what the second pass gets."""
        return signals

    def on_selection(self, selection: Selection) -> None:
        """Features were selected, and are fed back."""

    def on_output(self, number: int, output: Any) -> None:
        """The trunk returned, in pass 1 or 2."""


class Pass:
    """What the layers of a model may know of the pass that runs.

    Args:
        owner: The `Steering` of the model that runs.
        number: 1 or 2.
        signals: Top-down signal of each steered projection; none in pass 1.
        reads: The selector that leaves the features here; None in the second pass.
        observer: Is told of every block, if there is one.
        once: How many of the lowest blocks run in the first pass only.
        known: What the highest of them gave.
    """

    def __init__(
        self,
        owner: object,
        number: int,
        signals: dict[ToastValue, Signal] | None = None,
        reads: ToastSelector | None = None,
        observer: Observer | None = None,
        once: int = 0,
        known: Any = None,
    ) -> None:
        self.owner = owner
        self.number = number
        self.signals = signals or {}
        self.reads = reads
        self.observer = observer
        self.once = once
        self.known = known
        self.features: tuple[Tensor | None, Tensor | None] | None = None
        # Signals in the order of tokens of the block that runs, where that is not the order of the features.
        self.arranged: dict[ToastValue, Tensor] = {}

    @property
    def wants_states(self) -> bool:
        """Whether somebody looks at what enters and leaves the blocks."""
        return self.observer is not None and self.observer.wants_states

    def enter(self, layer: ToastValue) -> None:
        """Tells the observer which block runs."""
        if self.observer is not None:
            self.observer.on_block(self.number, layer)


class _Thread(threading.local):
    running: Pass | None = None
    observer: tuple[object, Observer] | None = None  # the model that is observed, and by whom
    replayed: tuple[object, Any] | None = None  # the model that does not run, and what it returns instead
    collected: tuple[object, list[Pass]] | None = None  # the model that runs its first pass alone
    given: tuple[object, FirstPass] | None = None  # the model whose first pass is stored


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


def collected_passes(model: object) -> list[Pass] | None:
    """Returns where this model's first pass is to be put, if it is to run alone."""
    collected = _thread.collected
    return collected[1] if collected is not None and collected[0] is model else None


def stored_first_pass(model: object) -> FirstPass | None:
    """Returns what this model's call is to use instead of its first pass."""
    given = _thread.given
    return given[1] if given is not None and given[0] is model else None


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


@contextmanager
def collecting(model: object) -> Iterator[list[Pass]]:
    """Makes one model run its first passes alone; they are put into the list."""
    passes: list[Pass] = []
    with _holding("collected", (model, passes)):
        yield passes


def giving(model: object, stored: FirstPass) -> AbstractContextManager[None]:
    """Makes one model use a stored first pass."""
    return _holding("given", (model, stored))


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

    def __init__(self, block: nn.Module, this: Pass) -> None:
        self.block = block
        self.this = this

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the block."""
        with running(self.this):
            return self.block(*args, **kwargs)

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
    view = module.__class__.__new__(module.__class__)
    view.__dict__.update({name: value for name, value in module.__dict__.items() if name not in hidden})
    view.__dict__["_modules"] = dict(module._modules)
    below: dict[str, dict[str, Blocks]] = {}
    for path, blocks in lists.items():
        first, _, rest = path.partition(".")
        if rest:
            below.setdefault(first, {})[rest] = blocks
        else:
            view.__dict__[first] = blocks
    for first, rests in below.items():
        view._modules[first] = with_lists(module.get_submodule(first), rests)
    return view
