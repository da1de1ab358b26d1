"""A model's prediction for each sample, as a file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from toast.files.atomic import beside


def write_predictions(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Writes predictions as JSON lines, beside the file and then renamed.

    Args:
        path: The file.
        rows: One mapping a sample, such as `index`, `name`, `label`, `predicted` and the `probabilities` of
            the most probable classes; taken one at a time.

    Returns:
        The file.

    Raises:
        ValueError: If a row holds what JSON has not, such as not a number; an earlier file is kept.
    """
    path = Path(path)
    with beside(path) as new, new.open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows):
            try:
                line = json.dumps(row, allow_nan=False, ensure_ascii=False)
            except (TypeError, ValueError) as error:
                raise ValueError(f"row {number} cannot be written as JSON: {error}; got {row}.") from error
            file.write(line + "\n")
    return path
