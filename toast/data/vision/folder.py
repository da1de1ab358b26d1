"""Any folder of class folders, with or without folders of splits above them."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from toast.data.vision.boxes import read_boxes
from toast.data.vision.files import FileSource, Picture
from toast.data.vision.source import Box, VisionSource

SPELLINGS: Final[dict[str, tuple[str, ...]]] = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "dev"),
    "test": ("test", "testing"),
}
"""How splits are spelled in the wild, best first; any other name stands for itself."""
_BOXES: Final = ("boxes.json", "boxes.csv")


def open_folder(root: Path, name: str | None, split: str) -> VisionSource:
    """Opens `root/split/class/picture`, or `root/class/picture` as the split "train".

    The classes are those of the training folder, so that a class which another split lacks shifts no label.
    Boxes are read from `boxes.json` or `boxes.csv` beside the class folders or in `root`; their names are
    paths under the folder that the file lies in.

    Args:
        root: The folder.
        name: What to call the data; None is the folder's name.
        split: "train", "val", "test", or the name of a folder.

    Raises:
        ValueError: If the folder, the split, classes or pictures are not there, or a file of boxes is
            malformed.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    if not root.is_dir():
        raise ValueError(f"the folder {root} is not there; it must hold a folder for each class.")
    top = _split_folder(root, split)
    train = next((root / name for name in SPELLINGS["train"] if _subfolders(root / name)), top)
    classes = _subfolders(train)
    unknown = sorted(set(_subfolders(top)) - set(classes))
    if unknown:
        raise ValueError(f"{top} has class folders that {train} lacks: {', '.join(unknown[:5])}.")
    if not classes:
        raise ValueError(f"{top} holds no folder; a folder for each class is needed.")
    ids = {name: index for index, name in enumerate(classes)}
    found = make_dataset(str(top), ids, extensions=IMG_EXTENSIONS, allow_empty=True)
    if not found:
        raise ValueError(f"the class folders in {top} hold no picture ({', '.join(IMG_EXTENSIONS)}).")
    boxes = _boxes(root, top)
    pictures = [
        Picture(path, label, path.relative_to(root).as_posix(), box=boxes.get(path))
        for path, label in ((Path(path), label) for path, label in found)
    ]
    if boxes and all(picture.box is None for picture in pictures):
        raise ValueError(
            f"none of the {len(boxes)} boxes beside the pictures of {top} belongs to one of them, first "
            f"{next(iter(boxes))}; names are paths under the folder that the file of boxes lies in."
        )
    return FileSource(f"{name or root.resolve().name}/{split}", classes, pictures)


def _subfolders(folder: Path) -> list[str]:
    """Returns the visible folders within a folder, sorted; none if it is not there."""
    if not folder.is_dir():
        return []
    return sorted(
        entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )


def _split_folder(root: Path, split: str) -> Path:
    """Finds the folder of a split."""
    for spelling in SPELLINGS.get(split, (split,)):
        # a class may be called "train": a split holds folders, a class holds pictures
        if _subfolders(root / spelling):
            return root / spelling
    known = {spelling for spellings in SPELLINGS.values() for spelling in spellings}
    splits = [folder for folder in _subfolders(root) if folder in known and _subfolders(root / folder)]
    if splits:
        raise ValueError(f"split {split!r}: {root} has the splits {', '.join(splits)}.")
    if split != "train":
        raise ValueError(
            f"split {split!r}: {root} has no folder {split} with class folders. A folder without splits is "
            "all training data; let a share of it be held out for validation."
        )
    return root


def _boxes(root: Path, top: Path) -> dict[Path, Box]:
    """Returns the boxes by picture file; a list beside the class folders comes before one above them."""
    boxes: dict[Path, Box] = {}
    for folder in dict.fromkeys((root, top)):
        for file in _BOXES:
            if (folder / file).is_file():
                boxes |= {folder / name: box for name, box in read_boxes(folder / file).items()}
    return boxes
