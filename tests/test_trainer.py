"""Stage one in transformers' `Trainer`: its loss is that of `toast.pretraining_loss`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import TrainingArguments

import toast
from tests.models import decoder, images, tokens, vit


def _language() -> tuple[Any, list[dict[str, Any]], Any]:
    rows = tokens(batch=4, length=8)
    return decoder(dtype=torch.float32), [{"input_ids": row, "labels": row} for row in rows], None


def _vision() -> tuple[Any, list[dict[str, Any]], Any]:
    rows = images().float()
    return vit().float(), [{"x": row, "labels": torch.tensor(i)} for i, row in enumerate(rows)], cross_entropy


@pytest.mark.parametrize("made", [_language, _vision])
def test_the_trainer_minimises_the_loss_of_stage_one(tmp_path: Path, made: Any) -> None:
    torch.manual_seed(0)
    base, rows, task_loss = made()
    model = toast.wrap(base, init="official").eval()
    batch = torch.utils.data.default_collate(rows)
    labels = batch["labels"]
    given = {name: held for name, held in batch.items() if task_loss is None or name != "labels"}
    loss = (lambda out: out.loss) if task_loss is None else (lambda out: task_loss(out, labels))
    expected, parts = toast.pretraining_loss(model, task_loss=loss, **given)
    settings = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        per_device_eval_batch_size=4, logging_steps=1, report_to=[], use_cpu=True, learning_rate=1e-2,
        save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = toast.PretrainingTrainer(
        model, settings, train_dataset=rows, eval_dataset=rows, task_loss=task_loss
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(parts["task"]), rel=1e-5)
    trainer.train()
    logged = [line for line in trainer.state.log_history if "reconstruction" in line]
    assert logged[0]["loss"] == pytest.approx(float(expected.detach()), rel=1e-4)
    assert logged[-1]["loss"] < logged[0]["loss"]
