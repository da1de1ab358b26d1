"""Batches of a loader whose processes may end or fail: their errors as messages, without tracebacks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader


def batches(loader: DataLoader[Any]) -> Iterator[Any]:
    """Yields the batches of a loader.

    Raises:
        ValueError: If a process that loads data was ended, or raised an error.
    """
    try:
        yield from loader
    except Exception as error:
        said = str(error)
        if said.startswith("DataLoader worker"):
            raise ValueError(
                f"workers: a process that loads data was ended: {said.splitlines()[0]}. The usual cause "
                "is too little memory (of the machine, or of /dev/shm in a container). Set workers to fewer, "
                "or to 0, which loads in the process of the run."
            ) from error
        if said.startswith("Caught "):  # torch's word for what a process raised, with its traceback
            _, found, message = said.rpartition(f"\n{type(error).__name__}: ")
            raise ValueError(
                f"workers: a process that loads data failed: {type(error).__name__}: "
                f"{message.strip() if found else said}"
            ) from error
        raise
