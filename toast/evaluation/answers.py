"""Answers that a language model generates: whether they keep a format, and what they share with the truth."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import nn

from toast.evaluation.aggregation import IGNORED


class AnswerMetrics:
    """Measures of generated answers.

    Args:
        pattern: Regular expression that a whole answer has to match.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = re.compile(pattern)
        self.kept: list[bool] = []
        self.shared: list[float] = []

    def update(self, answer: str, ended: bool, truth: str) -> None:
        """Adds an answer.

        Args:
            answer: What was generated, without special tokens.
            ended: Whether the model ended it itself.
            truth: The answer of the data.
        """
        self.kept.append(ended and self.pattern.fullmatch(answer) is not None)
        self.shared.append(line_f1(answer, truth))

    def compute(self) -> dict[str, Any]:
        """Returns the measures of all answers.

        Returns:
            By name: `answers`, how many; `exact_format`, the share that ended and matched; `line_f1`, their
            mean F1 score.

        Raises:
            ValueError: If there were none.
        """
        if not self.kept:
            raise ValueError("no answer was measured; needs at least one.")
        return {
            "answers": len(self.kept),
            "exact_format": fmean(self.kept),
            "line_f1": fmean(self.shared),
        }


def line_f1(answer: str, truth: str) -> float:
    """Returns the F1 score of an answer's lines against those of the truth, 0 to 1.

    Lines are compared as sets, by their words: case, punctuation and spaces do not count, as in SQuAD's
    measure (arXiv 1606.05250), which compares words.
    """
    given, wanted = _lines(answer), _lines(truth)
    return 2 * len(given & wanted) / (len(given) + len(wanted)) if given or wanted else 1.0


def _lines(text: str) -> set[str]:
    lines = (" ".join(re.findall(r"\w+", line.casefold())) for line in text.splitlines())
    return {line for line in lines if line}


def prompt_and_answer(row: Mapping[str, Sequence[int]]) -> tuple[list[int], list[int]]:
    """Splits a row before its first answer; what comes after that answer is left out.

    Args:
        row: One document's `input_ids` and `labels`, where -100 marks what is not predicted.
    """
    tokens, labels = list(row["input_ids"]), row["labels"]
    start = next(place for place, label in enumerate(labels) if label != IGNORED)
    end = next((place for place in range(start, len(labels)) if labels[place] == IGNORED), len(labels))
    return tokens[:start], tokens[start:end]


@torch.no_grad()
def generate_answers(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[tuple[str, bool]]:
    """Continues prompts by the likeliest token each time.

    Args:
        model: A causal language model of transformers, wrapped or not, in evaluation mode.
        tokenizer: Its tokenizer; its EOS ends an answer.
        prompts: Tokens of each prompt.
        max_new_tokens: Where an answer is cut off.

    Returns:
        Of each prompt the answer without special tokens, and whether EOS ended it.
    """
    end = tokenizer.eos_token_id
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    longest = max(map(len, prompts))
    device = next(model.parameters()).device
    # On the left, for what is generated comes on the right.
    tokens = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    generate: Any = model.generate
    made = generate(
        input_ids=tokens.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=end,
        pad_token_id=pad,
    )[:, longest:].tolist()
    answers = []
    for row in made:
        ended = end in row
        text = tokenizer.decode(row[: row.index(end)] if ended else row, skip_special_tokens=True)
        answers.append((str(text), ended))
    return answers
