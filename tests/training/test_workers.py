"""A process that loads data and ends, or fails, is a message."""

from __future__ import annotations

import os
import signal

import pytest
from torch.utils.data import DataLoader, Dataset

from toast.training.workers import batches


class _Failing(Dataset[int]):
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
        ("kill", r"workers: a process that loads data was ended: .*too little memory.*workers to fewer"),
        ("disk", r"failed: OSError: \[Errno 5\] Input/output error: '/data/x\.png'$"),
        ("value", r"failed: ValueError: needs this;\ngot that\.$"),
    ],
)
def test_errors_of_processes_are_messages(how: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}") as caught:
        list(batches(DataLoader(_Failing(how), num_workers=1)))
    assert "Traceback" not in str(caught.value)


def test_without_processes_errors_are_what_they_were() -> None:
    with pytest.raises(OSError, match="Input/output error"):
        list(batches(DataLoader(_Failing("disk"))))
    assert [int(batch) for batch in batches(DataLoader(_Failing("")))] == [0, 1, 2, 3]
