"""Rows of a study side by side, a process each: for an accelerator that one small model leaves idle.

FOLDER/side-by-side/study.yaml      what the processes read
FOLDER/side-by-side/ROW, TASK.log   what each has printed
"""

from __future__ import annotations

import glob
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from tqdm import tqdm

from toast.study import design
from toast.study.lines import key_of, read_lines
from toast.study.running import RESULTS, Study, as_text
from toast.training.config_files import load_config, to_yaml
from toast.training.interrupts import Interrupted
from toast.training.run_config import RunConfig
from toast.training.run_folder import write_text
from toast.training.sweeping import pretune

#: Seconds between two looks at what the processes have done.
_PERIOD = 0.2


def run_side_by_side(
    config: RunConfig,
    processes: int,
    only: Iterable[str] = (),
    tasks: Iterable[str] = (),
    results: Path = RESULTS,
    threads: int = 1,
) -> int:
    """Runs what is missing of a study, each row of each task in a process of its own.

    Pre-tunings that rows start from are done first, here. A row that fails is named; the others go on.

    Args:
        config: As for `run_study`.
        processes: How many run at a time.
        only: Patterns of names of rows; none is all.
        tasks: Patterns of names of tasks; none is all.
        results: Folder of the lines.
        threads: Threads of PyTorch in each process.

    Returns:
        The number of lines that were added.

    Raises:
        ValueError: If the file does not fit, before the first run; or, at the end, if rows have failed.
        Interrupted: If a signal came; call it again to go on.
    """
    study = Study(config, results, Console(soft_wrap=True))
    missing = [(row, cell) for row, cell in study.checked(only, tasks) if study.missing(row, cell)]
    for row, cell in missing:
        if (start := design.starts(row)) is not None:
            pretune(design.sweep_of(config, cell), start)
    place = config.folder / "side-by-side"
    place.mkdir(parents=True, exist_ok=True)
    write_text(place / "study.yaml", to_yaml(config))
    waiting = list(dict.fromkeys((row.name, cell.task) for row, cell in missing))
    running: dict[subprocess.Popen[bytes], tuple[str, Path]] = {}
    failed: list[str] = []
    known = {key_of(line) for line in read_lines(study.path)}
    before = len(known)
    settings = [str(results.absolute()), str(processes), str(threads)]
    with _stopping(running) as stopped, tqdm(total=len(waiting), unit="row", leave=False) as bar:
        while running or (waiting and not stopped):
            while waiting and len(running) < processes and not stopped:
                row_name, task = waiting.pop(0)
                log = place / f"{row_name}, {task}.log".replace("/", "_")
                started = _start([str(place), row_name, task, *settings], log)
                running[started] = f"{task}: {row_name}", log
                if stopped:  # the signal came before it could be handed on to this one
                    started.terminate()
            time.sleep(_PERIOD)
            ended = [process for process in running if process.poll() is not None]
            for line in read_lines(study.path):
                if key_of(line) not in known:
                    known.add(key_of(line))
                    bar.write(as_text(line))
            for process in ended:
                name, log = running.pop(process)
                bar.update()
                if process.returncode and not stopped:
                    said = log.read_text(errors="replace").strip().splitlines() or ["nothing"]
                    failed.append(f"{name} ({log}): {said[-1].strip().removeprefix(f'{name}: ')}")
                    bar.write(f"failed: {failed[-1]}")
    if stopped:
        raise Interrupted(stopped[0], f"stopped; finished runs are in {study.path}. Call it again to go on.")
    if failed:
        raise ValueError("rows have failed; the others are done:\n  " + "\n  ".join(failed))
    return len(known) - before


def _start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Starts the process of one row; in a group of its own, for a terminal's Ctrl-C is handed on here."""
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "toast.study.side_by_side", *arguments],
            stdin=subprocess.DEVNULL, stdout=file, stderr=file, process_group=0,
        )  # fmt: skip


@contextmanager
def _stopping(running: Iterable[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Hands SIGINT and SIGTERM on to processes, which then end with a checkpoint. Yields what has come."""
    stopped: list[int] = []

    def note(number: int, frame: object) -> None:
        stopped.append(number)
        for process in list(running):
            process.terminate()

    before = {each: signal.signal(each, note) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _work(place: str, row: str, task: str, results: str, processes: str, threads: str) -> None:
    """Does a row of a task; the process that `run_side_by_side` starts."""
    import torch

    from toast.study.running import run_study

    torch.set_num_threads(int(threads))
    run_study(
        load_config(Path(place) / "study.yaml"),
        [glob.escape(row)],
        Path(results),
        tasks=[glob.escape(task)],
        processes=int(processes),
    )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", sys.argv[-1])
    from toast.commands.errors import run_script

    run_script(_work)
