"""`open_vision`: one call for every kind of labelled picture data set."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from toast.data.vision.class_folders import open_folder
from toast.data.vision.demo_task import open_demo
from toast.data.vision.fgvc import open_fgvc
from toast.data.vision.hub_pictures import open_hub
from toast.data.vision.source import VisionSource
from toast.data.vision.target_lists import open_csv
from toast.data.vision.torchvision_sets import open_torchvision
from toast.data.vision.vtab import open_vtab

_Need = Literal["needed", "optional", "unused"]


@dataclass(frozen=True)
class Row:
    """A kind of source.

    Args:
        about: What it reads, in a few words.
        open: Called with root, name and split, and the options by keyword.
        root: Whether it needs a folder.
        name: Whether it needs a name.
    """

    about: str
    open: Callable[..., VisionSource]
    root: _Need
    name: _Need


SOURCES: Final = {
    "folder": Row("a folder for each class", open_folder, root="needed", name="optional"),
    "csv": Row("a list, labels.csv, with columns of targets", open_csv, root="needed", name="optional"),
    "hub": Row("what the library datasets loads", open_hub, root="optional", name="needed"),
    "torchvision": Row("a class of torchvision.datasets", open_torchvision, root="needed", name="needed"),
    "fgvc": Row(
        "cub, nabirds, flowers, dogs, cars with VPT's splits", open_fgvc, root="needed", name="needed"
    ),
    "vtab": Row("the nineteen tasks of VTAB-1k as text lists", open_vtab, root="needed", name="needed"),
    "demo": Row("the task that the package contains", open_demo, root="unused", name="unused"),
}
"""The kinds of sources by name."""


def open_vision(
    source: str,
    *,
    root: Path | None = None,
    name: str | None = None,
    split: str = "train",
    **options: Any,
) -> VisionSource:
    """Opens a split of a labelled picture data set.

    Args:
        source: The kind of data set, a key of `SOURCES`.
        root: Folder that the data lie in.
        name: Which data set of this kind.
        split: "train", "val" or "test", and what else the kind has.
        **options: Options of the kind: the keywords of its `open_` function.

    Raises:
        ValueError: If there is no such kind or option, something that it needs is not given, or the data are
            not there or malformed.
        ImportError: If a library that the kind needs is not installed.
    """
    if source not in SOURCES:
        kinds = "; ".join(f"{key} ({row.about})" for key, row in SOURCES.items())
        raise ValueError(f"source: the kinds are {kinds}; got {source!r}.")
    row = SOURCES[source]
    for field, need, given in (("root", row.root, root), ("name", row.name, name)):
        if need == "needed" and given is None:
            raise ValueError(f"{field}: source {source!r} needs one ({row.about}).")
        if need == "unused" and given is not None:
            raise ValueError(f"{field}: source {source!r} has none ({row.about}); got {str(given)!r}.")
    parameters = inspect.signature(row.open).parameters.values()
    allowed = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    unknown = [option for option in options if option not in allowed]
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        has = f"the options {', '.join(allowed)}" if allowed else "no options"
        raise ValueError(f"source {source!r} has {has}; got {', '.join(unknown)}.")
    return row.open(None if root is None else Path(root).expanduser(), name, split, **options)
