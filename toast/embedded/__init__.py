"""What the package holds: a small real backbone, and tasks that are composed with known truth."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toast.lazy import lazily

_EXPORTS = {
    "CLASSES": "toast.embedded.task",
    "MEAN": "toast.embedded.backbone",
    "Pictures": "toast.embedded.task",
    "STD": "toast.embedded.backbone",
    "load_backbone": "toast.embedded.backbone",
    "load_generic": "toast.embedded.task",
    "load_task": "toast.embedded.task",
    "load_two_objects": "toast.embedded.two_objects",
    "normalise": "toast.embedded.task",
}

__all__ = sorted(_EXPORTS)

if TYPE_CHECKING:
    from toast.embedded.backbone import MEAN as MEAN
    from toast.embedded.backbone import STD as STD
    from toast.embedded.backbone import load_backbone as load_backbone
    from toast.embedded.task import CLASSES as CLASSES
    from toast.embedded.task import Pictures as Pictures
    from toast.embedded.task import load_generic as load_generic
    from toast.embedded.task import load_task as load_task
    from toast.embedded.task import normalise as normalise
    from toast.embedded.two_objects import load_two_objects as load_two_objects

__getattr__, __dir__ = lazily(__name__, _EXPORTS)
