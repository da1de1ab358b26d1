"""Measures of numbers and of several labels against counting by hand."""

from __future__ import annotations

import math

import pytest
import torch

from toast.evaluation.multilabel import MultilabelMetrics
from toast.evaluation.regression import RegressionMetrics

NAN = math.nan


def test_numbers() -> None:
    """In the units of the labels, although outputs are in standard deviations; far from 0, too."""
    mean, deviation = torch.tensor([1e6, 0.0]), torch.tensor([2.0, 1.0])
    metrics = RegressionMetrics(mean, deviation, lambda out, label: out[:, 0])
    labels = torch.tensor([[1e6 - 2, 1.0], [1e6 + 2, -1.0], [NAN, NAN]])
    metrics.update(torch.tensor([[-1.0, 0.5], [0.5, -1.0], [9.0, 9.0]]), labels)
    found = metrics.compute()
    # Errors are 0 and 1 of the first column, 0.5 and 0 of the second; their variances are 4 and 1.
    assert found["samples"] == 2
    assert found["mae"] == pytest.approx((0 + 0.5 + 1 + 0) / 4)
    assert found["r2"] == pytest.approx(((1 - 1 / 8) + (1 - 0.25 / 2)) / 2)
    assert found["loss"] == pytest.approx(-0.25)


def test_one_number_explains_nothing() -> None:
    metrics = RegressionMetrics(torch.zeros(1), torch.ones(1), lambda out, label: out[:, 0])
    with pytest.raises(ValueError, match="no sample with a label was measured"):
        metrics.compute()
    metrics.update(torch.ones(1, 1), torch.zeros(1, 1))
    assert metrics.compute() == {"samples": 1, "loss": 1.0, "mae": 1.0}


def test_labels() -> None:
    """The first label's two are first and third by score; no sample has the third label."""
    metrics = MultilabelMetrics(3, lambda out, label: out.sum(-1) * 0 + 2)
    labels = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 0], [NAN, NAN, NAN]])
    metrics.update(torch.tensor([[3.0, 0, 0], [2, 1, 0], [1, 0, 0], [9, 9, 9]]), labels)
    found = metrics.compute()
    assert found["samples"] == 3
    assert found["loss"] == 2
    assert found["label_average_precision"] == [pytest.approx((1 + 2 / 3) / 2), 1.0, None]
    assert found["mean_average_precision"] == pytest.approx((5 / 6 + 1) / 2)


def test_one_label() -> None:
    metrics = MultilabelMetrics(1, lambda out, label: out[:, 0])
    metrics.update(torch.tensor([[2.0], [1.0]]), torch.tensor([[0.0], [1.0]]))
    assert metrics.compute()["label_average_precision"] == [0.5]


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"need shapes \(batch, 3\); got \(2, 2\)"):
        MultilabelMetrics(3, lambda out, label: out[:, 0]).update(torch.zeros(2, 2), torch.zeros(2, 2))
    metrics = RegressionMetrics(torch.zeros(1), torch.ones(1), lambda out, label: out[:, 0])
    with pytest.raises(ValueError, match=r"need shapes \(batch, 1\); got \(2, 1\) and \(2,\)"):
        metrics.update(torch.zeros(2, 1), torch.zeros(2))
