"""Optimiser groups and schedules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import toast
from tests.models import vit
from toast.rates import Groups, trained_groups
from toast.training.optimizers import make_optimizer, make_schedule, rated_groups, set_rates
from toast.training.run_config import OptimizerConfig

BARE = nn.Module()


@pytest.fixture
def groups() -> Groups:
    head, body = nn.Linear(3, 2), nn.Linear(3, 3)
    return {"head": dict(head.named_parameters()), "body": dict(body.named_parameters())}


def test_groups_have_their_rates_and_vectors_no_decay(groups: Groups) -> None:
    config = OptimizerConfig(learning_rate=1e-3, rates={"head": 1e-2}, weight_decay=0.1)
    parts = make_optimizer(BARE, groups, config).param_groups
    found = {(part["lr"], part["weight_decay"], part["params"][0].ndim) for part in parts}
    assert found == {(1e-2, 0.1, 2), (1e-2, 0.0, 1), (1e-3, 0.1, 2), (1e-3, 0.0, 1)}


@pytest.mark.parametrize(
    ("schedule", "middle", "end"), [("cosine", 0.5, 0), ("linear", 0.5, 0), ("constant", 1, 1)]
)
def test_rates_rise_and_fall(groups: Groups, schedule: Any, middle: float, end: float) -> None:
    config = OptimizerConfig(learning_rate=2.0, rates={"head": 4.0}, schedule=schedule, warm_up=0.2)
    optimizer = make_optimizer(BARE, groups, config)
    timm_schedule = make_schedule(optimizer, config, 100)
    rates = []
    for step in range(100):
        set_rates(timm_schedule, step)
        rates.append([part["lr"] for part in optimizer.param_groups])
        assert rates[-1][0] == 2 * rates[-1][2]
    body = [rate[2] for rate in rates]
    assert min(body) > 0  # no step is wasted at either end
    assert body[:20] == pytest.approx([2.0 * (step + 0.5) / 20 for step in range(20)])
    assert body[60] == pytest.approx(2.0 * middle, abs=0.03)
    assert body[99] == pytest.approx(2.0 * end, abs=0.03)


def test_the_least_rate_is_a_share_of_each_groups_own_peak(groups: Groups) -> None:
    config = OptimizerConfig(learning_rate=1.0, rates={"head": 1e-3}, least=0.1, warm_up=0.0)
    optimizer = make_optimizer(BARE, groups, config)
    set_rates(make_schedule(optimizer, config, 1000), 999)
    rates = {part["name"]: part["lr"] for part in optimizer.param_groups}
    assert rates == {"head": pytest.approx(1e-4, rel=1e-3), "body": pytest.approx(0.1, rel=1e-3)}


@pytest.mark.parametrize(
    ("name", "scaled", "rate"),
    [
        ("adamw", None, 0.192), ("lion", None, 0.192), ("sgd", None, 0.024), ("nadamuon", None, 0.024),
        ("adamw", False, 0.024), ("sgd", True, 0.192),
    ],
)  # fmt: skip
def test_rates_are_scaled_where_a_step_has_the_size_of_the_rate(name: str, scaled: Any, rate: float) -> None:
    model = toast.wrap(vit())
    config = OptimizerConfig(name=name, learning_rate=0.024, scaled=scaled)
    found = {part["name"]: part["lr"] for part in rated_groups(model, trained_groups(model), config)}
    assert found["to_signal"] == pytest.approx(rate)  # width 24, an eighth of 192


def test_cosine_is_the_formula(groups: Groups) -> None:
    config = OptimizerConfig(learning_rate=1.0, warm_up=0.0, least=0.1)
    optimizer = make_optimizer(BARE, groups, config)
    schedule = make_schedule(optimizer, config, 8)
    set_rates(schedule, 5)
    expected = 0.1 + 0.9 * (1 + math.cos(math.pi * 5.5 / 8)) / 2
    assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)


def test_a_single_step_has_the_full_rate(groups: Groups) -> None:
    config = OptimizerConfig(learning_rate=1.0, warm_up=0.9)
    optimizer = make_optimizer(BARE, groups, config)
    set_rates(make_schedule(optimizer, config, 1), 0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5)  # the middle of a cosine


def test_unknown_names_are_refused(groups: Groups) -> None:
    with pytest.raises(
        ValueError,
        match=r"optimizer\.rates: no parameters are trained in neck; the trained groups are head, body",
    ):
        make_optimizer(BARE, groups, OptimizerConfig(rates={"neck": 1.0}))
    with pytest.raises(ValueError, match="timm could not make 'adamx'"):
        make_optimizer(BARE, groups, OptimizerConfig(name="adamx"))
    assert isinstance(make_optimizer(BARE, groups, OptimizerConfig(name="sgd")), torch.optim.SGD)
