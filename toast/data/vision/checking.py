"""What can be known to be wrong with a data set before training starts."""

from __future__ import annotations

from toast.data.vision.source import VisionSource

_SHOWN = 5


def check(source: VisionSource, by_class: bool = True) -> tuple[str, ...]:
    """Looks at a source without opening a picture.

    Malformed lists are found by `open_vision`, damaged pictures in training.

    Args:
        source: The data.
        by_class: Whether the source's own classes are the targets; else heads read its fields.

    Returns:
        Remarks: what is unusual, but does not stop a run.

    Raises:
        ValueError: If there is no picture, a label is not one of the classes, all pictures are of one class,
            or the files of some are not there.
    """
    if len(source) == 0:
        raise ValueError(f"{source.name} has no picture.")
    if not by_class:
        _refuse_absent(source)
        return tuple(source.remarks)
    wrong = [i for i, label in enumerate(source.labels) if not 0 <= label < len(source.classes)]
    if wrong:
        raise ValueError(
            f"{source.name}: labels must be 0 to {len(source.classes) - 1}; {len(wrong)} of {len(source)} "
            f"are not, first {source.labels[wrong[0]]} of picture {wrong[0]}. Is this split published "
            "without labels?"
        )
    seen = set(source.labels)
    if len(seen) < 2:
        only = source.classes[source.labels[0]]
        raise ValueError(
            f"{source.name}: at least two classes are needed; all {len(source)} pictures are of {only!r}."
        )
    _refuse_absent(source)
    remarks = list(source.remarks)
    empty = [name for label, name in enumerate(source.classes) if label not in seen]
    if empty:
        remarks.append(
            f"{len(empty)} of {len(source.classes)} classes have no picture here, first "
            f"{', '.join(empty[:_SHOWN])}."
        )
    return tuple(remarks)


def _refuse_absent(source: VisionSource) -> None:
    absent = source.absent(range(len(source)))
    if absent:
        shown = "\n".join(f"  {line}" for line in absent[:_SHOWN])
        more = f"\n  and {len(absent) - _SHOWN} more" if len(absent) > _SHOWN else ""
        raise ValueError(
            f"{source.name}: {len(absent)} of {len(source)} picture files do not exist:\n{shown}{more}\n"
            "Check the root, that everything was unpacked, and the permissions."
        )
