"""Tables of lines whose differences are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.study.studies import study, write_predictions
from toast.study import tables
from toast.study.figures import draw
from toast.study.lines import append_line, pictures_path, read_lines, write_pictures
from toast.study.tables import page
from toast.training.run_config import RunConfig


def _write(tmp_path: Path, right: dict[str, int], points: tuple[Any, ...] = (None,), **fields: Any) -> None:
    """Writes lines of two seeds; a row has answered the first so many of 200 pictures rightly."""
    results = tmp_path / "results"
    for point in points:
        for row, count in right.items():
            for seed in (0, 1):
                line: dict[str, Any] = {
                    "study": "small", "task": "small", "row": row, "point": point, "seed": seed,
                    "evaluation": None, "chosen": {"optimizer.learning_rate": 0.01}, "validation": 0.5,
                    "test": {
                        "accuracy": (count + 2 * seed) / 200, "attention_on_target": count / 400,
                        "selection_ratio": 1.5,
                    },
                    "steps": 10, "step_seconds": 2.0, "median_step_seconds": 0.5,
                    "trainable_parameters": 1234,
                } | fields  # fmt: skip
                predictions = tmp_path / "predictions.jsonl"
                write_predictions(predictions, np.arange(200) < count + 2 * seed, np.linspace(1, 0, 200))
                at = pictures_path(results, line)
                write_pictures(at, predictions)
                append_line(results / "small.jsonl", line | {"pictures": str(at.relative_to(results))})


def _page(config: RunConfig, tmp_path: Path) -> list[str]:
    return page(config, tmp_path / "results").splitlines()


def test_the_main_table(tmp_path: Path) -> None:
    _write(tmp_path, {"linear": 80, "toast": 120})
    lines = _page(study(tmp_path, {"reference": "linear"}), tmp_path)
    assert lines[4] == (
        "|  | chosen | validation | accuracy | vs. linear | attention on target | weight in / out | "
        "trained | steps | s per step | seeds |"
    )
    assert lines[6] == (
        "| linear | learning rate 0.01 | 0.500 | 0.405 ± 0.007 |  | 0.200 ± 0.000 | 1.50 ± 0.00 | 1,234 "
        "| 10 | 0.500 | 2 |"
    )
    cells = [cell.strip() for cell in lines[7].split("|")]
    difference, low, high = (float(part.strip("[],")) for part in cells[5].split())
    error = (0.2 * 0.8 / 200) ** 0.5  # forty of two hundred pictures differ, always to one side
    assert difference == pytest.approx(0.2)
    assert (low, high) == (
        pytest.approx(0.2 - 1.96 * error, abs=0.008),
        pytest.approx(0.2 + 1.96 * error, abs=0.008),
    )
    assert lines[11].startswith("| linear | 0.000 | 0.000 | 0.025 | 1.000 | 1.000 | +0.8")


def test_rows_are_correlated_if_there_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, {"linear": 80, "toast": 120})
    said = "Over 2 rows the mean attention on target and the accuracy correlate by +1.00 (ranks: +1.00)."
    assert said not in _page(study(tmp_path), tmp_path)
    monkeypatch.setattr(tables, "ROWS_TO_CORRELATE", 2)
    assert said in _page(study(tmp_path), tmp_path)


def test_other_pictures_are_not_compared(tmp_path: Path) -> None:
    _write(tmp_path, {"linear": 80})
    _write(tmp_path, {"toast": 120})
    for seed in (0, 1):
        write_predictions(tmp_path / "few.jsonl", np.ones(10))
        write_pictures(
            tmp_path / "results" / "small" / f"small,toast,seed-{seed}.npz", tmp_path / "few.jsonl"
        )
    with pytest.raises(ValueError, match="toast, linear: were measured on different pictures"):
        _page(study(tmp_path), tmp_path)
    (tmp_path / "results" / "small" / "small,toast,seed-0.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=r"seed-0\.npz cannot be read: .* Delete its line"):
        _page(study(tmp_path), tmp_path)


def test_curves(tmp_path: Path) -> None:
    config = study(tmp_path, {"curve": {"data.limit": [10, 300]}, "reference": "linear"})
    _write(tmp_path, {"linear": 80, "toast": 120}, (10,))
    _write(tmp_path, {"toast": 140}, (300,))
    lines = _page(config, tmp_path)
    at = lines.index("## small: accuracy by limit")
    assert lines[at + 2 : at + 6] == [
        "|  | 10 | 300 |",
        "| --- | --- | --- |",
        "| linear | 0.405 ± 0.007 |  |",
        "| toast | 0.605 ± 0.007 | 0.705 ± 0.007 |",
    ]
    assert "## small, limit 300" in lines
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        [drawn] = draw(config, tmp_path / "results", suffix)
        assert drawn == tmp_path / "results" / f"small-small{suffix}"
        assert drawn.read_bytes().startswith(start)


def test_evaluations_have_tables_of_their_own(tmp_path: Path) -> None:
    config = study(tmp_path, {"evaluations": {"blurred": {"data.options.blur": 1}}})
    _write(tmp_path, {"linear": 80})
    assert not any("blurred" in line for line in _page(config, tmp_path))
    _write(tmp_path, {"linear": 20}, evaluation="blurred")
    lines = _page(config, tmp_path)
    assert "| 0.405 ± 0.007 |" in lines[6]
    assert "| 0.105 ± 0.007 |" in lines[lines.index("## small, measured at blurred") + 4]


def test_text_is_shown_by_its_own_measures(tmp_path: Path) -> None:
    config = study(tmp_path).model_copy(update={"task": "language"})
    for seed in (0, 1):
        line = {
            "study": "small", "task": "small", "row": "toast", "point": None, "seed": seed,
            "evaluation": None, "chosen": {"optimizer.learning_rate": 0.01}, "validation": 2.5,
            "test": {"perplexity": 12.0, "loss": 2.485, "exact_format": 0.5, "line_f1": 0.25 + 0.1 * seed},
            "steps": 10, "step_seconds": 2.0, "median_step_seconds": 0.5, "trainable_parameters": 1234,
        }  # fmt: skip
        append_line(tmp_path / "results" / "small.jsonl", line)
    lines = _page(config, tmp_path)
    assert "| perplexity | exact format | line F1 | loss |" in lines[4]
    assert "| 12.00 ± 0.00 | 0.500 ± 0.000 | 0.300 ± 0.071 | 2.485 ± 0.000 |" in lines[6]
    [drawn] = draw(config, tmp_path / "results", ".svg")
    text = drawn.read_text()
    assert "perplexity" in text
    assert "attention" not in text


def test_seconds_of_several_devices_are_not_compared(tmp_path: Path) -> None:
    config = study(tmp_path)
    _write(tmp_path, {"linear": 80, "toast": 120})
    path = tmp_path / "results" / "small.jsonl"

    def shown() -> tuple[list[str], bool]:
        """Seconds in the table, and whether there are any in the figure."""
        lines = _page(config, tmp_path)
        column = lines[4].split("|").index(" s per step ")
        [drawn] = draw(config, tmp_path / "results", ".svg")
        return [line.split("|")[column].strip() for line in lines[6:8]], "seconds" in drawn.read_text()

    seconds, are_drawn = shown()
    assert all(seconds)
    assert are_drawn
    other = next(line for line in read_lines(path) if line["row"] == "toast")
    append_line(path, other | {"device": "another"})
    assert shown() == ([seconds[0], ""], False)


def test_no_lines(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"small\.jsonl holds no lines yet"):
        _page(study(tmp_path), tmp_path)
    assert draw(study(tmp_path), tmp_path / "results") == []
