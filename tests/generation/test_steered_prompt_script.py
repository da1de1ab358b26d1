"""The script that measures a run with its prompts steered alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import toast
from scripts.steered_prompt import loss_of, main, steered
from tests.training.settings import instructions
from toast.evaluation.answers import prompt_and_answer
from toast.training.data import language_splits
from toast.training.run import run


def test_a_run_is_measured_in_three_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    form = {"pattern": r"- .+(\n- .+)+", "max_new_tokens": 8}
    config = instructions(
        tmp_path, method="toast", epochs=2, optimizer__learning_rate=1e-2, evaluation__format=form
    )
    run(config, "tune")
    main(config.folder, limit=3, batch_size=2)
    printed = capsys.readouterr().out
    assert all(how in printed for how in ("all", "prompt", "none", "perplexity"))
    loaded = toast.load_run(config.folder)
    prompt, answer = prompt_and_answer(language_splits(loaded.config, loaded.backbone).test[0])
    losses = {}
    for how in ("all", "prompt", "none"):
        with steered(loaded.model, how):
            losses[how] = loss_of(loaded.model, prompt, answer)
    ids, labels = torch.tensor([prompt + answer]), torch.tensor([[-100] * len(prompt) + answer])
    with torch.no_grad():
        whole = loaded.model(ids, labels=labels, use_cache=False).loss * len(answer)
    assert losses["all"] == pytest.approx(float(whole), rel=1e-5)
    assert len({round(loss, 6) for loss in losses.values()}) == 3
