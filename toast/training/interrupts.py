"""Ctrl-C and SIGTERM as a request to stop, met between two steps."""

from __future__ import annotations

import math
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

#: Seconds in which a launcher hands a signal on.
_HANDED_ON = 3.0


class Interrupted(Exception):
    """A run was asked to stop, and can be resumed.

    Args:
        number: The signal.
        message: Where its checkpoint is, and how to go on.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = number


class Lost(ValueError):
    """Another process of the launch has ended, so that this one cannot go on either.

    Args:
        step: Steps that were made.
        total: Steps of the run.
        error: What showed it.
        checkpoint: What can be resumed from; None if nothing.
    """

    def __init__(self, step: int, total: int, error: Exception, checkpoint: Path | None) -> None:
        held = "There is no checkpoint yet" if checkpoint is None else f"{checkpoint} is the newest"
        super().__init__(
            f"another process of this run has ended after {step} of {total} steps: {error}. {held}. "
            "Continue with --resume."
        )


#: What gloo and NCCL say of a process that has gone.
_GONE = re.compile(r"[Cc]onnection (closed|reset|refused)|peer|[Bb]roken pipe|NCCL|gloo")


def is_lost(accelerator: Accelerator, error: RuntimeError) -> bool:
    """Whether an error says that another process of the launch has gone."""
    return accelerator.num_processes > 1 and _GONE.search(str(error)) is not None


class StopRequest:
    """Whether a signal has come, to this process or another of the run."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.signal = 0

    def __call__(self) -> int:
        """Returns the signal's number, the same in every process; 0 if none has come."""
        if self.accelerator.num_processes == 1:
            return self.signal
        came = torch.tensor([self.signal], device=self.accelerator.device)
        return int(self.accelerator.gather(came).max())


@contextmanager
def listening(accelerator: Accelerator) -> Iterator[StopRequest]:
    """Turns SIGINT and SIGTERM into a request to stop; a second one ends at once, as if nobody listened.

    A launcher hands its own signal on to the processes of a launch, which a terminal may have signalled, too:
    to them, signals that come within seconds of the first are the same one.
    """
    request = StopRequest(accelerator)
    before: dict[int, Any] = {}
    came = -math.inf

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if request.signal and (accelerator.num_processes == 1 or time.monotonic() - came > _HANDED_ON):
            ignored = before[number] == signal.SIG_IGN  # as in what a shell has put into the background
            signal.signal(number, signal.SIG_DFL if ignored else before[number])
            os.kill(os.getpid(), number)
            return
        if not request.signal:
            request.signal, came = number, time.monotonic()

    try:
        before |= {each: signal.signal(each, note) for each in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, where signals cannot be caught
        yield request
        return
    try:
        yield request
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
