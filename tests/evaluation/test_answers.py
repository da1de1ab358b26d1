"""Generated answers against counting by hand and transformers' own generation, prompt by prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import toast
from tests.training.settings import write_language_model
from toast.evaluation.answers import AnswerMetrics, generate_answers, line_f1, prompt_and_answer

LIST = r"- .+(\n- .+)+"


def test_an_answer_keeps_the_format_whole_and_ended_or_not_at_all() -> None:
    metrics = AnswerMetrics(LIST)
    truth = "- salt\n- pepper"
    metrics.update("- salt\n- pepper", True, truth)
    metrics.update("- salt\n- pepper", False, truth)
    metrics.update("- salt", True, truth)
    metrics.update("Here it is:\n- salt\n- pepper", True, truth)
    found = metrics.compute()
    assert found["answers"] == 4
    assert found["exact_format"] == 0.25
    assert found["line_f1"] == pytest.approx((1 + 1 + 2 / 3 + 4 / 5) / 4)
    with pytest.raises(ValueError, match="no answer was measured"):
        AnswerMetrics(LIST).compute()


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("- Salt.\n\n-  black  pepper", "- salt\n- black pepper", 1),
        ("- salt\n- salt\n- salt", "- salt\n- milk", 2 / 3),
        ("", "- salt", 0),
        ("- crème fraîche", "- Crème fraîche", 1),
    ],
)
def test_lines_are_compared_by_their_words(answer: str, truth: str, expected: float) -> None:
    assert line_f1(answer, truth) == pytest.approx(expected)


def test_a_row_is_split_before_its_first_answer() -> None:
    row = {"input_ids": [5, 6, 7, 8, 9, 10], "labels": [-100, -100, 7, 8, -100, 10]}
    assert prompt_and_answer(row) == ([5, 6], [7, 8])
    assert prompt_and_answer({"input_ids": [5, 6], "labels": [-100, 6]}) == ([5], [6])


@pytest.mark.parametrize("steered", [False, True])
def test_prompts_together_are_continued_as_each_alone(tmp_path: Path, steered: bool) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = write_language_model(tmp_path / "model")
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(place).eval()
    tokenizer = AutoTokenizer.from_pretrained(place)
    for parameter in model.parameters():  # so random that the likeliest token is not always the same
        torch.nn.init.normal_(parameter, std=0.5)
    # This token comes first after one of the prompts: the answer is empty, and the model has ended it.
    prompts = [tokenizer(text)["input_ids"] for text in ("stir the rice", "salt", "a spoon of oil")]
    if steered:
        model = toast.wrap(model, init="official").eval()
    alone = [
        model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(alone[1][2])
    end = tokenizer.eos_token_id
    expected = []
    for row in alone:
        cut = row.index(end) if end in row else len(row)
        expected.append((tokenizer.decode(row[:cut], skip_special_tokens=True), end in row))
    assert generate_answers(model, tokenizer, prompts, 8) == expected
    assert expected[1][1]
