"""A run measures the answers that its model generates for the test split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.training.settings import instructions, language, vision
from toast.training.measuring import measure
from toast.training.run import Run, run

FORMAT: dict[str, Any] = {"pattern": r"- .+(\n- .+)+", "max_new_tokens": 24, "limit": 3}


@pytest.mark.parametrize("method", ["lora", "toast-lite", "full"])
def test_a_run_measures_generated_answers(tmp_path: Path, method: str) -> None:
    config = instructions(tmp_path, method=method, epochs=1, evaluation__format=FORMAT)
    result = run(config, "tune")
    test = result["test"]
    assert test["answers"] == 3
    assert 0 <= test["exact_format"] <= 1
    assert 0 <= test["line_f1"] <= 1
    assert test["perplexity"] > 0
    again = measure(config.folder)
    assert {name: again[name] for name in test} == test
    assert measure(config.folder, ["evaluation.format.limit=2"])["answers"] == 2
    assert "answers" not in measure(config.folder, ["evaluation.format=null"])


def test_a_model_that_has_learnt_the_answers_keeps_the_format(tmp_path: Path) -> None:
    """Of the four sentences, each is in both splits: a model that has them by heart is right."""
    config = instructions(
        tmp_path, method="full", epochs=80, batch_size=12, optimizer__learning_rate=3e-2,
        evaluation__format=FORMAT | {"limit": None}, evaluation__before=True,
    )  # fmt: skip
    result = run(config, "tune")
    assert result["before"]["test"]["exact_format"] == 0
    assert result["test"]["exact_format"] == 1
    assert result["test"]["line_f1"] == 1
    assert result["test"]["answers"] == 4


def test_a_run_that_has_answered_before_training_trains_in_training_mode(tmp_path: Path) -> None:
    config = instructions(tmp_path, epochs=1, evaluation__format=FORMAT, evaluation__before=True)
    prepared = Run(config, "tune")
    assert "answers" in prepared.execute(resume=False)["before"]["test"]
    assert all(module.training for module in prepared.objective.modules())


def test_the_validation_split_is_not_answered(tmp_path: Path) -> None:
    config = instructions(tmp_path, epochs=1, data__validation_share=0.25, evaluation__format=FORMAT)
    assert "answers" not in run(config, "tune")["validation"]
    assert "answers" in json.loads((config.folder / "result.json").read_text())["test"]


def test_settings_without_answers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluation\.format: for language; the task is vision"):
        vision(tmp_path, evaluation__format=FORMAT)
    with pytest.raises(ValueError, match=r"needs rows of one prompt.*got packing none and source text"):
        language(tmp_path, evaluation__format=FORMAT)
    with pytest.raises(ValueError, match=r"got packing documents and source alpaca"):
        instructions(tmp_path, evaluation__format=FORMAT, data__packing="documents")
    with pytest.raises(ValueError, match=r"PEFT generates wrongly from the prompts of vpt-deep"):
        instructions(tmp_path, method="vpt-deep", evaluation__format=FORMAT)
    with pytest.raises(ValueError, match=r"evaluation\.format\.pattern: .*needs a regular expression; '\('"):
        instructions(tmp_path, evaluation__format={"pattern": "("})
