"""Predictions are written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from toast.evaluation.predictions import write_predictions


def test_predictions_are_a_line_each(tmp_path: Path) -> None:
    rows = [
        {"index": i, "name": f"é{i}", "label": None, "predicted": 1, "probabilities": [0.5]} for i in range(3)
    ]
    path = write_predictions(tmp_path / "new" / "predictions.jsonl", iter(rows))
    assert [json.loads(line) for line in path.read_text("utf-8").splitlines()] == rows
    assert [entry.name for entry in path.parent.iterdir()] == ["predictions.jsonl"]


def test_a_bad_row_keeps_the_earlier_file(tmp_path: Path) -> None:
    path = write_predictions(tmp_path / "predictions.jsonl", [{"index": 0}])
    with pytest.raises(ValueError, match="row 1 cannot be written as JSON: Out of range"):
        write_predictions(path, [{"index": 1}, {"probability": float("nan")}])
    assert path.read_text() == '{"index": 0}\n'
    assert [entry.name for entry in tmp_path.iterdir()] == ["predictions.jsonl"]
