"""A process that loads data and ends, or fails, is a message."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset

from toast.training.workers import batches

ROOT = Path(__file__).parents[2]


class Failing(Dataset[int]):
    """Four samples, the last of which fails in some way."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        if index == 3 and self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 3 and self.how == "disk":
            raise OSError(5, "Input/output error", "/data/x.png")
        if index == 3 and self.how == "value":
            raise ValueError("needs this;\ngot that.")
        return index


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("disk", r"failed: OSError: \[Errno 5\] Input/output error: '/data/x\.png'$"),
        ("value", r"failed: ValueError: needs this;\ngot that\.$"),
    ],
)
def test_errors_of_processes_are_messages(how: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}") as caught:
        list(batches(DataLoader(Failing(how), num_workers=1)))
    assert "Traceback" not in str(caught.value)


def test_a_process_that_is_killed_is_a_message() -> None:
    # PyTorch hears of it by a signal, which must not reach the process that runs the tests.
    code = (
        "from torch.utils.data import DataLoader\n"
        "from tests.training.test_workers import Failing\n"
        "from toast.training.workers import as_messages, batches\n"
        "try:\n"
        "    with as_messages():\n"  # the signal may come outside of the loader's code
        "        list(batches(DataLoader(Failing('kill'), num_workers=1)))\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("workers: a data loading process was killed: ")
    assert ". The usual cause is too little memory" in done.stdout
    assert ". ." not in done.stdout


def test_without_processes_errors_are_what_they_were() -> None:
    with pytest.raises(OSError, match="Input/output error"):
        list(batches(DataLoader(Failing("disk"))))
    assert [int(batch) for batch in batches(DataLoader(Failing("")))] == [0, 1, 2, 3]
