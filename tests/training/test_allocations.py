"""What operators take and give back is followed, with and without memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from toast.training.allocations import GRADIENT, Allocations, Timeline
from toast.training.memory import optimizer_memory
from toast.training.run_config import OptimizerConfig


def test_views_and_known_tensors_are_not_counted_twice() -> None:
    known = torch.zeros(10)
    with Allocations([known]) as seen:
        made = torch.ones(100)
        views = made.view(10, 10).T, known[:5], made.add_(1)
        assert seen.bytes_held == 400
        del made, views
        assert seen.bytes_held == 0
    assert seen.timeline.peak(1) == 400


def test_what_grows_with_the_batch_is_told_from_what_does_not() -> None:
    label = ["fixed"]
    with FakeTensorMode(), Allocations(label=lambda: label[0], batch=101) as seen:
        weight = torch.empty(64, 64)
        label[0] = "states"
        states = torch.empty(101, 64) @ weight
    assert seen.held() == {"fixed": (64 * 64 * 4.0, 0.0), "states": (0.0, 64 * 4.0)}
    assert seen.timeline.peak(3) == 64 * 64 * 4 + 2 * 3 * 64 * 4  # the factor, which is gone, and the product
    assert states.shape == (101, 64)


def test_gradients_are_told_apart() -> None:
    parameter = nn.Parameter(torch.ones(50))
    seen = Allocations([parameter])
    parameter.register_post_accumulate_grad_hook(lambda p: seen.as_gradient(p.grad))
    with seen:
        (parameter * parameter).sum().backward()
    assert seen.held()[GRADIENT] == (200.0, 0.0)
    assert seen.timeline.gradients[-1] == 200


def test_the_most_samples_fit_and_one_more_does_not() -> None:
    timeline = Timeline(fixed=[100, 0, 50], sample=[1, 7, 0], gradients=[0, 30, 60])
    for share, held in ((1.0, None), (0.25, None), (1.0, 60.0)):
        most = timeline.most_samples(1000, share, held)
        assert most is not None
        assert timeline.peak(most, share, held) <= 1000 < timeline.peak(most + 1, share, held)
    assert timeline.most_samples(109) == 0  # what is there without any sample does not fit
    assert Timeline([10], [0], [0]).most_samples(20) is None


def test_the_states_of_optimisers_are_measured() -> None:
    parameters = [nn.Parameter(torch.empty(64, 32)), nn.Parameter(torch.empty(32))]
    size = 4 * (64 * 32 + 32)
    for name, states in (("sgd", 1), ("lion", 1), ("adamw", 2), ("nadamw", 2)):
        assert optimizer_memory(parameters, OptimizerConfig(name=name)).states == states * size
    assert optimizer_memory(parameters, OptimizerConfig(name="adafactor")).states < size
    assert optimizer_memory(parameters, OptimizerConfig()).momentary == pytest.approx(size, rel=0.01)
