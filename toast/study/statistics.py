"""How sure a difference is, and whether attention on target explains accuracy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """A mean difference with its 95% interval."""

    mean: float
    low: float
    high: float


def paired_bootstrap(
    first: Array, second: Array, samples: int = 4_000, seed: int = 0, level: float = 0.95
) -> Difference:
    """Returns how much greater the first is, by resampling pictures and seeds.

    Both were measured on the same pictures with as many seeds, so pictures are drawn for both together, and
    so are seeds: the two factors of a crossed design are resampled independently (the pigeonhole bootstrap,
    Owen 2007, doi:10.1214/07-AOAS122, on the safe side for means). Of one seed the interval is that of the
    pictures alone.

    Args:
        first: A value of each seed and picture, `(seeds, pictures)`.
        second: The same of what it is compared with.
        samples: Number of resamples.
        seed: Of the resampling.
        level: Coverage of the interval, by percentiles.

    Raises:
        ValueError: If the shapes differ.
    """
    if first.ndim != 2 or first.shape != second.shape:
        raise ValueError(
            f"first, second: need one shape (seeds, pictures); got {first.shape} and {second.shape}."
        )
    draw = np.random.default_rng(seed)
    difference = first - second
    seeds, pictures = difference.shape
    of_seeds = draw.multinomial(seeds, [1 / seeds] * seeds, samples) / seeds
    means = np.empty(samples)
    for start in range(0, samples, 500):  # a matrix of all counts would be large
        weights = of_seeds[start : start + 500]
        counts = draw.multinomial(pictures, [1 / pictures] * pictures, len(weights))
        means[start : start + 500] = ((weights @ difference) * counts).sum(1) / pictures
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Difference(float(difference.mean()), float(low), float(high))


def correlation(x: Array, y: Array) -> float:
    """Returns Pearson's correlation; not a number where one of the two does not vary.

    With a binary y it is the point-biserial one.
    """
    if len(x) < 2 or not np.ptp(x) or not np.ptp(y):
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def rank_correlation(x: Array, y: Array) -> float:
    """Returns Spearman's correlation: Pearson's of the ranks, equal values sharing their mean rank."""
    return correlation(_ranks(x), _ranks(y))


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    mean: Array = ends - (counts - 1) / 2
    return mean[inverse]


def by_quintile(x: Array, y: Array, parts: int = 5) -> list[float]:
    """Returns the mean of y in equal parts of the samples by rising x; ties stay in the samples' order."""
    order = np.argsort(x, kind="stable")
    return [float(y[part].mean()) if len(part) else float("nan") for part in np.array_split(order, parts)]
