"""The order of samples."""

from __future__ import annotations

import pytest

from toast.training.order import EpochBatches


def test_an_epoch_has_each_sample_once_and_epochs_differ() -> None:
    order = EpochBatches(count=10, batch_size=5)
    first = [key for batch in order for key in batch]
    assert sorted(first) == [(0, index) for index in range(10)]
    order.choose(1)
    second = [key for batch in order for key in batch]
    assert sorted(index for _, index in second) == list(range(10))
    assert [i for _, i in first] != [i for _, i in second]
    assert first == [key for batch in EpochBatches(10, 5) for key in batch]
    assert first != [key for batch in EpochBatches(10, 5, seed=1) for key in batch]


def test_an_epoch_goes_on_from_a_step() -> None:
    order = EpochBatches(count=14, batch_size=2, micro_batches=2)
    whole = list(order)
    assert len(order) == len(whole) == 6  # three steps of four samples; two samples are left out
    order.choose(0, start=2)
    assert list(order) == whole[4:]
    assert len(order) == 2


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size: .*training split has, 3; got 4"):
        EpochBatches(count=3, batch_size=2, micro_batches=2)
