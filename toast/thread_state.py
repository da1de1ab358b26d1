"""How the layers of a model find the pass that runs, and what else holds for the calls of a thread.

The pass that runs now is a variable of the thread, so two threads may use one model at once. Activation
checkpointing recomputes blocks when that variable is long gone, and maybe in another thread;
`toast.calls.recomputing` takes the pass along.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor

from toast.adapter import Adapter
from toast.passes import Observer, Pass
from toast.signals import Signal
from toast.stored_pass import FirstPass
from toast.suspending import is_running, suspendable_frame

_Kind = TypeVar("_Kind", FirstPass, Tensor)


class _Thread(threading.local):
    """What holds for the calls of a thread while they run: a call of a trunk is never left half way.

    Every attribute is set for every thread, and there are no defaults on the class: Dynamo guards on the
    attributes that an instance has, and not on those of its class.
    """

    def __init__(self) -> None:
        self.running: Pass | None = None
        # The signals of the block that runs, by their place in it, where the block is called by itself.
        self.here: list[Signal | None] | None = None
        self.observer: tuple[object, Observer] | None = None  # the model that is observed, and by whom
        self.replayed: tuple[object, Any] | None = None  # the model that does not run, and what it returns
        self.collected: tuple[object, list[Pass]] | None = None  # the model that runs its first pass alone
        self.held: Held | None = None
        self.given: list[Given] = []


@dataclass(frozen=True)
class Held:
    """A model whose calls use the adapter that was taken, whatever is switched meanwhile.

    Args:
        model: The model, known by its `Steering`.
        adapter: Its adapter; None for the plain model.
        heads: What its calls run of each module that adapters have copies of; None leaves it to PEFT.
        outer: What held before for other models.
    """

    model: object
    adapter: Adapter | None
    heads: list[Callable[..., Any] | None]
    outer: Held | None


@dataclass(frozen=True, eq=False)
class Given:
    """What the calls of a model are given: a stored first pass, or a task embedding.

    Args:
        model: The model, known by its `Steering`.
        what: What its calls are to use.
        holder: The generator's or coroutine's frame whose `with` block it is; None of a function's.
    """

    model: object
    what: FirstPass | Tensor
    holder: FrameType | None


_thread = _Thread()


def current_pass() -> Pass | None:
    """Returns the pass that runs in this thread."""
    return _thread.running


def current_signals() -> list[Signal | None] | None:
    """Returns the signals of the block that runs, by their place in it; None if blocks look them up."""
    return _thread.here


def running_pass() -> int:
    """Returns which pass of a steered model runs now: 1 or 2; 0 outside of both.

    It is 0, too, where a steered model runs once: without an active adapter, and for tokens behind a prompt
    that alone is steered (`steer_tokens`).

    Hooks on the blocks of a steered model fire in both passes of a call, on the blocks below `steer_from` in
    the first alone. A hook that has to act once a call asks for the one that makes the output, the second.

    Example:
        >>> import timm, toast, torch
        >>> model = toast.wrap(timm.create_model("vit_tiny_patch16_224"))
        >>> seen = []
        >>> handle = model.blocks[0].register_forward_hook(lambda *_: seen.append(toast.running_pass()))
        >>> logits = model(torch.randn(1, 3, 224, 224))
        >>> seen, toast.running_pass()
        ([1, 2], 0)
    """
    this = _thread.running
    return 0 if this is None else this.number


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


def held_adapter(model: object) -> Held | None:
    """Returns the adapter that this model's calls in this thread use, if one was taken for them already."""
    held = _thread.held
    while held is not None and held.model is not model:
        held = held.outer
    return held


def stored_first_pass(model: object) -> FirstPass | None:
    """Returns what this model's call is to use instead of its first pass."""
    return _given(model, FirstPass)


def given_embedding(model: object) -> Tensor | None:
    """Returns what this model's call is to use instead of its task embedding."""
    return _given(model, Tensor)


def _given(model: object, kind: type[_Kind]) -> _Kind | None:
    """Returns what was given last of one kind, by code that runs."""
    for given in reversed(_thread.given):
        of_kind = given.model is model and isinstance(given.what, kind)
        if of_kind and (given.holder is None or is_running(given.holder)):
            return given.what  # type: ignore[return-value]
    return None


@contextmanager
def _holding(name: str, value: Any) -> Iterator[None]:
    before = getattr(_thread, name)
    setattr(_thread, name, value)
    try:
        yield
    finally:
        setattr(_thread, name, before)


@contextmanager
def running(this: Pass, here: list[Signal | None] | None = None) -> Iterator[None]:
    """Makes a pass the one that runs in this thread.

    Args:
        this: The pass.
        here: The signals of the one block that runs, by their place in it.
    """
    before, before_here = _thread.running, _thread.here
    _thread.running, _thread.here = this, here
    try:
        yield
    finally:
        _thread.running, _thread.here = before, before_here


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


def holding(
    model: object, adapter: Adapter | None, heads: list[Callable[..., Any] | None]
) -> AbstractContextManager[None]:
    """Makes the calls of one model in this thread use an adapter that was taken, or none; see `Held`."""
    return _holding("held", Held(model, adapter, heads, _thread.held))


@contextmanager
def giving(model: object, what: FirstPass | Tensor) -> Iterator[None]:
    """Makes one model use what it is given, in calls of the code that holds the `with` block."""
    # What is compiled is not suspended half way.
    given = Given(model, what, None if torch.compiler.is_compiling() else suspendable_frame())
    _thread.given = [*_thread.given, given]
    try:
        yield
    finally:  # coroutines may leave their blocks in another order than they entered them
        _thread.given = [each for each in _thread.given if each is not given]
