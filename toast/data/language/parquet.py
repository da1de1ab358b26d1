"""Rows of a Parquet file, through the library `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from toast.data.hub import import_datasets


def stream_parquet(file: Path) -> Iterator[dict[str, Any]]:
    """Reads the rows of one Parquet file without a copy in a cache.

    Raises:
        ValueError: If it is no Parquet file.
    """
    datasets = import_datasets()
    try:
        yield from datasets.load_dataset("parquet", data_files=str(file), split="train", streaming=True)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{file}: not a Parquet file: {error.__cause__ or error}") from error
