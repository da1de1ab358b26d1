"""A folder has one writer at a time, of which no trace hinders the next one."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from torch.multiprocessing import ProcessRaisedException

from tests.training.processes import on_two_processes
from tests.training.settings import losses, vision
from toast.training import locking
from toast.training.locking import in_turn, locked
from toast.training.run import run
from toast.training.sweeping import sweep


@pytest.fixture
def here() -> Accelerator:
    return Accelerator()


def test_a_second_writer_is_refused_and_told_whose_the_folder_is(tmp_path: Path, here: Accelerator) -> None:
    config = vision(tmp_path)
    with locked(here, config.folder):
        before = sorted(config.folder.iterdir())
        for resume in (False, True):
            with pytest.raises(ValueError, match=f"being written by process {os.getpid()} of .*, since 20"):
                run(config, "tune", resume)
        assert sorted(config.folder.iterdir()) == before
        with locked(here, config.folder / "another"):
            pass
    assert not config.folder.exists()  # nothing was made but for the lock
    run(config, "tune")
    assert not (config.folder / ".writer.json").exists()


def test_two_processes_of_one_launch_are_one_writer(tmp_path: Path, here: Accelerator) -> None:
    config = vision(tmp_path)
    with (
        locked(here, config.folder),
        pytest.raises(ProcessRaisedException, match="is being written by process"),
    ):
        on_two_processes(config)
    on_two_processes(config)
    assert len(losses(config.folder)) == 6


@pytest.mark.parametrize("alive", [True, False])
def test_the_workers_of_a_dead_writer_are_waited_for(
    tmp_path: Path, here: Accelerator, monkeypatch: pytest.MonkeyPatch, alive: bool
) -> None:
    waits: list[float] = []
    acquire = locking.FileLock.acquire

    def noted(self: Any, timeout: float, **options: Any) -> Any:
        waits.append(timeout)
        return acquire(self, timeout=0, **options)

    with locked(here, tmp_path / "run"):
        pid = os.getpid() if alive else 2**22 + 1  # above the greatest number of a process
        note = {"pid": pid, "host": socket.gethostname(), "since": "then"}
        (tmp_path / "run" / ".writer.json").write_text(json.dumps(note))
        monkeypatch.setattr(locking.FileLock, "acquire", noted)
        with (
            pytest.raises(ValueError, match=f"process {pid} of .*, since then"),
            locked(here, tmp_path / "run"),
        ):
            pass
    assert waits == [0, 0 if alive else locking._ORPHANS]


def test_a_sweep_has_one_writer(tmp_path: Path, here: Accelerator) -> None:
    section = {"rows": {"linear": {"method": "linear"}}}
    config = vision(tmp_path, sweep=section, data__validation_share=0.25)
    with locked(here, config.folder), pytest.raises(ValueError, match="is being written by"):
        sweep(config)


def test_what_is_made_in_turn_is_waited_for(tmp_path: Path, here: Accelerator) -> None:
    said: list[str] = []
    done: list[str] = []

    def second() -> None:
        with in_turn(here, tmp_path, said.append):
            done.append("second")

    with in_turn(here, tmp_path, said.append):
        thread = threading.Thread(target=second)
        thread.start()
        while not said:
            time.sleep(0.01)
        done.append("first")
    thread.join()
    assert done == ["first", "second"]
    assert len(said) == 1
    assert f"process {os.getpid()} of" in said[0]
    assert not (tmp_path / ".writer.json").exists()


def test_where_nothing_can_be_written_nobody_waits(tmp_path: Path, here: Accelerator) -> None:
    with in_turn(here, tmp_path / "not there", pytest.fail):
        pass


def test_an_unfinished_note_hinders_nobody(tmp_path: Path, here: Accelerator) -> None:
    (tmp_path / ".writer.json").write_bytes(b'{"pid": ')
    with locked(here, tmp_path):
        assert json.loads((tmp_path / ".writer.json").read_text())["pid"] == os.getpid()
        (tmp_path / ".writer.json").write_text("[]")
        with (
            pytest.raises(ValueError, match="is being written by another process"),
            locked(here, tmp_path),
        ):
            pass
