"""What steering the prompt alone does to held-out answers: `python scripts/steered_prompt.py RUN`.

A finished language run with TOAST is measured in three ways: every token steered, the prompt alone
(`steer_tokens="prompt"`: what comes behind it sees steered keys and values, and runs once), and the frozen
model. Of each: the perplexity of the answers, and of greedy ones the share in the run's format and the lines
that they share with the truth.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from tqdm import tqdm
from transformers import DynamicCache

import toast
from toast.calls.arguments import CACHE_NAMES
from toast.commands.errors import run_script
from toast.evaluation.answers import AnswerMetrics, generate_answers, prompt_and_answer
from toast.steering import find_steering
from toast.training.data import language_splits, some


@contextmanager
def steered(model: Any, how: str) -> Iterator[None]:
    """Makes a model steer all tokens, the prompt alone, or none."""
    if how == "none":
        with model.disable_adapter():
            yield
        return
    config = model.peft_config[model.active_adapter]
    before, config.steer_tokens = config.steer_tokens, how
    try:
        yield
    finally:
        config.steer_tokens = before


@torch.no_grad()
def loss_of(model: Any, prompt: list[int], answer: list[int]) -> float:
    """Returns the summed loss of an answer's tokens, which come behind the prompt on its cache."""
    base = model.get_base_model()
    steering = find_steering(model)
    name = CACHE_NAMES[-1] if steering is None else steering.methods["forward"].cache_name
    past = {name: DynamicCache(config=base.config), "use_cache": True}
    ids = torch.tensor([prompt + answer])
    first = model(input_ids=ids[:, : len(prompt)], **past).logits[0, -1:]
    rest = model(input_ids=ids[:, len(prompt) :], **past).logits[0, :-1]
    target = ids[0, len(prompt) :]
    return float(F.cross_entropy(torch.cat([first, rest]).float(), target, reduction="sum"))


def main(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run on instructions, with TOAST.")],
    limit: Annotated[int, typer.Option(min=1, help="Rows of the test split.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers at a time.")] = 10,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of PyTorch.")] = None,
) -> None:
    """Measures a run in three ways, and prints a table."""
    if threads is not None:
        torch.set_num_threads(threads)
    loaded = toast.load_run(run)
    data: Any = language_splits(loaded.config, loaded.backbone).test
    tokenizer, form = loaded.backbone.tokenizer, loaded.config.evaluation.format
    if data is None:
        raise ValueError(f"{run} has no test split; needs one with data.test.")
    pairs = [prompt_and_answer(data[row]) for row in some(len(data), limit)]
    table = Table("steered", "perplexity of answers", "exact format", "lines shared (F1)")
    for how in ("all", "prompt", "none"):
        with steered(loaded.model, how):
            losses = [loss_of(loaded.model, *pair) for pair in tqdm(pairs, how, leave=False)]
            perplexity = math.exp(sum(losses) / sum(len(answer) for _, answer in pairs))
            cells = [f"{perplexity:.2f}"]
            if form is not None:
                metrics = AnswerMetrics(form.pattern)
                for start in range(0, len(pairs), batch_size):
                    part = pairs[start : start + batch_size]
                    made = generate_answers(
                        loaded.model, tokenizer, [prompt for prompt, _ in part], form.max_new_tokens
                    )
                    for (answer, ended), (_, truth) in zip(made, part, strict=True):
                        metrics.update(answer, ended, tokenizer.decode(truth, skip_special_tokens=True))
                found = metrics.compute()
                cells += [f"{found['exact_format']:.2f}", f"{found['line_f1']:.3f}"]
        table.add_row(how, *cells)
    Console().print(table)


if __name__ == "__main__":
    run_script(main)
