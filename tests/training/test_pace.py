"""The pace of a run: a median over spans of steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.settings import vision
from toast.training.pace import Pace
from toast.training.run import run


def test_the_median_leaves_the_warm_up_aside() -> None:
    pace = Pace()
    assert pace.median is None
    pace.start(5.0)  # steps of an earlier session
    for seconds, steps in ((9.0, 2), (10.0, 2), (11.0, 2), (14.2, 4)):
        pace.note(seconds, steps)
    assert list(pace.spans) == pytest.approx([2, 0.5, 0.5, 0.8])
    assert pace.median == pytest.approx(0.65)


def test_a_run_says_its_pace(tmp_path: Path) -> None:
    result = run(vision(tmp_path, log_every=2), "tune")
    assert 0 < result["median_step_seconds"] * result["steps"] < 3 * result["step_seconds"]
    assert result["step_seconds"] <= result["seconds"]


def test_a_quiet_run_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(vision(tmp_path), "tune", quiet=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "trained;" not in captured.err and "run:" in captured.err  # the bar alone
