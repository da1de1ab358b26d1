"""Batches of a loader whose processes may end or fail: their errors as messages, without tracebacks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader

_ENDED = (
    "workers: a data loading process was killed: {}. The usual cause is too little memory (of the machine, "
    "or of /dev/shm in a container). Use fewer workers, or 0, which loads data in the main process."
)


@contextmanager
def as_messages() -> Iterator[None]:
    """Makes messages of what PyTorch says when a process that loads data was ended or has raised.

    It hears of an ended process by a signal, and then raises wherever the program is: so what runs a whole
    loop is called in this, too.

    Raises:
        ValueError: If a process that loads data was ended, or raised an error.
    """
    try:
        yield
    except Exception as error:
        text = str(error)
        if text.startswith("DataLoader worker"):
            raise ValueError(_ENDED.format(text.splitlines()[0].rstrip(" ."))) from error
        if text.startswith("Caught "):  # torch's word for what a process raised, with its traceback
            _, found, message = text.rpartition(f"\n{type(error).__name__}: ")
            raise ValueError(
                f"workers: a data loading process failed: {type(error).__name__}: "
                f"{message.strip() if found else text}"
            ) from error
        raise


def batches(loader: DataLoader[Any]) -> Iterator[Any]:
    """Yields the batches of a loader.

    Raises:
        ValueError: If a process that loads data was ended, or raised an error.
    """
    with as_messages():
        try:
            yield from loader
        except (ConnectionError, EOFError) as error:  # a batch lay ready that can be read from no one now
            if loader.num_workers:
                time.sleep(1)  # for PyTorch's signal, which otherwise raises while the message is printed
                raise ValueError(_ENDED.format(f"{type(error).__name__}: {error}")) from error
            raise
