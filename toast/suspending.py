"""Whether the code that entered a `with` block runs now, or is a generator or coroutine that waits.

What holds for a thread while a `with` block is open would hold, too, for who calls a generator between two of
its `yield`s, and for other coroutines while one waits. A context variable would serve the coroutines, not the
generators. What serves both is to look whether the frame that holds the block is among those that run.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from types import FrameType

import torch

_SUSPENDABLE = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


def suspendable_frame() -> FrameType | None:
    """Returns the frame of the generator or coroutine within which a `with` block is entered, if any.

    Called by the context manager when it is entered. Functions between are passed over: one that enters the
    block for its caller, on an `ExitStack`, has returned when the block is left. A generator that is made a
    context manager itself hands the question on to who enters that one.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_flags & _SUSPENDABLE and not (
            _is_of_contextlib(frame) or _is_of_contextlib(frame.f_back)
        ):
            return frame
        frame = frame.f_back
    return None


def _is_of_contextlib(frame: FrameType | None) -> bool:
    return frame is not None and frame.f_code.co_filename == contextlib.__file__


@torch.compiler.disable  # type: ignore[untyped-decorator]
def is_running(holder: FrameType) -> bool:
    """Whether a frame is among those that run in this thread. Not compiled: it is asked anew in each call."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not holder:
        frame = frame.f_back
    return frame is not None
