"""Ctrl-C and SIGTERM as a wish that is met between two steps."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from accelerate import Accelerator


class Interrupted(Exception):
    """A run was asked to stop, and can be resumed.

    Args:
        number: The signal.
        message: Where its checkpoint is, and how to go on.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = number


class Wish:
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
def listening(accelerator: Accelerator) -> Iterator[Wish]:
    """Turns SIGINT and SIGTERM into a wish; a second SIGINT stops at once."""
    wish = Wish(accelerator)

    def note(number: int, frame: FrameType | None) -> None:
        if wish.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        wish.signal = number

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, where signals cannot be caught
        yield wish
        return
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
