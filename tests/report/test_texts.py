"""What of a row stands under prompt and answer."""

from __future__ import annotations

from typing import Any

import pytest

from toast.report import texts


class _Letters:
    """A tokenizer of letters that puts `^` before every text."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in "^" + text]}

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(map(chr, ids))


def _row(text: str, counted: str, positions: bool) -> dict[str, Any]:
    """Returns a row; of `counted` the letters that are not `.` are those that the loss counts."""
    row = {
        "input_ids": [ord(letter) for letter in text],
        "labels": [-100 if mark == "." else ord(mark) for mark in counted],
    }
    starts = [i for i, letter in enumerate(text) if letter == "^"]
    held = [i - max(start for start in starts if start <= i) for i in range(len(text))]
    return row | ({"position_ids": held} if positions else {})


@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize(
    ("text", "counted", "prompt", "answer"),
    [
        ("^ask:yes^more:no", ".....yes......no", "ask:", "yes"),
        ("^ask:yes", ".....yes", "ask:", "yes"),
        ("^ask:yes,why:so", ".....yes.....so", "ask:", "yes"),
    ],
)
def test_the_next_prompt_is_no_answer(
    monkeypatch: pytest.MonkeyPatch, text: str, counted: str, prompt: str, answer: str, positions: bool
) -> None:
    seen: dict[str, str] = {}

    def look(model: object, tokenizer: object, asked: str, *, answer: str, max_tokens: int) -> None:
        seen.update(prompt=asked, answer=answer)

    monkeypatch.setattr(texts, "look_at_text", look)
    texts._maps(None, _Letters(), _row(text, counted, positions))  # type: ignore[arg-type]
    assert seen == {"prompt": prompt, "answer": answer}


def test_packed_texts_without_prompts_end_where_the_next_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, str] = {}
    monkeypatch.setattr(texts, "look_at_text", lambda m, t, asked, **k: seen.update(prompt=asked, **k))
    texts._maps(None, _Letters(), _row("^first^second", ".first.second", True))  # type: ignore[arg-type]
    assert (seen["prompt"], seen["answer"]) == ("first", "")
