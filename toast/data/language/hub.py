"""Rows through the library `datasets`: sets of the Hub by name, local folders of its making, Parquet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


def import_datasets() -> Any:
    """Returns the library `datasets`.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "language data needs the library datasets: pip install 'toast-steering[train]'"
        ) from error
    return datasets


def open_hub(name: str, config: str | None, split: str, streaming: bool) -> Any:
    """Opens a data set of the Hub, or a local folder in one of its formats.

    Nothing of it runs: data sets that need code of their own are refused by the library.

    Args:
        name: Name on the Hub, such as "tatsu-lab/alpaca", or path of a folder.
        config: Name of the configuration, where the set has several.
        split: Name of the split; a part of it as "train[:10%]".
        streaming: Whether rows are fetched as they are read.

    Returns:
        A `Dataset`, or an `IterableDataset` when streaming.

    Raises:
        ValueError: If it cannot be opened; the message says the library's reason.
    """
    datasets = import_datasets()
    try:
        return datasets.load_dataset(name, config, split=split, streaming=streaming)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        raise ValueError(
            f"data set {name!r}, split {split!r}, cannot be opened: {cause} "
            "Check the name, the split and the connection; a local path works too."
        ) from error


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
