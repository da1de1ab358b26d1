"""Features with labels and names as one file for other tools, written as they come."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toast.files.atomic import beside

#: Rows that are in memory at a time.
_ROWS = 1024


@dataclass(frozen=True)
class Features:
    """Features of samples, and what is known of each.

    Args:
        width: Numbers of a sample.
        names: What each sample is called.
        labels: Name of a column of labels -> one a sample: whole numbers, numbers, or texts.
        read: Maps places among the samples to their features, float32 `(samples, width)`.
        about: What is written beside them, such as the names of the classes; becomes JSON.
    """

    width: int
    names: Sequence[str]
    labels: Mapping[str, Sequence[Any]]
    read: Callable[[Sequence[int]], Tensor]
    about: Mapping[str, Any] = field(default_factory=dict)

    def parts(self) -> Iterator[tuple[range, Tensor]]:
        """Yields the features of all samples, so many at a time, with their places."""
        for start in range(0, len(self.names), _ROWS):
            rows = range(start, min(start + _ROWS, len(self.names)))
            yield rows, self.read(rows)


def check_suffix(path: Path) -> None:
    """Refuses a file whose suffix says no format that is written.

    Raises:
        ValueError: If it is another one.
        ImportError: If the format needs a library that is not installed.
    """
    if path.suffix not in _WRITE:
        raise ValueError(f"--out: needs a file that ends in {' or '.join(_WRITE)}; got {path.name!r}.")
    if path.suffix == ".parquet":
        _import_pyarrow()


def write_features(path: Path, features: Features) -> None:
    """Writes features in the format that the file's suffix says; whole or not at all.

    safetensors: `features` `(samples, width)`, a tensor for each column of numbers; names, columns of texts
    and `about` are in the metadata, as JSON. Parquet: a row a sample with `name`, the columns of labels and
    `features`, a list of one length; `about` is in the metadata of the schema.

    Raises:
        ValueError: If the suffix says no format.
    """
    check_suffix(path)
    with beside(path) as new:
        _WRITE[path.suffix](new, features)


def _write_safetensors(path: Path, features: Features) -> None:
    """Writes header and rows by hand: the library's own writer needs all tensors in memory."""
    columns = {name: torch.tensor(held) for name, held in features.labels.items() if _is_numeric(held)}
    texts = {name: held for name, held in features.labels.items() if name not in columns}
    meta = {"names": list(features.names), **texts, **features.about}
    header: dict[str, Any] = {
        "__metadata__": {name: json.dumps(held, ensure_ascii=False) for name, held in meta.items()}
    }
    end = 0
    shapes = {"features": (len(features.names), features.width), **{n: t.shape for n, t in columns.items()}}
    for name, shape in shapes.items():
        kind = "I64" if name in columns and columns[name].dtype == torch.int64 else "F32"
        start, end = end, end + torch.Size(shape).numel() * (8 if kind == "I64" else 4)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, values in features.parts():
            file.write(values.contiguous().numpy().data)
        for column in columns.values():
            file.write(column.contiguous().numpy().data)


def _write_parquet(path: Path, features: Features) -> None:
    pa, parquet = _import_pyarrow()
    kinds = {name: pa.array(list(held)).type for name, held in features.labels.items()}
    schema = pa.schema(
        [("name", pa.string()), *kinds.items(), ("features", pa.list_(pa.float32(), features.width))],
        metadata={name: json.dumps(held, ensure_ascii=False) for name, held in features.about.items()},
    )
    with parquet.ParquetWriter(path, schema) as writer:
        for rows, values in features.parts():
            flat = pa.array(values.flatten().numpy())
            columns = [
                pa.array([features.names[row] for row in rows], pa.string()),
                *(pa.array([held[row] for row in rows], kinds[n]) for n, held in features.labels.items()),
                pa.FixedSizeListArray.from_arrays(flat, features.width),
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema))


_WRITE: dict[str, Callable[[Path, Features], None]] = {
    ".safetensors": _write_safetensors,
    ".parquet": _write_parquet,
}


def _is_numeric(held: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) for value in held)


def _import_pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("Parquet needs pyarrow: pip install 'toast-steering[train]'") from error
    return pyarrow, parquet
