"""What a run measured, as the Hub's model index in the card of its adapter."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from toast.saving.card import add_results
from toast.training.run_config import RunConfig

#: What the Hub calls the tasks.
_TASKS = {"vision": "image-classification", "language": "text-generation"}


def add_run_to_card(folder: Path, config: RunConfig, result: dict[str, Any]) -> None:
    """Gives the card of a run's adapter the figures of its test and validation split.

    Args:
        folder: The adapter's folder.
        config: The run's configuration.
        result: What `result.json` holds.
    """
    data = config.data.name or (config.data.root.name if config.data.root else config.data.source)
    found = [
        EvalResult(
            task_type=_TASKS[config.task],
            dataset_type=data,
            dataset_name=data,
            dataset_split=split,
            metric_type=name,
            metric_value=round(value, 4),
        )
        for split in ("test", "validation")
        for name, value in (result[split] or {}).items()
        if isinstance(value, float) and math.isfinite(value)
    ]
    add_results(folder, config.name, found)
