"""The five fine-grained data sets with the published splits of VPT (arXiv 2203.12119, KMnP/vpt)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from toast.data.vision.boxes import read_bird_boxes
from toast.data.vision.lists import Entry, read_mapping
from toast.data.vision.picture_files import FileSource, Picture
from toast.data.vision.source import VisionSource


@dataclass(frozen=True)
class Fgvc:
    """One of the data sets.

    Args:
        title: Its full name.
        folder: What its folder is called in the published splits.
        images: Folder within it that the paths of the split files start from; "" is itself.
        classes: Number of classes.
    """

    title: str
    folder: str
    images: str
    classes: int


DATASETS: Final = {
    "cub": Fgvc("CUB-200-2011", "CUB_200_2011", "images", 200),
    "nabirds": Fgvc("NABirds", "nabirds", "images", 555),
    "flowers": Fgvc("Oxford Flowers", "OxfordFlower", "", 102),
    "dogs": Fgvc("Stanford Dogs", "Stanford-dogs", "Images", 120),
    "cars": Fgvc("Stanford Cars", "Stanford-cars", "", 196),
}
SPLITS: Final = {"train": ("train",), "val": ("val",), "trainval": ("train", "val"), "test": ("test",)}


def open_fgvc(root: Path, name: str, split: str, *, images: str | None = None) -> VisionSource:
    """Opens one of the data sets from `train.json`, `val.json` and `test.json`, each `{path: class id}`.

    The classes are the sorted ids of `train.json`, in every split. CUB and NABirds have boxes if their
    `images.txt` and `bounding_boxes.txt` are there.

    Args:
        root: The data set's folder, or the folder that holds it under its published name.
        name: "cub", "nabirds", "flowers", "dogs" or "cars".
        split: "train", "val", "trainval" or "test".
        images: Folder under the data set's that the paths start from; None is the published one.

    Raises:
        ValueError: If a file is not there or malformed, or a split has a class that `train.json` lacks.
    """
    if name not in DATASETS:
        raise ValueError(f"name: the fgvc data sets are {', '.join(DATASETS)}; got {name!r}.")
    if split not in SPLITS:
        raise ValueError(f"split: fgvc has {', '.join(SPLITS)}; got {split!r}.")
    row = DATASETS[name]
    folder = next((f for f in (root, root / row.folder, root / name) if (f / "train.json").is_file()), None)
    if folder is None:
        raise ValueError(
            f"{row.title}: there is no train.json in {root} nor in its folder {row.folder}. Put the split "
            "files of VPT (the repository KMnP/vpt links to them) into the data set's folder."
        )
    ids = sorted({entry.label for entry in read_mapping(folder / "train.json")})  # type: ignore[type-var]
    labels = {id_: label for label, id_ in enumerate(ids)}
    entries = [entry for file in SPLITS[split] for entry in read_mapping(folder / f"{file}.json")]
    strange = [entry for entry in entries if entry.label not in labels]
    if strange:
        raise ValueError(
            f"{strange[0].where}: {strange[0].label!r}: train.json has no such class id "
            f"({len(strange)} such entries); the files are in {folder}."
        )
    top = folder / (row.images if images is None else images)
    boxes = read_bird_boxes(folder)

    def picture(entry: Entry) -> Picture:
        return Picture(top / entry.path, labels[entry.label], entry.path, entry.where, boxes.get(entry.path))

    remarks = []
    if len(ids) != row.classes:
        remarks.append(f"train.json has {len(ids)} classes; {row.title} has {row.classes}.")
    return FileSource(
        f"fgvc-{name}/{split}", [str(id_) for id_ in ids], [picture(e) for e in entries], remarks
    )
