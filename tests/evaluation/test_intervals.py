"""Intervals of proportions."""

from __future__ import annotations

import pytest

from toast.evaluation.intervals import wilson


@pytest.mark.parametrize(
    ("share", "samples", "low", "high"),
    [
        (0.5, 10, 0.2366, 0.7634),  # R: prop.test(5, 10, correct = FALSE)
        (1.0, 8, 0.6756, 1.0),
        (0.0, 8, 0.0, 0.3244),
        (0.9, 1000, 0.8798, 0.9171),
    ],
)
def test_intervals_are_those_of_the_score_test(share: float, samples: int, low: float, high: float) -> None:
    assert wilson(share, samples) == pytest.approx((low, high), abs=1e-4)
    # Where the observed share is just one standard deviation of the score test away.
    for bound in (low, high):
        if 0 < bound < 1:
            error = (bound * (1 - bound) / samples) ** 0.5
            assert abs(share - bound) == pytest.approx(1.96 * error, abs=2e-4)


@pytest.mark.parametrize(("share", "samples"), [(-0.1, 5), (1.1, 5), (0.5, 0), (float("nan"), 3)])
def test_what_is_no_proportion_is_refused(share: float, samples: int) -> None:
    with pytest.raises(ValueError, match="needs a fraction from 0 to 1 and at least 1 sample"):
        wilson(share, samples)
