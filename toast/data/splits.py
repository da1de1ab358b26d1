"""How splits are spelled in the wild, and which split a name of a folder or a file says."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Final

SPELLINGS: Final[dict[str, tuple[str, ...]]] = {
    "train": ("train", "training", "trn"),
    "val": ("val", "validation", "valid", "validate", "dev", "devel", "development", "eval", "evaluation"),
    "test": ("test", "testing", "tests", "tst"),
    "trainval": ("trainval", "traindev"),
}
"""The words for each split, best first; a name says a split if one of its words is one of these."""
_OF: Final = {word: split for split, words in SPELLINGS.items() for word in words}
#: What is written behind such a word without a gap: trainset, testdata, valimages.
_BEHIND: Final = ("sets?", "data", "splits?", "images", "imgs", "files", "samples")
_WORD: Final = re.compile(
    rf"(?P<split>{'|'.join(sorted(_OF, key=len, reverse=True))})(?:{'|'.join(_BEHIND)})?", re.IGNORECASE
)


def split_of(name: str) -> str | None:
    """Returns the split that a name says: a key of `SPELLINGS`, or several with "+" between them.

    "Training", "seg_train", "test-00000-of-00002", "valSet" and "train2017" say one; "contest", "latest" and
    "trainers" say none; "train_test" says two.

    Args:
        name: Name of a folder, or of a file without its suffix, however its case.

    Returns:
        The split; None if the name says none.
    """
    found = {_OF[word] for word in words_of(name)}
    if found in ({"train", "val"}, {"train", "val", "trainval"}):
        return "trainval"
    return "+".join(sorted(found)) or None


def words_of(name: str) -> set[str]:
    """Returns the words of a name that say a split, in small letters."""
    text = unicodedata.normalize("NFC", name)
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)  # valSet
    words = map(_WORD.fullmatch, re.findall(r"[^\W\d_]+", f"{parted} {text}"))
    return {match["split"].lower() for match in words if match}


def is_split(name: str) -> bool:
    """Whether a name says a split and nothing else: "Testing" or "trainset", but not "test tube"."""
    return _WORD.fullmatch(name) is not None


def find_split(wanted: str, names: Iterable[str]) -> list[str]:
    """Returns the names that may be a split, of the best kind that there is: one, several, or none.

    A name that is the wanted one comes before one that differs in its case, that before another spelling of
    the split alone ("Testing"), and that before a name with other words ("seg_test").

    Args:
        wanted: The split, as a user calls it.
        names: Names of folders, files or splits.
    """
    names = list(names)
    split = split_of(wanted)
    kinds = (
        [name for name in names if name == wanted],
        [name for name in names if name.casefold() == wanted.casefold()],
        [name for name in names if split is not None and _OF.get(name.lower()) == split],
        [name for name in names if split is not None and split_of(name) == split],
    )
    return next((kind for kind in kinds if kind), [])
