"""Data sets that the library `datasets` opens: of the Hub by name, or of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toast.data.splits import find_split, split_of


def import_datasets() -> Any:
    """Returns the library `datasets`.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "this data needs the library datasets: pip install 'toast-steering[train]'"
        ) from error
    return datasets


def load_split(
    name: str,
    split: str,
    *,
    config: str | None = None,
    revision: str | None = None,
    cache: Path | None = None,
    streaming: bool = False,
) -> Any:
    """Opens a split of a data set, by any common spelling of its name (`toast.data.splits`).

    Nothing of it runs: data sets that need code of their own are refused by the library.

    Args:
        name: Name on the Hub, such as "tatsu-lab/alpaca", or a folder that `datasets` reads or that
            `save_to_disk` wrote.
        split: Name of the split; a part of it as "train[:10%]".
        config: Name of the configuration, where the set has several.
        revision: Which version of it; a commit keeps a run repeatable.
        cache: Where downloads are kept; None is the library's own place.
        streaming: Whether rows are fetched as they are read.

    Returns:
        A `Dataset`, or an `IterableDataset` when streaming.

    Raises:
        ValueError: If it cannot be opened, or has no such split; the message says the library's reason.
        ImportError: If the library is not installed.
    """
    datasets = import_datasets()
    folder = Path(name)
    options = {"revision": revision, "cache_dir": None if cache is None else str(cache)}
    try:
        if (folder / "state.json").is_file():
            return _saved_alone(datasets.load_from_disk(name), name, split)
        if (folder / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(name)
            return splits[_spelled(name, split, list(splits))]
        try:
            return datasets.load_dataset(name, config, split=split, streaming=streaming, **options)
        except ValueError:  # so an unknown split is reported, and other faults
            base, bracket, part = split.partition("[")
            known = datasets.get_dataset_split_names(name, config, **options)
            if base in known or "+" in split:
                raise
            spelled = _spelled(name, base, known) + bracket + part
            return datasets.load_dataset(name, config, split=spelled, streaming=streaming, **options)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, UnknownSplit):
            raise
        raise ValueError(
            f"the data set {name!r}, split {split!r}, cannot be loaded: {error.__cause__ or error}. Needs "
            "its name on the Hub (and a network, or a download in the cache), or a folder."
        ) from error


class UnknownSplit(ValueError):
    """A split that a data set has not, or has twice."""


def _spelled(name: str, split: str, known: list[str]) -> str:
    found = find_split(split, known)
    if len(found) != 1:
        kind = "has several that match" if found else "has no such split"
        raise UnknownSplit(f"split {split!r}: {name} {kind}; its splits are {', '.join(known)}.")
    return found[0]


def _saved_alone(rows: Any, name: str, split: str) -> Any:
    """Returns a data set that was saved without others beside it, if it is the split that is wanted."""
    if "[" in split:
        raise UnknownSplit(
            f"split {split!r}: {name} was written by save_to_disk, so it has no parts to select."
        )
    own = None if rows.split is None else str(rows.split).partition("[")[0]
    kind = "train" if own is None else split_of(own) or own
    if (split_of(split) or split) != kind:
        raise UnknownSplit(
            f"split {split!r}: {name} holds one split alone, {own or 'which counts as train'}."
        )
    return rows
