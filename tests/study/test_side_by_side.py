"""Rows side by side give the lines that one after the other gives; a signal stops all of them."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.study.studies import study
from toast.study.lines import read_lines
from toast.study.running import run_study
from toast.study.side_by_side import run_side_by_side
from toast.training.interrupts import Interrupted


@pytest.mark.timeout(900)  # four processes import everything, which a busy machine takes minutes for
def test_rows_side_by_side(tmp_path: Path) -> None:
    config = study(tmp_path, {"tasks": {"a": {}, "b": {"batch_size": 4}}})
    assert config.sweep is not None
    config.sweep.rows["broken"] = {"method": {"name": "toast", "options": {"steer_from": 99}}, "grid": {}}
    results = tmp_path / "results"
    path = results / "small.jsonl"

    def stop() -> None:
        while not path.is_file():
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    stopping = threading.Thread(target=stop, daemon=True)
    stopping.start()
    with pytest.raises(Interrupted, match="finished runs are in"):
        run_side_by_side(config, 2, ["linear"], results=results)
    stopping.join()

    before = len(read_lines(path))
    with pytest.raises(ValueError, match=r"done:\n  a: broken \(.*broken, a\.log\): .*steer_from"):
        run_side_by_side(config, 2, ["linear", "broken"], ["a"], results)
    lines = {line["seed"]: line for line in read_lines(path) if line["task"] == "a"}
    assert sorted(lines) == [0, 1]
    assert len(read_lines(path)) - before <= 2
    assert {line["processes"] for line in lines.values()} == {2}

    alone = tmp_path / "alone"
    assert run_study(config.model_copy(update={"out": alone}), ["linear"], alone, tasks=["a"]) == 2
    assert [line["test"] for line in read_lines(alone / "small.jsonl")] == [
        lines[seed]["test"] for seed in (0, 1)
    ]
    with pytest.raises(ValueError, match=r"task: 'c' matches none of a, b\."):
        run_side_by_side(config, 2, tasks=["c"], results=results)
