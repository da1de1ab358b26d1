"""Of many classes a report shows the ends and the most frequent mistakes; of few the whole confusion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.report.reports import Page
from tests.training.settings import vision
from toast.report.results import results
from toast.report.run_data import RunFiles


def files(tmp_path: Path, count: int) -> RunFiles:
    """Returns a run of which class `i` of `count` is said to be the next one in `i` of 50 pictures."""
    confusion = [[0] * count for _ in range(count)]
    for i, row in enumerate(confusion):
        row[i], row[(i + 1) % count] = 50 - i, i
    test: dict[str, Any] = {
        "class_accuracy": [(50 - i) / 50 for i in range(count)], "confusion": confusion, "accuracy": 0.5,
        "loss": 1.25, "samples": 50 * count,
    }  # fmt: skip
    classes = tuple(f"<{i}>" for i in range(count))
    return RunFiles(tmp_path, vision(tmp_path), {}, [], classes, {"stage": "tune", "test": test}, [], None)


@pytest.mark.parametrize("count", [3, 25, 45])
def test_classes_and_confusion(tmp_path: Path, count: int) -> None:
    read = Page(str(results(files(tmp_path, count), None)))
    named = [row for row in read.rows if len(row) == 4 and row[0].endswith(">")]
    assert named[0][:2] == (["<44>", "0.120"] if count > 40 else ["<0>", "1.000"])
    assert len(named) == (20 + count if count > 40 else count)
    assert (f"All {count} classes" in read.text) is (count > 40)
    mistakes = [row for row in read.rows if len(row) == 3 and " of " in row[2]]
    assert len(mistakes) == (15 if count > 20 else 0)
    if mistakes:
        assert mistakes[0] == [f"<{count - 1}>", "<0>", f"{count - 1} of 50"]
    else:
        assert [row[1:] for row in read.rows if row[0] in ("<0> 0", "<1> 1", "<2> 2")] == [
            ["50", "", ""], ["", "49", "1"], ["2", "", "48"],
        ]  # fmt: skip
