"""Measures a finished run, or the untrained model of a configuration: what `toast evaluate` does."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from toast.data.vision.noting import Notes
from toast.files.atomic import try_file
from toast.training import run_folder
from toast.training.accelerating import make_accelerator
from toast.training.answering import measure_answers
from toast.training.at_end import under_corruption
from toast.training.config_files import load_config
from toast.training.methods import apply_method, load_method
from toast.training.objective import Objective
from toast.training.preparing import open_all
from toast.training.split_measures import Measured, evaluate
from toast.training.workers import as_messages


@as_messages()
def measure(
    place: Path,
    overrides: Iterable[str] = (),
    split: str = "test",
    predictions: Path | None = None,
    tasks: Iterable[str] = (),
    tasks_at: Path | None = None,
) -> dict[str, Any]:
    """Measures a model.

    Args:
        place: A run's folder, or a configuration, whose model is measured as it starts.
        overrides: Settings on top, such as other data: `data.root=…`.
        split: `validation`, `test`, or one of `evaluation.splits`.
        predictions: Where each sample's prediction is written (vision).
        tasks: Language: tasks of lm-eval to measure instead of the split.
        tasks_at: Folder with task files of one's own.

    Returns:
        Figures by name; `classes` are the names of what `class_accuracy` and `confusion` count, in their
        order; of the test split also `corrupted`, if `evaluation.corruptions` says so.

    Raises:
        ValueError: If there is no such split, or something does not fit.
    """
    if predictions is not None:
        try_file(predictions, "predictions")
    config = load_config(place, overrides)
    config.check_split(split)
    accelerator = make_accelerator(config)
    trained, labels = place / run_folder.ADAPTER, place / run_folder.LABELS
    record = run_folder.read_labels(labels, True) if config.heads and labels.is_file() else None
    backbone, splits = open_all(config, record=record)
    if trained.is_dir():
        model = load_method(backbone, config, trained)
    else:
        model = apply_method(backbone, config, "tune").model
    model = model.to(accelerator.device).eval()
    tasks = list(tasks)
    if tasks:
        if config.task != "language":
            raise ValueError("lm-eval measures language models; the task of this configuration is vision.")
        from toast.evaluation.lm_eval import evaluate_with_lm_eval

        size = config.evaluation.batch_size or config.batch_size
        return evaluate_with_lm_eval(
            model,
            backbone.tokenizer,
            tasks,
            include_path=tasks_at,
            limit=config.evaluation.limit,
            batch_size=size,
        )
    if split not in splits.held_out:
        raise ValueError(f"split: {place} names no {split} split; set data.{split}=….")
    objective = accelerator.prepare_model(
        Objective(model, backbone, splits.answers, "tune"), evaluation_mode=True
    )

    def measured_on(data: Any, name: str, predictions: bool = False) -> Measured:
        found = evaluate(
            accelerator, objective, data, splits.collate, answers=splits.answers,
            batch_size=config.evaluation.batch_size or 2 * config.batch_size, workers=config.workers,
            name=name, predictions=predictions, on_target=config.evaluation.attention_on_target,
            bad_share=config.data.bad_share,
        )  # fmt: skip
        assert found is not None
        return found

    measured = measured_on(splits.held_out[split], split, predictions is not None)
    if config.evaluation.format is not None:
        size = config.evaluation.batch_size or 2 * config.batch_size
        data, form = splits.held_out[split], config.evaluation.format
        measured.metrics |= (
            measure_answers(accelerator, objective, data, backbone.tokenizer, form, size) or {}
        )
    corrupted = under_corruption(splits, measured_on) if split == "test" else {}
    if predictions is not None and accelerator.is_main_process:
        measured.write_predictions(predictions)
    notes = Notes()
    notes.add(measured.notes)
    beside = {
        "classes": list(splits.classes),
        "bad_samples": dict(measured.bad),
        "remarks": [*splits.remarks, *notes.summary()],
    }
    return measured.metrics | corrupted | {name: value for name, value in beside.items() if value}
