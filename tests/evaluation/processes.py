"""Two processes joined by gloo, on this machine."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing


def run_in_two(part: Callable[[int], Any], folder: Path) -> list[Any]:
    """Returns what a function of the rank gave in each process; they meet in a file of the folder."""
    # Forked, for a process of its own would import the libraries anew, which takes longer than the test.
    multiprocessing.start_processes(_run, args=(part, folder), nprocs=2, start_method="fork")
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(2)]


def _run(rank: int, part: Callable[[int], Any], folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2
    )
    try:
        (folder / f"{rank}.pickle").write_bytes(pickle.dumps(part(rank)))
    finally:
        torch.distributed.destroy_process_group()
