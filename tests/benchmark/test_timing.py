"""Ratios have an interval, a floor and counted FLOPs, and say what they are worth."""

from __future__ import annotations

import time

import pytest
import torch
from torch.nn import functional as F

from toast.benchmark.timing import PATIENCE, Contender, Ratio, counted_flops, in_turns, interval


def test_turns_alternate_until_the_ratio_is_known() -> None:
    order: list[str] = []

    def runs(name: str) -> Contender:
        def run() -> None:
            order.append(name)
            time.sleep(0.02 if name == "a" else 0.04)

        return Contender(run)

    ratio = in_turns({"a": runs("a"), "b": runs("b")}, "a", rounds=2)["b"]
    assert order[:4] == ["a", "b", "a", "b"]  # the FLOPs, the warm-up
    assert order[4:8] == ["b", "a", "a", "b"]
    assert 2 <= ratio.rounds <= 2 * PATIENCE
    assert ratio.is_settled or ratio.rounds == 2 * PATIENCE
    assert ratio.flops is None


def test_what_is_only_a_part_of_floors_is_not_shown() -> None:
    def quick() -> None:
        time.sleep(0.005)

    def slow() -> None:
        time.sleep(0.02)

    found = in_turns(
        {
            "reference": Contender(slow),
            "part": Contender(slow, shown=False),
            "impossible": Contender(quick, floor=("reference", "part")),
        },
        "reference",
        rounds=3,
    )
    assert list(found) == ["impossible"]
    assert found["impossible"].floor == pytest.approx(2, rel=0.3)
    assert found["impossible"].is_below_floor
    assert "BELOW ITS FLOOR" in str(found["impossible"])
    assert found["impossible"].as_dict()["below_floor"]


def test_the_floor_of_a_speed_is_a_ceiling() -> None:
    assert Ratio(0.6, 0.55, 0.65, 5, floor=0.5, higher_is_better=True).is_below_floor
    assert not Ratio(0.48, 0.45, 0.55, 5, floor=0.5, higher_is_better=True).is_below_floor
    assert not Ratio(1.48, 1.40, 1.55, 5, floor=1.44).is_below_floor
    assert Ratio(1.38, 1.30, 1.42, 5, floor=1.44).is_below_floor


def test_interval_is_that_of_the_median() -> None:
    assert interval([1.5]) == (1.5, 1.5)
    low, high = interval([1.0, 1.1, 1.2, 1.3, 9.0])
    assert 1.0 <= low < 1.2 < high <= 9.0
    torch.manual_seed(0)
    covered = 0
    for _ in range(100):  # of 30 draws of a standard normal distribution, whose median is 0
        low, high = interval(torch.randn(30).tolist())
        covered += low <= 0 <= high
    assert covered > 85


def test_one_round_settles_nothing() -> None:
    assert not Ratio.of([1.2]).is_settled
    assert "not within 3%" in str(Ratio.of([1.2], cpu=1.2))
    assert "not within" not in str(Ratio.of([0.17]))  # a size, not a time


@pytest.mark.parametrize("training", [False, True])
def test_flops_are_those_of_the_products(training: bool) -> None:
    query, weight = torch.randn(2, 4, 16, 8), torch.randn(8, 8, requires_grad=training)

    def run() -> None:
        out = F.scaled_dot_product_attention(query @ weight, query, query)
        if training:
            out.sum().backward()

    product, attention = 2 * (2 * 4 * 16) * 8 * 8, 2 * 2 * (2 * 4) * 16 * 16 * 8
    # Backward: of the values' product, of the scores' to the queries, and of the weight.
    backward = product + attention if training else 0
    assert counted_flops(run) == product + attention + backward
