"""Any picture data set that `datasets` loads: from the Hugging Face Hub, or from a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from toast.data.hub import import_datasets, load_split
from toast.data.vision.decoding import VERSION, read_picture
from toast.data.vision.source import BadSample, Sample, VisionSource

LABEL_COLUMNS: Final = ("label", "labels", "fine_label", "target", "class", "category")
"""Names that label columns have, best first."""
IMAGE_COLUMNS: Final = ("image", "img", "picture")
"""Names that picture columns have, best first."""


class HubSource(VisionSource):
    """Rows of a `datasets.Dataset`.

    Args:
        name: What the data are called.
        classes: Names of the classes.
        labels: Label of every row.
        rows: The data set, its picture column not decoded.
        column: The picture column.
        state: The fingerprint that `datasets` gave the data.
    """

    def __init__(
        self, name: str, classes: list[str], labels: list[int], rows: Any, column: str, state: str
    ) -> None:
        super().__init__(name, classes, labels)
        self.rows = rows
        self.column = column
        self.state = state

    def __getitem__(self, index: int) -> Sample:
        stored = self.rows[index][self.column]
        name = f"{self.name}[{index}]"
        if stored is None:
            raise BadSample(name, "the row has no picture")
        if stored["path"]:
            name = f"{name} {Path(stored['path']).name}"
        file = stored["bytes"] if stored["bytes"] is not None else Path(stored["path"])
        found = read_picture(file, name)
        return Sample(found.image, self.labels[index], name, notes=found.notes)

    def _identity(self) -> Iterable[bytes | memoryview]:
        yield from super()._identity()
        yield f"decoding {VERSION} {self.state}".encode()


def open_hub(
    root: Path | None,
    name: str,
    split: str,
    *,
    config: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> VisionSource:
    """Opens a data set with `datasets.load_dataset`.

    Labels are a column of class labels, of whole numbers, or of names. Of whole numbers and names, the
    classes are those of the training split, so that a class which another split lacks shifts no label.

    Args:
        root: Where downloads are kept; None is the cache of `datasets`.
        name: The data set's name on the Hub, or a folder that `datasets` reads or `save_to_disk` wrote.
        split: "train", "val" or "test", however the data set spells it; or in the words of `datasets`, such
            as "train[:1000]".
        config: Which configuration of the data set.
        revision: Which version of it; a commit keeps a run repeatable.
        image_column: The column of pictures; None finds it.
        label_column: The column of labels; None finds it.

    Raises:
        ValueError: If the data set, the split or a column is not there, or more than one column suits.
        ImportError: If `datasets` is not installed.
    """
    datasets = import_datasets()

    def load(split: str) -> Any:
        return load_split(name, split, config=config, revision=revision, cache=root)

    rows = load(split)
    image = image_column or _one(
        name,
        "image_column",
        [column for column, feature in rows.features.items() if isinstance(feature, datasets.Image)],
        IMAGE_COLUMNS,
        rows.column_names,
    )
    label = label_column or _label_column(name, rows.features)
    for option, column in (("image_column", image), ("label_column", label)):
        if column not in rows.column_names:
            raise ValueError(
                f"{option}: {name} has the columns {', '.join(rows.column_names)}; got {column!r}."
            )
    labels, classes = _labels(name, rows, label, split, load)
    state = hashlib.sha256(f"{rows._fingerprint} {image} {label}".encode()).hexdigest()
    undecoded = rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    return HubSource(f"{name}/{split}", classes, labels, undecoded, image, state)


def _one(name: str, option: str, found: list[str], usual: tuple[str, ...], columns: list[str]) -> str:
    """Chooses a column among those that suit."""
    best = [column for column in usual if column in found][:1] or found
    if len(best) != 1:
        suit = "none suits" if not best else f"{', '.join(best)} suit"
        raise ValueError(f"{name} has the columns {', '.join(columns)}; {suit}: say {option}=.")
    return best[0]


def _label_column(name: str, features: dict[str, Any]) -> str:
    """Finds the column of labels: class labels, else a usual name."""
    import datasets

    found = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if not found:
        plain = [column for column, feature in features.items() if _is_plain(feature)]
        found = [column for column in plain if column in LABEL_COLUMNS]
    return _one(name, "label_column", found, LABEL_COLUMNS, list(features))


def _is_plain(feature: Any) -> bool:
    """Whether a column holds whole numbers or names."""
    kind = getattr(feature, "dtype", "")
    return kind.lstrip("u").startswith("int") or kind in ("string", "large_string")


def _labels(name: str, rows: Any, column: str, split: str, load: Any) -> tuple[list[int], list[str]]:
    """Returns the label of every row, and the names of the classes."""
    import datasets

    feature = rows.features[column]
    values = list(rows.select_columns([column])[column])
    if None in values:
        raise ValueError(
            f"{name}, split {split!r}: {values.count(None)} of {len(values)} rows have no {column}, first "
            f"row {values.index(None)}."
        )
    if isinstance(feature, datasets.ClassLabel):
        return values, list(feature.names)
    if not _is_plain(feature):
        raise ValueError(f"label_column: {column!r} of {name} holds {feature}, neither numbers nor names.")
    training = values if split == "train" else list(load("train")[column])
    if feature.dtype in ("string", "large_string"):
        classes = sorted(set(training))
    else:
        classes = list(range(max(training) + 1))
    ids = {value: label for label, value in enumerate(classes)}
    strange = [row for row, value in enumerate(values) if value not in ids]
    if strange:
        raise ValueError(
            f"{name}, split {split!r}, row {strange[0]}: {column} {values[strange[0]]!r} is not one of the "
            f"{len(classes)} classes of the training split."
        )
    return [ids[value] for value in values], [str(value) for value in classes]
