"""Measures of a language model against transformers' loss and counting by hand."""

from __future__ import annotations

import math

import pytest
import torch

from tests.models import decoder, tokens
from toast.evaluation.language import LanguageMetrics


def test_every_token_counts_the_same() -> None:
    model, metrics = decoder(), LanguageMetrics()
    total = hits = count = 0.0
    for length, left_out in ((9, 0), (4, 2), (6, 5)):
        text = tokens(3, length)
        labels = text.clone()
        labels[:, :left_out] = -100
        logits = model(text).logits
        metrics.update(logits[:, :-1], labels[:, 1:])
        for row in range(3):
            for place in range(length - 1):
                label = int(labels[row, place + 1])
                if label >= 0:
                    scores = logits[row, place].tolist()
                    total -= scores[label] - math.log(sum(map(math.exp, scores)))
                    hits += max(range(len(scores)), key=scores.__getitem__) == label
                    count += 1
    found = metrics.compute()
    assert found["tokens"] == count
    assert found["loss"] == pytest.approx(total / count, rel=1e-9)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-9)
    assert found["token_accuracy"] == pytest.approx(hits / count)


def test_one_batch_gives_the_loss_of_transformers() -> None:
    model, metrics, text = decoder().requires_grad_(False), LanguageMetrics(), tokens()
    out = model(text, labels=text)
    metrics.update(out.logits[:, :-1], text[:, 1:])
    # transformers computes its loss in float32.
    assert metrics.compute()["loss"] == pytest.approx(out.loss.item(), rel=1e-6)


def test_many_tokens_do_not_swallow_single_ones() -> None:
    metrics = LanguageMetrics()
    metrics.loss.total += 2.0**25
    metrics.loss.count += 2**25 - 1
    metrics.update(torch.zeros(1, 1, 2), torch.ones(1, 1, dtype=torch.long))
    expected = (2**25 + math.log(2)) / 2**25
    assert metrics.compute()["loss"] == pytest.approx(expected, rel=1e-14)


def test_losses_beyond_a_double_have_infinite_perplexity() -> None:
    metrics = LanguageMetrics()
    metrics.update(torch.tensor([[[2000.0, 0.0]]]), torch.tensor([[1]]))
    assert metrics.compute()["perplexity"] == math.inf


def test_nothing_measured_and_wrong_shapes_are_told() -> None:
    metrics = LanguageMetrics()
    metrics.update(torch.zeros(1, 2, 3), torch.full((1, 2), -100))
    with pytest.raises(ValueError, match="no token with a label was measured"):
        metrics.compute()
    with pytest.raises(ValueError, match=r"\(batch, tokens\); got \(1, 2, 3\) and \(1, 3\)"):
        metrics.update(torch.zeros(1, 2, 3), torch.zeros(1, 3, dtype=torch.long))
    metrics.update(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.long))
    metrics.reset()
    with pytest.raises(ValueError, match="no token with a label was measured"):
        metrics.compute()
