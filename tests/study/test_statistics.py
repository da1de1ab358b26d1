"""Intervals against what is known in closed form, and correlations against known cases."""

from __future__ import annotations

import numpy as np
import pytest

from toast.study.statistics import by_quintile, correlation, paired_bootstrap, rank_correlation


def test_of_one_seed_the_interval_is_that_of_a_mean() -> None:
    draw = np.random.default_rng(0)
    second = (draw.random((1, 800)) < 0.5).astype(float)
    first = np.where(draw.random((1, 800)) < 0.2, 1.0, second)
    found = paired_bootstrap(first, second)
    difference = (first - second)[0]
    error = difference.std() / len(difference) ** 0.5
    assert found.mean == pytest.approx(difference.mean())
    assert found.low == pytest.approx(difference.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(difference.mean() + 1.96 * error, abs=0.15 * error)
    # pairing matters: of two independent samples the interval would be that much wider
    apart = (first.var() + second.var()) ** 0.5 / len(difference) ** 0.5
    assert found.high - found.low < 0.7 * 2 * 1.96 * apart


def test_seeds_are_resampled_too() -> None:
    """Of differences that depend on the seed alone the error is that of a mean over seeds."""
    of_seed = np.random.default_rng(1).normal(0.1, 0.05, (40, 1))
    found = paired_bootstrap(np.repeat(of_seed, 30, 1), np.zeros((40, 30)))
    error = of_seed.std() / 40**0.5
    assert found.mean == pytest.approx(of_seed.mean())
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.1)


def test_both_sources_add_up() -> None:
    draw = np.random.default_rng(2)
    of_seed, of_picture = draw.normal(0, 0.3, (30, 1)), draw.normal(0, 1, (1, 400))
    found = paired_bootstrap(of_seed + of_picture, np.zeros((30, 400)))
    error = (of_seed.var() / 30 + of_picture.var() / 400) ** 0.5
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.1)


def test_equals_differ_by_nothing() -> None:
    same = np.ones((3, 50))
    found = paired_bootstrap(same, same)
    assert (found.mean, found.low, found.high) == (0, 0, 0)
    with pytest.raises(ValueError, match=r"got \(3, 50\) and \(2, 50\)"):
        paired_bootstrap(same, same[:2])


def test_correlations() -> None:
    x = np.array([1.0, 2.0, 3.0, 4.0])
    assert correlation(x, 2 * x + 1) == pytest.approx(1)
    assert rank_correlation(x, np.exp(x)) == pytest.approx(1)
    assert rank_correlation(x, np.array([1.0, 1.0, 2.0, 2.0])) == pytest.approx(2 / 5**0.5)
    assert np.isnan(correlation(x, np.ones(4)))
    # point-biserial: difference of the means over the deviation, times the root of the shares
    y = np.array([0.0, 0.0, 1.0, 1.0])
    assert correlation(x, y) == pytest.approx((3.5 - 1.5) / x.std() * 0.5)


def test_quintiles() -> None:
    x = np.arange(100.0)[::-1]
    assert by_quintile(x, (x >= 80).astype(float)) == [0, 0, 0, 0, 1]
    assert np.isnan(by_quintile(x[:3], x[:3])[4])
