"""VTAB-1k (arXiv 1910.04867) from text lists, the layout that NOAH, FacT and RepAdapter share."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from toast.data.vision.lists import read_rows
from toast.data.vision.picture_files import FileSource, Picture
from toast.data.vision.source import VisionSource

CLASSES: Final = {
    "caltech101": 102,
    "cifar": 100,
    "dtd": 47,
    "oxford_flowers102": 102,
    "oxford_iiit_pet": 37,
    "sun397": 397,
    "svhn": 10,
    "diabetic_retinopathy": 5,
    "eurosat": 10,
    "patch_camelyon": 2,
    "resisc45": 45,
    "clevr_count": 8,
    "clevr_dist": 6,
    "dmlab": 6,
    "dsprites_loc": 16,
    "dsprites_ori": 16,
    "kitti": 4,
    "smallnorb_azi": 18,
    "smallnorb_ele": 9,
}
"""Number of classes by folder: seven natural, four specialised and eight structured tasks."""
LISTS: Final = {
    "train": ("train800.txt", 800),
    "val": ("val200.txt", 200),
    "trainval": ("train800val200.txt", 1000),
    "test": ("test.txt", None),
}
"""File and number of pictures by split."""


def open_vtab(root: Path, name: str, split: str) -> VisionSource:
    """Opens one task from `root/name/*.txt`, lines `path label`, paths under `root/name`.

    Args:
        root: Folder of the nineteen tasks.
        name: The task's folder, a key of `CLASSES`.
        split: "train" (800 pictures), "val" (200), "trainval" (both) or "test".

    Raises:
        ValueError: If the list is not there, is empty, or has a malformed row.
    """
    if name not in CLASSES:
        raise ValueError(f"name: the tasks of VTAB-1k are {', '.join(CLASSES)}; got {name!r}.")
    if split not in LISTS:
        raise ValueError(f"split: vtab has {', '.join(LISTS)}; got {split!r}.")
    folder, (file, count) = root / name, LISTS[split]
    entries = read_rows(folder / file, CLASSES[name])
    pictures = [Picture(folder / entry.path, int(entry.label), entry.path, entry.where) for entry in entries]
    remarks = []
    if count is not None and len(entries) != count:
        remarks.append(f"{file} lists {len(entries)} pictures; VTAB-1k has {count} there.")
    classes = [str(label) for label in range(CLASSES[name])]
    return FileSource(f"vtab-{name}/{split}", classes, pictures, remarks)
