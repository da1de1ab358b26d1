"""Intervals of a measured proportion."""

from __future__ import annotations

import math

#: Standard errors of a 95% interval.
_Z = 1.959964


def wilson(share: float, samples: int) -> tuple[float, float]:
    """Returns the 95% interval of a proportion, by Wilson's score (JASA 22, 1927).

    Unlike share ± two standard errors it stays within 0 and 1, and does not shrink to a point at them: of 8
    right among 8, the interval is 0.68 to 1.

    Args:
        share: The proportion, 0 to 1.
        samples: Of how many.

    Raises:
        ValueError: If there are no samples, or the share is no proportion.
    """
    if samples < 1 or not 0 <= share <= 1:
        raise ValueError(f"needs a fraction from 0 to 1 and at least 1 sample; got {share} of {samples}.")
    square = _Z**2 / samples
    middle = (share + square / 2) / (1 + square)
    reach = _Z / (1 + square) * math.sqrt(share * (1 - share) / samples + square / (4 * samples))
    # At the ends the bound is exact, but for rounding.
    low = 0.0 if share == 0 else max(0.0, middle - reach)
    return low, 1.0 if share == 1 else min(1.0, middle + reach)
