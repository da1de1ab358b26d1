"""A folder has one writer at a time: a lock that dies with its process, and a note of whose it is."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

_LOCK = ".lock"
_WRITER = ".writer.json"
#: Seconds in which the data workers of a killed writer, which have inherited its lock, end by themselves.
_ORPHANS = 15.0
#: Seconds of a turn of waiting, and what says that another one is needed.
_TURN, _WAIT = 60.0, "wait"
_Held = TypeVar("_Held")


@contextmanager
def locked(accelerator: Accelerator, folder: Path) -> Iterator[None]:
    """Keeps other processes of this and, where the file system has locks, of other machines out of a folder.

    Of a launch's processes the main one holds the lock for all. The system takes the lock back when its
    process ends, however it ends. What was made for the lock alone is removed with it.

    Args:
        accelerator: Knows the processes of this launch.
        folder: The folder; it is made if it is not there.

    Raises:
        ValueError: In every process, if another one writes into the folder; it says which.
    """
    held = by_main(accelerator, lambda: _acquire(folder))
    try:
        yield
    finally:
        if held is not None:
            _release(folder, held)


@contextmanager
def in_turn(accelerator: Accelerator, folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Waits until no other run works in a folder, and keeps others out of it meanwhile.

    Where nothing can be written there is nothing to keep apart, and no lock.

    Args:
        accelerator: Knows the processes of this launch.
        folder: The folder, which is there.
        say: Is called once with what is waited for.
    """
    waited = False

    def attempt() -> FileLock | str | None:
        nonlocal waited
        lock = FileLock(folder / _LOCK)
        try:
            lock.acquire(timeout=_TURN if waited else 0)
            _note(folder)
        except Timeout:
            if not waited:
                say(f"{folder} is being written by {_described(_writer(folder))}; waiting for it")
            waited = True
            return _WAIT
        except OSError:
            return None
        return lock

    # In turns, for the other processes of a launch give up what they wait for too long.
    while (held := by_main(accelerator, attempt)) == _WAIT:
        pass
    try:
        yield
    finally:
        if isinstance(held, FileLock):
            _release(folder, held)


def by_main(accelerator: Accelerator, work: Callable[[], _Held | None]) -> _Held | None:
    """Lets the main process do something whose result or error is the same for all.

    Args:
        accelerator: Knows the processes of this launch.
        work: What is done, and may raise `ValueError` or `OSError`.

    Returns:
        What it returns; a lock in the main process alone.

    Raises:
        ValueError: What the main process raised, in every process.
        OSError: Likewise.
    """
    if accelerator.num_processes == 1:
        return work()
    outcome: list[Any] = [None, None]
    held: _Held | None = None
    if accelerator.is_main_process:
        try:
            held = work()
        except (ValueError, OSError) as error:
            outcome[1] = error
        outcome[0] = None if isinstance(held, FileLock) else held
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return held if accelerator.is_main_process else outcome[0]


def _acquire(folder: Path) -> FileLock:
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        writer = _writer(folder)
        try:
            lock.acquire(timeout=0 if _may_live(writer) else _ORPHANS)
        except Timeout:
            raise ValueError(
                f"{folder} is being written by {_described(writer)}. Wait for it or stop it, or choose "
                "another name=… or out=…."
            ) from None
    _note(folder)
    return lock


def _note(folder: Path) -> None:
    note = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    (folder / _WRITER).write_text(json.dumps(note) + "\n", encoding="utf-8")


def _release(folder: Path, lock: FileLock) -> None:
    with suppress(OSError):
        (folder / _WRITER).unlink(missing_ok=True)
        if [path.name for path in folder.iterdir()] == [_LOCK]:
            (folder / _LOCK).unlink()
            folder.rmdir()
    lock.release()


def _writer(folder: Path) -> dict[str, Any]:
    """Returns what the holder of a lock has noted of itself; empty if that cannot be read (yet)."""
    try:
        note = json.loads((folder / _WRITER).read_bytes())
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def _may_live(writer: dict[str, Any]) -> bool:
    """Whether a writer may still be at work: only of a process of this machine can be said that it is not."""
    pid = writer.get("pid")
    if writer.get("host") != socket.gethostname() or not isinstance(pid, int):
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _described(writer: dict[str, Any]) -> str:
    if not writer:
        return "another process"
    return f"process {writer.get('pid')} of {writer.get('host')}, since {writer.get('since')}"
