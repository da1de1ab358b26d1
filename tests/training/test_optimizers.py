"""Optimiser groups and schedules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from toast.training.config import OptimizerConfig
from toast.training.optimizers import Groups, make_optimizer, make_schedule, set_rates


@pytest.fixture
def groups() -> Groups:
    head, body = nn.Linear(3, 2), nn.Linear(3, 3)
    return {"head": dict(head.named_parameters()), "body": dict(body.named_parameters())}


def test_groups_have_their_rates_and_vectors_no_decay(groups: Groups) -> None:
    config = OptimizerConfig(learning_rate=1e-3, rates={"head": 1e-2}, weight_decay=0.1)
    parts = make_optimizer(groups, config).param_groups
    found = {(part["lr"], part["weight_decay"], part["params"][0].ndim) for part in parts}
    assert found == {(1e-2, 0.1, 2), (1e-2, 0.0, 1), (1e-3, 0.1, 2), (1e-3, 0.0, 1)}


@pytest.mark.parametrize(
    ("schedule", "middle", "end"), [("cosine", 0.5, 0), ("linear", 0.5, 0), ("constant", 1, 1)]
)
def test_rates_rise_and_fall(groups: Groups, schedule: Any, middle: float, end: float) -> None:
    config = OptimizerConfig(learning_rate=2.0, rates={"head": 4.0}, schedule=schedule, warm_up=0.2)
    optimizer = make_optimizer(groups, config)
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


def test_cosine_is_the_formula(groups: Groups) -> None:
    config = OptimizerConfig(learning_rate=1.0, warm_up=0.0, least=0.1)
    optimizer = make_optimizer(groups, config)
    schedule = make_schedule(optimizer, config, 8)
    set_rates(schedule, 5)
    expected = 0.1 + 0.9 * (1 + math.cos(math.pi * 5.5 / 8)) / 2
    assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)


def test_a_single_step_has_the_full_rate(groups: Groups) -> None:
    config = OptimizerConfig(learning_rate=1.0, warm_up=0.9)
    optimizer = make_optimizer(groups, config)
    set_rates(make_schedule(optimizer, config, 1), 0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5)  # the middle of a cosine


def test_unknown_names_are_refused(groups: Groups) -> None:
    with pytest.raises(
        ValueError, match="no parameters are trained in neck; the trained groups are head, body"
    ):
        make_optimizer(groups, OptimizerConfig(rates={"neck": 1.0}))
    with pytest.raises(ValueError, match="timm could not make 'adamx'"):
        make_optimizer(groups, OptimizerConfig(name="adamx"))
    assert isinstance(make_optimizer(groups, OptimizerConfig(name="sgd")), torch.optim.SGD)
