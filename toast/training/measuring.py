"""Measures a finished run, or the untrained model of a configuration: what `toast evaluate` does."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from toast.files import try_file
from toast.training import folder
from toast.training.accelerating import make_accelerator
from toast.training.evaluate import evaluate
from toast.training.loading import load_config
from toast.training.methods import apply_method, load_method
from toast.training.objective import Objective
from toast.training.preparing import open_all


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
        split: `validation` or `test`.
        predictions: Where each sample's prediction is written (vision).
        tasks: Language: tasks of lm-eval to measure instead of the split.
        tasks_at: Folder with task files of one's own.

    Returns:
        Figures by name.

    Raises:
        ValueError: If there is no such split, or something does not fit.
    """
    if split not in ("validation", "test"):
        raise ValueError(f"split: needs validation or test; got {split!r}.")
    if predictions is not None:
        try_file(predictions, "predictions")
    config = load_config(place, overrides)
    accelerator = make_accelerator(config)
    backbone, splits = open_all(config)
    trained = place / folder.ADAPTER
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
    data = getattr(splits, split)
    if data is None:
        raise ValueError(f"split: {place} names no {split} split; set data.{split}=….")
    objective = accelerator.prepare_model(
        Objective(model, backbone, config.task, "tune"), evaluation_mode=True
    )
    measured = evaluate(
        accelerator, objective, data, splits.collate, task=config.task, classes=splits.classes,
        batch_size=config.evaluation.batch_size or 2 * config.batch_size, workers=config.workers, name=split,
        predictions=predictions is not None, on_target=config.evaluation.attention_on_target,
    )  # fmt: skip
    assert measured is not None
    if predictions is not None and accelerator.is_main_process:
        measured.write_predictions(predictions)
    return measured.metrics | ({"bad_samples": dict(measured.bad)} if measured.bad else {})
