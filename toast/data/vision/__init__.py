"""Labelled pictures: any data set behind one interface, prepared so that a run can be repeated exactly.

The way of the data: `open_vision` → `check` → `split_validation` → `VisionDataset` (with `transforms`) →
`collate`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Public name -> module that defines it. Imported when used: settings can be read without PyTorch.
_EXPORTS = {
    "Augmentation": "augmentation",
    "BadSample": "source",
    "CORRUPTIONS": "corrupting",
    "Corrupted": "corrupting",
    "PRESETS": "augmentation",
    "SOURCES": "named_sources",
    "Sample": "source",
    "Transform": "transforming",
    "VisionDataset": "dataset",
    "VisionSource": "source",
    "check": "checking",
    "collate": "dataset",
    "open_vision": "named_sources",
    "repeated": "repeating",
    "split_validation": "splitting",
    "transforms": "transforming",
}

__all__ = sorted(_EXPORTS)

if TYPE_CHECKING:
    from toast.data.vision.augmentation import PRESETS as PRESETS
    from toast.data.vision.augmentation import Augmentation as Augmentation
    from toast.data.vision.checking import check as check
    from toast.data.vision.corrupting import CORRUPTIONS as CORRUPTIONS
    from toast.data.vision.corrupting import Corrupted as Corrupted
    from toast.data.vision.dataset import VisionDataset as VisionDataset
    from toast.data.vision.dataset import collate as collate
    from toast.data.vision.named_sources import SOURCES as SOURCES
    from toast.data.vision.named_sources import open_vision as open_vision
    from toast.data.vision.repeating import repeated as repeated
    from toast.data.vision.source import BadSample as BadSample
    from toast.data.vision.source import Sample as Sample
    from toast.data.vision.source import VisionSource as VisionSource
    from toast.data.vision.splitting import split_validation as split_validation
    from toast.data.vision.transforming import Transform as Transform
    from toast.data.vision.transforming import transforms as transforms


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    """Lists the public names."""
    return __all__
