"""Has a model answer the prompts of a split, and measures the answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from toast.evaluation.answers import AnswerMetrics, generate_answers, prompt_and_answer
from toast.training.data import some
from toast.training.format_config import FormatConfig
from toast.visual.modes import evaluating


def measure_answers(
    accelerator: Accelerator,
    objective: nn.Module,
    data: Any,
    tokenizer: Any,
    settings: FormatConfig,
    batch_size: int,
    stop: Callable[[], Any] = lambda: False,
) -> dict[str, Any] | None:
    """Measures generated answers.

    Every process generates all of them: a sharded model needs all processes at each token, and they are few.

    Args:
        accelerator: What prepared the objective.
        objective: Holds the model.
        data: A map-style data set of rows with one prompt and its answer.
        tokenizer: The model's tokenizer.
        settings: The format, and how many answers.
        batch_size: Answers at a time.
        stop: Asked after each batch whether to give up.

    Returns:
        Figures by name, see `AnswerMetrics`; None if it was given up.
    """
    model = accelerator.unwrap_model(objective).model
    metrics = AnswerMetrics(settings.pattern)
    rows = some(len(data), settings.limit)
    starts = range(0, len(rows), batch_size)
    with evaluating(model):
        for start in tqdm(
            starts, "answers", unit="batch", leave=False, disable=not accelerator.is_main_process
        ):
            pairs = [prompt_and_answer(data[row]) for row in rows[start : start + batch_size]]
            with accelerator.autocast():
                made = generate_answers(
                    model, tokenizer, [prompt for prompt, _ in pairs], settings.max_new_tokens
                )
            for (answer, ended), (_, truth) in zip(made, pairs, strict=True):
                metrics.update(answer, ended, tokenizer.decode(truth, skip_special_tokens=True))
            if stop():
                return None
    return metrics.compute()
