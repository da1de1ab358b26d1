"""Any folder of class folders, with or without folders of splits above them."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from toast.data.splits import find_split, is_split, split_of
from toast.data.vision.boxes import read_boxes
from toast.data.vision.picture_files import FileSource, Picture, readable
from toast.data.vision.source import Box, VisionSource
from toast.data.walking import files_in, folders_in, walk
from toast.files.plain_text import half_pair

_BOXES: Final = ("boxes.json", "boxes.csv")
_SHOWN: Final = 5


def open_folder(root: Path, name: str | None, split: str) -> VisionSource:
    """Opens `root/split/class/picture`, or `root/class/picture` as the split "train".

    The folder of a split is found by any common spelling of its name (`toast.data.splits`). The classes are
    those of the training folder, so that a class which another split lacks shifts no label. What is hidden is
    left out. Boxes are read from `boxes.json` or `boxes.csv` beside the class folders or in `root`; their
    names are paths under the folder that the file lies in.

    Args:
        root: The folder.
        name: What to call the data; None is the folder's name.
        split: "train", "val", "test", or the name of a folder.

    Raises:
        ValueError: If the folder, the split, classes or pictures are not there, it cannot be told what is a
            split and what a class, or a file of boxes is malformed.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if not root.is_dir():
        raise ValueError(f"the folder {root} does not exist; it must contain a folder for each class.")
    top = _split_folder(root, split)
    train = _training_folder(root, top, split)
    classes = _classes(train)
    own = _classes(top)
    unknown = sorted(set(own) - set(classes))
    if unknown:
        raise ValueError(
            f"{top} has class folders that {train} lacks: {_few(unknown)}; it has {_few(classes)}."
        )
    if not classes:
        raise ValueError(f"{top} holds no folder; a folder for each class is needed.")
    found: list[tuple[Path, int]] = []
    skipped: list[Path] = []
    for label, title in enumerate(classes):
        for folder in own.get(title, ()):
            walked = walk(top / folder, IMG_EXTENSIONS)
            found += [(path, label) for path in walked.files]
            skipped += walked.skipped
    left_out = _left_out(skipped)
    if not found:
        raise ValueError(
            f"the class folders in {top} hold no picture ({', '.join(IMG_EXTENSIONS)})."
            + "".join(f" {text}" for text in left_out)
        )
    boxes = boxes_beside(root, top)
    pictures = [
        Picture(path, label, readable(path.relative_to(root)), box=boxes.get(box_key(path)))
        for path, label in found
    ]
    if boxes and all(picture.box is None for picture in pictures) and not _of_others(boxes, root, top):
        raise ValueError(
            f"none of the {len(boxes)} boxes beside the pictures of {top} belongs to one of them, first "
            f"{next(iter(boxes))}; names are paths under the folder that the file of boxes lies in."
        )
    stray = [file for file in files_in(top) if Path(file).suffix.lower() in IMG_EXTENSIONS]
    lost = sorted(
        {box for box in boxes if box.is_relative_to(box_key(top))} - {box_key(path) for path, _ in found}
    )
    remarks = [
        *left_out,
        *_beside(root, top),
        *([f"{len(stray)} pictures beside the class folders are ignored: {_few(stray)}."] if stray else []),
        *([f"{len(lost)} of {len(boxes)} boxes belong to no picture: {_few(lost)}."] if lost else []),
    ]
    return FileSource(f"{name or root.resolve().name}/{split}", list(classes), pictures, remarks)


def _split_folder(root: Path, split: str) -> Path:
    """Finds the folder of a split; `root` itself is the split "train" if its folders are classes."""
    named = _named(root, split)
    if named is not None:
        return named
    folders = folders_in(root)
    deep = [folder for folder in folders if folders_in(root / folder)]
    splits = [folder for folder in deep if split_of(folder)]
    flat = [folder for folder in find_split(split, folders) if folder not in deep]
    if split != "train" and flat:
        raise ValueError(
            f"split {split!r}: {root / flat[0]} holds no class folders, so its pictures have no labels."
        )
    if splits:
        raise ValueError(f"split {split!r}: {root} has the splits {', '.join(splits)}.")
    if split_of(split) != "train":
        raise ValueError(
            f"split {split!r}: {root} has no folder {split} with class folders. A folder without splits is "
            "all training data; let a share of it be held out for validation, and name no split for testing "
            "(data.test: null), or make that folder."
        )
    called = [folder for folder in folders if split_of(folder)]
    if len(called) > 1 and (len(called) == len(folders) or sum(map(is_split, called)) > 1):
        raise ValueError(
            f"{root}: the folders {', '.join(called)} are named like splits, but contain no class folders; "
            f"needs {called[0]}/CLASS/PICTURE."
        )
    if folders and len(deep) == len(folders) and not any(map(_has_pictures, (root / f for f in folders))):
        inner = folders_in(root / folders[0])
        advice = (
            f"If {_few(inner)} are the classes, set data.root={root / folders[0]}."
            if len(folders) == 1
            else f"If one of them is a split, name it: data.train={folders[0]}. If they are classes, set "
            f"data.root={root.resolve().parent} and data.train={root.resolve().name}."
        )
        raise ValueError(
            f"{root}: its folders ({_few(folders)}) hold folders only (such as {_few(inner)}), so it cannot "
            f"be told whether they are classes or splits. {advice}"
        )
    return root


def _named(root: Path, split: str) -> Path | None:
    """Returns the folder of a split by its name; None if there is none with folders in it."""
    # a class may be called "train": a split holds folders, a class holds pictures
    found = find_split(split, [folder for folder in folders_in(root) if folders_in(root / folder)])
    if len(found) > 1:
        raise ValueError(
            f"split {split!r}: {root} has several folders that match: {', '.join(found)}. Name one of them."
        )
    if not found:
        return None
    top = root / found[0]
    # archives often hold seg_train/seg_train
    while (inner := folders_in(top)) and len(inner) == 1 and split_of(inner[0]) == (split_of(split) or ""):
        if not folders_in(top / inner[0]):
            break
        top /= inner[0]
    return top


def _training_folder(root: Path, top: Path, split: str) -> Path:
    """Returns the folder whose classes count: the split's own if none or several are for training."""
    if split_of(split) == "train":
        return top
    try:
        return _named(root, "train") or top
    except ValueError:
        return top


def _classes(top: Path) -> dict[str, list[str]]:
    """Returns the names of the classes, sorted, with their folders.

    A name may be spelled in two ways that look alike: macOS takes accents apart, Linux and Windows do not.
    """
    classes: dict[str, list[str]] = {}
    for folder in folders_in(top):
        if half_pair(folder):
            raise ValueError(
                f"{top}: the name of the folder {readable(folder)} is not UTF-8; a class needs a name that "
                "can be written. Rename it (convmv -f latin1 -t utf8 --notest, if it is of Western Europe)."
            )
        classes.setdefault(unicodedata.normalize("NFC", folder), []).append(folder)
    return dict(sorted(classes.items()))


def _has_pictures(folder: Path) -> bool:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return any(Path(file).suffix.lower() in IMG_EXTENSIONS for file in files_in(folder))


def _left_out(skipped: Iterable[Path]) -> list[str]:
    """Says which files are no pictures by their suffix."""
    counts = Counter(path.suffix.lower() or "no suffix" for path in skipped)
    if not counts:
        return []
    kinds = ", ".join(f"{suffix} {count:,}" for suffix, count in counts.most_common())
    return [
        f"{sum(counts.values()):,} files are ignored because of their suffix: "
        f"{kinds}. Convert them if they are pictures (a .jfif is a .jpg by another name)."
    ]


def _beside(root: Path, top: Path) -> list[str]:
    """Says what is unusual about the folders."""
    remarks = []
    folders = folders_in(top)
    called = [folder for folder in folders if split_of(folder)]
    if called:
        remarks.append(f"folders that are named like a split are read as classes: {_few(called)}.")
    others = [folder for folder in folders_in(root) if not split_of(folder)] if top != root else []
    if others and not top.is_relative_to(root / others[0]):
        remarks.append(f"folders beside the splits are not read: {_few(others)}.")
    deep = [folder for folder in folders if folders_in(top / folder)]
    if deep:
        remarks.append(f"{len(deep)} classes hold folders, whose pictures count as theirs: {_few(deep)}.")
    return remarks


def boxes_beside(root: Path, top: Path) -> dict[Path, Box]:
    """Returns the boxes by picture file; a list beside the class folders comes before one above them."""
    boxes: dict[Path, Box] = {}
    for folder in dict.fromkeys((root, top)):
        for file in _BOXES:
            if (folder / file).is_file():
                boxes |= {box_key(folder / name): b for name, b in read_boxes(folder / file).items()}
    return boxes


def _of_others(boxes: Iterable[Path], root: Path, top: Path) -> bool:
    """Whether there are boxes of other splits, so that a split may have none."""
    if top == root:
        return False
    own = top.relative_to(root).parts[0]
    others = [box_key(root / folder) for folder in folders_in(root) if folder != own]
    return any(box.is_relative_to(other) for box in boxes for other in others)


def box_key(path: Path) -> Path:
    """Returns a path as boxes are found by it, however its accents are written."""
    return Path(unicodedata.normalize("NFC", str(path)))


def _few(names: Iterable[object]) -> str:
    shown = [str(name) for name in names]
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more
