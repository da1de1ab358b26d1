"""The labelled data sets of torchvision: how each spells its splits, and where it keeps labels and files."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from toast.data.vision.decoding import DECODING_ERRORS, VERSION, reason, to_rgb
from toast.data.vision.picture_files import file_state
from toast.data.vision.source import BadSample, Sample, VisionSource

log = logging.getLogger(__name__)

Splits = Mapping[str, Mapping[str, Any]]

_FLAG: Final[Splits] = {"train": {"train": True}, "test": {"train": False}}
_TWO: Final[Splits] = {name: {"split": name} for name in ("train", "test")}
_THREE: Final[Splits] = {name: {"split": name} for name in ("train", "val", "test")}
_WHOLE: Final[Splits] = {"train": {}}

DATASETS: Final[dict[str, Splits]] = {
    "CIFAR10": _FLAG,
    "CIFAR100": _FLAG,
    "CLEVRClassification": {name: {"split": name} for name in ("train", "val")},
    "Caltech101": _WHOLE,
    "Caltech256": _WHOLE,
    "Country211": {"train": {"split": "train"}, "val": {"split": "valid"}, "test": {"split": "test"}},
    "DTD": _THREE,
    "EuroSAT": _WHOLE,
    "FER2013": _TWO,
    "FGVCAircraft": {name: {"split": name} for name in ("train", "val", "trainval", "test")},
    "FakeData": {"train": {"random_offset": 0}, "test": {"random_offset": 1_000_000}},
    "FashionMNIST": _FLAG,
    "Flowers102": _THREE,
    "Food101": _TWO,
    "GTSRB": _TWO,
    "ImageNet": {name: {"split": name} for name in ("train", "val")},
    "Imagenette": {name: {"split": name} for name in ("train", "val")},
    "KMNIST": _FLAG,
    "MNIST": _FLAG,
    "OxfordIIITPet": {
        name: {"split": spelled} for name, spelled in (("train", "trainval"), ("test", "test"))
    },
    "PCAM": _THREE,
    "Places365": {"train": {"split": "train-standard"}, "val": {"split": "val"}},
    "QMNIST": _FLAG,
    "RenderedSST2": _THREE,
    "SEMEION": _WHOLE,
    "STL10": _TWO,
    "SUN397": _WHOLE,
    "SVHN": {name: {"split": name} for name in ("train", "test", "extra")},
    "StanfordCars": _TWO,
    "USPS": _FLAG,
    # what torchvision calls EMNIST's split is which letters and digits are in it
    **{
        f"EMNIST-{kind}": {name: {"split": kind, "train": name == "train"} for name in ("train", "test")}
        for kind in ("byclass", "bymerge", "balanced", "letters", "digits", "mnist")
    },
}
"""By class of `torchvision.datasets`, with its variant behind "-", the arguments that make each split."""

_LABELS: Final = ("targets", "labels", "_labels", "y")
_FILES: Final = ("_image_files", "_images", "imgs", "samples", "_samples")


class TorchvisionSource(VisionSource):
    """A data set of torchvision.

    Args:
        name: What the data are called.
        dataset: The data set, without transforms.
    """

    def __init__(self, name: str, dataset: Any) -> None:
        labels = _labels_of(name, dataset)
        classes = getattr(dataset, "classes", None) or getattr(dataset, "categories", None)
        if classes is None:
            classes = range(max(labels, default=-1) + 1)
        super().__init__(name, [_title(entry) for entry in classes], labels)
        self.dataset = dataset
        self.files = _files_of(dataset)

    def __getitem__(self, index: int) -> Sample:
        name = f"{self.name}[{index}]"
        if self.files is not None:
            name = f"{name} {self.files[index].name}"
        try:
            found = to_rgb(self.dataset[index][0])
        except FileNotFoundError as error:
            raise BadSample(name, "the file does not exist") from error
        except DECODING_ERRORS as error:
            raise BadSample(name, reason(error)) from error
        return Sample(found.image, self.labels[index], name, notes=found.notes)

    def _identity(self) -> Iterable[bytes | memoryview]:
        yield from super()._identity()
        yield f"decoding {VERSION} {type(self.dataset).__name__}".encode()
        data = getattr(self.dataset, "data", None)
        if self.files is not None:
            for file in self.files:
                yield repr((file.name, file_state(file))).encode()
        elif hasattr(data, "__array__"):
            yield np.ascontiguousarray(np.asarray(data)).data.cast("B")
        else:
            yield repr(self.dataset).encode()
            yield from _files_below(getattr(self.dataset, "_base_folder", None) or self.dataset.root)

    def absent(self, indices: Iterable[int]) -> list[str]:
        """See `VisionSource.absent`."""
        if self.files is None:
            return []
        return [str(self.files[index]) for index in indices if file_state(self.files[index]) is None]

    def file(self, index: int) -> Path | None:
        """See `VisionSource.file`."""
        return None if self.files is None else self.files[index]


def open_torchvision(
    root: Path, name: str, split: str, *, download: bool = False, **options: Any
) -> VisionSource:
    """Opens a data set of torchvision.

    Args:
        root: The folder that torchvision calls `root`.
        name: The class in `torchvision.datasets`, such as "CIFAR100", or a class and its variant, such as
            "EMNIST-letters".
        split: "train", "val", "trainval" or "test", as far as the data set has them.
        download: Whether torchvision may download what is not there.
        **options: Further arguments of the class, such as `partition` of DTD.

    Raises:
        ValueError: If there is no such data set, split or option, or the files are not there.
    """
    import torchvision

    kind = getattr(torchvision.datasets, name.partition("-")[0], None)
    if not inspect.isclass(kind) or ("-" in name and name not in DATASETS):
        raise ValueError(f"name: torchvision has {', '.join(DATASETS)}; got {name!r}.")
    takes = inspect.signature(kind.__init__).parameters
    splits = DATASETS.get(name) or _guessed(takes, split)
    if splits is None:
        raise ValueError(f"name: it is not known how torchvision's {name} spells its splits.")
    if split not in splits:
        hint = "" if "val" in splits else "; let a share of the training split be held out for validation"
        raise ValueError(f"split: {name} has {', '.join(splits)}; got {split!r}{hint}.")
    arguments = {**splits[split], **options}
    arguments |= {"root": root} if "root" in takes else {}
    # subclasses of MNIST and ImageFolder pass it on as one of **kwargs
    if "download" in takes or (name != "ImageNet" and any(p.kind is p.VAR_KEYWORD for p in takes.values())):
        arguments["download"] = download
    elif download:
        raise ValueError(f"download: torchvision cannot download {name}; put its files into {root}.")
    try:
        dataset = kind(**arguments)
    except TypeError as error:
        raise ValueError(f"{name} of torchvision: {error}.") from error
    except ImportError as error:
        raise ImportError(
            f"{name} of torchvision needs a library: {error}; pip install {error.name}"
        ) from error
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"{name}, split {split!r}, is not complete in {root}: {error} Put the files where torchvision "
            "expects them, or let it download them with download: true."
        ) from error
    return TorchvisionSource(f"{name}/{split}", dataset)


def _guessed(takes: Mapping[str, Any], split: str) -> Splits | None:
    """Returns how a class that has no row most likely makes splits, from what it takes."""
    if "split" in takes:
        return {split: {"split": split}}
    return _FLAG if "train" in takes else None


def _labels_of(name: str, dataset: Any) -> list[int]:
    """Returns the label of every picture, without opening them where torchvision keeps labels at all."""
    for attribute in _LABELS:
        labels = getattr(dataset, attribute, None)
        if labels is not None and len(labels) == len(dataset):
            return [int(-1 if label is None else label) for label in labels]
    for attribute in ("samples", "_samples"):
        pairs = getattr(dataset, attribute, None)
        if pairs is not None:
            return [int(pair[1]) for pair in pairs]
    log.info("%s: torchvision keeps no list of labels; all %d pictures are opened once", name, len(dataset))
    return [int(dataset[index][1]) for index in range(len(dataset))]


def _files_of(dataset: Any) -> list[Path] | None:
    """Returns the file of every picture, where each has one that torchvision lists."""
    for attribute in _FILES:
        listed = getattr(dataset, attribute, None)
        if listed is None or len(listed) != len(dataset):
            continue
        paths = [entry[0] if isinstance(entry, tuple) else entry for entry in listed]
        if all(isinstance(path, str | Path) for path in paths):
            return [Path(path) for path in paths]
    return None


def _files_below(folder: str | Path | None) -> Iterator[bytes]:
    """Yields name, size and time of change of all files below a folder."""
    if folder is None:
        return
    for file in sorted(Path(folder).rglob("*")):
        if file.is_file():
            yield repr((file.relative_to(folder).as_posix(), file_state(file))).encode()


def _title(entry: Any) -> str:
    """Returns a class's name: ImageNet has several for each."""
    return ", ".join(entry) if isinstance(entry, tuple | list) else str(entry)
