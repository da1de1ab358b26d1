"""Labelled pictures: any data set behind one interface, prepared so that a run can be repeated exactly.

The way of the data: `open_vision` → `check` → `split_validation` → `VisionDataset` (with `transforms`) →
`collate`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toast.lazy import lazily

# Public name -> module that defines it. Imported when used: settings can be read without PyTorch.
_EXPORTS = {
    "Augmentation": "toast.data.vision.augmentation",
    "BadSample": "toast.data.vision.source",
    "CORRUPTIONS": "toast.data.vision.corrupting",
    "Corrupted": "toast.data.vision.corrupting",
    "PRESETS": "toast.data.vision.augmentation",
    "SOURCES": "toast.data.vision.named_sources",
    "Sample": "toast.data.vision.source",
    "Transform": "toast.data.vision.transforming",
    "VisionDataset": "toast.data.vision.dataset",
    "VisionSource": "toast.data.vision.source",
    "check": "toast.data.vision.checking",
    "collate": "toast.data.vision.dataset",
    "open_vision": "toast.data.vision.named_sources",
    "repeated": "toast.data.vision.repeating",
    "split_validation": "toast.data.vision.splitting",
    "transforms": "toast.data.vision.transforming",
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


__getattr__, __dir__ = lazily(__name__, _EXPORTS)
