"""Holds out some training pictures for validation."""

from __future__ import annotations

from collections import Counter

import numpy as np

from toast.data.vision.source import VisionSource


def split_validation(source: VisionSource, amount: float, seed: int = 0) -> tuple[VisionSource, VisionSource]:
    """Splits a source in two, every class in the same proportion up to one picture.

    Args:
        source: What to split.
        amount: What to hold out: below 1 a share of the pictures, from 1 on their number.
        seed: Seed of the choice. The same source, amount and seed give the same split.

    Returns:
        What stays for training, and what is held out, both in the source's order.

    Raises:
        ValueError: If the amount leaves nothing on one of the sides.
    """
    total = len(source)
    if not (0 < amount < 1) and amount != int(amount):
        raise ValueError(f"amount: a share between 0 and 1 or a whole number is needed; got {amount}.")
    count = round(amount * total) if amount < 1 else int(amount)
    if not 0 < count < total:
        raise ValueError(
            f"amount: of the {total} pictures of {source.name}, 1 to {total - 1} can be held out; {amount} "
            f"would hold out {count}."
        )
    draw = np.random.default_rng(seed)
    labels = np.asarray(source.labels)
    sizes = Counter(source.labels)
    taken = {label: size * count // total for label, size in sizes.items()}
    # the largest remainders get one more; a class is emptied only if nothing else is left to take
    order = sorted(
        sizes, key=lambda c: (taken[c] + 1 >= sizes[c], -(sizes[c] * count % total), draw.random(), c)
    )
    for label in order[: count - sum(taken.values())]:
        taken[label] += 1
    held_out = np.concatenate(
        [draw.permutation(np.flatnonzero(labels == label))[: taken[label]] for label in sorted(sizes)]
    )
    rest = np.setdiff1d(np.arange(total), held_out)
    return source.subset(rest.tolist()), source.subset(np.sort(held_out).tolist())
