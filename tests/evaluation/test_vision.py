"""Measures of a classifier against counting by hand, in one process and in two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.evaluation.processes import run_in_two
from toast.evaluation.language import LanguageMetrics
from toast.evaluation.vision import VisionMetrics

CLASSES = 6


def samples(count: int = 57) -> tuple[Tensor, Tensor, Tensor]:
    """Logits that are right more often than not, labels with some left out and class 5 absent, shares."""
    torch.manual_seed(0)
    labels = torch.randint(0, CLASSES - 1, (count,))
    logits = torch.randn(count, CLASSES) * 2
    logits[torch.arange(count), labels] += 1.5
    labels[::9] = -100
    shares = torch.rand(count)
    shares[::4] = torch.nan
    return logits, labels, shares


def measured(parts: list[slice]) -> dict[str, Any]:
    metrics, (logits, labels, shares) = VisionMetrics(CLASSES), samples()
    for part in parts:
        metrics.update(logits[part], labels[part], {"attention_on_target": shares[part]})
    return metrics.compute()


def by_hand() -> dict[str, Any]:
    logits, labels, shares = samples()
    kept = labels >= 0
    logits, labels, shares = logits[kept].double(), labels[kept], shares[kept]
    probabilities = logits.exp() / logits.exp().sum(1, keepdim=True)
    confidence, predicted = probabilities.max(1)
    confusion = [[0] * CLASSES for _ in range(CLASSES)]
    for label, guess in zip(labels.tolist(), predicted.tolist(), strict=True):
        confusion[label][guess] += 1
    error = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            hits = (predicted == labels)[inside].double().mean()
            error += float(inside.double().mean() * (hits - confidence[inside].mean()).abs())
    by_class = [row[i] / sum(row) if sum(row) else None for i, row in enumerate(confusion)]
    return {
        "samples": len(labels),
        "loss": float(-probabilities[torch.arange(len(labels)), labels].log().mean()),
        "accuracy": float((predicted == labels).double().mean()),
        "top5_accuracy": float((logits.argsort(1)[:, 1:] == labels[:, None]).any(1).double().mean()),
        "calibration_error": error,
        "class_accuracy": by_class,
        "mean_class_accuracy": sum(by_class[:-1]) / (CLASSES - 1),
        "confusion": confusion,
        "targets_in_sight": int((~shares.isnan()).sum()),
        "targets_out_of_sight": 0,
        "attention_on_target": float(shares[~shares.isnan()].double().mean()),
    }


def assert_alike(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name == "confusion":
            assert found[name] == value
        else:
            assert found[name] == pytest.approx(value, abs=1e-6), name


def test_measures_are_those_counted_by_hand() -> None:
    found = measured([slice(0, 20), slice(20, 21), slice(21, 57)])
    assert_alike(found, by_hand())
    assert found["class_accuracy"][-1] is None
    json.dumps(found, allow_nan=False)


# From Python 3.12 on. The children only add up, in one thread.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_two_processes_with_uneven_shares_are_one(tmp_path: Path) -> None:
    for found in run_in_two(_part, tmp_path):
        assert_alike(found["uneven"], by_hand())
        assert_alike(found["empty"], by_hand())
        assert found["language"] == pytest.approx(_tokens([slice(0, 5)]), abs=1e-12)


def _part(rank: int) -> dict[str, Any]:
    uneven = [slice(0, 16), slice(16, 45)] if rank == 0 else [slice(45, 57)]
    empty = [] if rank == 0 else [slice(0, 57)]
    language = [slice(0, 1)] if rank == 0 else [slice(1, 3), slice(3, 5)]
    return {"uneven": measured(uneven), "empty": measured(empty), "language": _tokens(language)}


def _tokens(parts: list[slice]) -> dict[str, Any]:
    torch.manual_seed(1)
    logits, labels = torch.randn(5, 7, 11), torch.randint(0, 11, (5, 7))
    labels[torch.rand(5, 7) < 0.4] = -100
    metrics = LanguageMetrics()
    for part in parts:
        metrics.update(logits[part], labels[part])
    return metrics.compute()


def test_few_classes_have_no_top_five_and_no_target_no_attention() -> None:
    metrics = VisionMetrics(3)
    metrics.update(torch.eye(3), torch.tensor([0, 1, 1]))
    found = metrics.compute()
    assert not {"top5_accuracy", "attention_on_target"} & found.keys()
    assert found["accuracy"] == pytest.approx(2 / 3)
    # Logits between 0 and 1 are logits: the most probable class has e / (e + 2).
    confidence = torch.e / (torch.e + 2)
    assert found["calibration_error"] == pytest.approx(abs(2 / 3 - confidence), abs=1e-6)


def test_selection_is_a_ratio_of_means_over_the_samples_in_sight() -> None:
    metrics, nan = VisionMetrics(3), torch.nan
    inside, outside = torch.tensor([0.8, 0.4, nan, nan]), torch.tensor([0.0, 0.3, nan, nan])
    found = {"attention_on_target": inside, "selection_inside": inside, "selection_outside": outside}
    has_target = torch.tensor([True, True, True, False])
    metrics.update(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]), found, has_target)
    measured = metrics.compute()
    assert (measured["targets_in_sight"], measured["targets_out_of_sight"]) == (2, 1)
    assert measured["selection_inside"] == pytest.approx(0.6)
    assert measured["selection_outside"] == pytest.approx(0.15)
    assert measured["selection_ratio"] == pytest.approx(4)
    metrics.reset()
    metrics.update(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]), found | {"selection_outside": outside * 0})
    assert "selection_ratio" not in metrics.compute()  # infinite: the means say it
    metrics.reset()
    away = {"attention_on_target": torch.full((2,), nan)}
    metrics.update(torch.zeros(2, 3), torch.tensor([0, 1]), away, torch.ones(2).bool())
    measured = metrics.compute()
    assert (measured["targets_in_sight"], measured["targets_out_of_sight"]) == (0, 2)
    assert not {"attention_on_target", "selection_inside"} & measured.keys()
    json.dumps(measured, allow_nan=False)


def test_half_precision_and_reset() -> None:
    metrics, (logits, labels, _) = VisionMetrics(CLASSES), samples()
    metrics.update(logits.bfloat16(), labels)
    assert "attention_on_target" not in metrics.compute()
    metrics.reset()
    with pytest.raises(ValueError, match="no sample with a label was measured"):
        metrics.compute()
    metrics.update(logits[:1], torch.tensor([-100]))
    with pytest.raises(ValueError, match="no sample with a label was measured"):
        metrics.compute()


def test_wrong_shapes_are_refused() -> None:
    metrics = VisionMetrics(CLASSES)
    with pytest.raises(ValueError, match=r"need shapes \(batch, 6\) and \(batch,\); got \(2, 5\) and \(2,\)"):
        metrics.update(torch.zeros(2, 5), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"attention_on_target: needs shape \(2,\); got \(3,\)"):
        metrics.update(
            torch.zeros(2, 6), torch.zeros(2, dtype=torch.long), {"attention_on_target": torch.zeros(3)}
        )
    with pytest.raises(ValueError, match="classes: needs at least 2; got 1"):
        VisionMetrics(1)
