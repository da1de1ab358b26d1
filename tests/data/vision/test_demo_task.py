"""The embedded task as a source."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from toast.data.vision import check, open_vision
from toast.embedded import two_objects
from toast.embedded.task import CLASSES, load_generic, load_materials, load_task


def test_val_is_cut_from_train() -> None:
    train = open_vision("demo", train=60, val=20, seed=3)
    val = open_vision("demo", split="val", train=60, val=20, seed=3)
    whole, _ = load_task(60, 1, 3)
    names = [part[i].name for part in (train, val) for i in range(len(part))]
    assert sorted(names) == sorted(f"demo/train/{i}" for i in range(60))
    assert set(Counter(val.labels).values()) == {2}
    for part in (train, val):
        assert check(part) == ()
        sample = part[1]
        row = int(sample.name.rpartition("/")[2])
        assert np.array_equal(np.asarray(sample.image), whole.images[row].permute(1, 2, 0).numpy())
        assert sample.label == part.labels[1] == int(whole.labels[row])
        assert sample.box == tuple(whole.boxes[row].tolist())
    assert len(open_vision("demo", train=60, seed=3)) == 54
    assert len(open_vision("demo", train=60, val=0, seed=3)) == 60


def test_test_and_generic() -> None:
    test = open_vision("demo", split="test", test=15)
    wanted = load_task(1, 15)[1]
    assert list(test.labels) == wanted.labels.tolist()
    assert np.array_equal(np.asarray(test[4].image), wanted.images[4].permute(1, 2, 0).numpy())
    generic = open_vision("demo", split="generic", generic=20, seed=1)
    assert generic.classes == load_materials().folders
    assert list(generic.labels) == load_generic(20, 1).labels.tolist()
    assert generic.fingerprint != open_vision("demo", split="generic", generic=20, seed=2).fingerprint


def test_two_objects() -> None:
    options = {"train": 30, "val": 20, "test": 10, "seed": 1}
    for labels, classes in (("item", CLASSES), ("clipart", two_objects.kinds())):
        for split, count in (("train", 30), ("val", 20), ("test", 10)):
            source = open_vision("demo", split=split, labels=labels, **options)
            assert check(source) == ()
            assert source.classes == classes
            wanted = two_objects.load_two_objects(split, count, labels, 1)  # type: ignore[arg-type]
            assert list(source.labels) == wanted.labels.tolist()
            assert source[7].box == tuple(wanted.boxes[7].tolist())
    assert len(open_vision("demo", split="val", labels="item", train=30)) == 3


def test_distractors() -> None:
    source = open_vision("demo", split="test", test=10, distractors=0)
    wanted = load_task(1, 10, 0, 0)[1]
    assert np.array_equal(np.asarray(source[4].image), wanted.images[4].permute(1, 2, 0).numpy())


def test_wrong_options() -> None:
    with pytest.raises(ValueError, match="split: the demo has train, val, test, generic; got 'dev'"):
        open_vision("demo", split="dev")
    with pytest.raises(ValueError, match="at least 1; got 0, 1000, 2000"):
        open_vision("demo", train=0)
    with pytest.raises(ValueError, match="labels: needs one of item, clipart; got 'both'"):
        open_vision("demo", labels="both")
    with pytest.raises(ValueError, match="1 to 9 can be held out"):
        open_vision("demo", split="val", train=10, val=10)
    with pytest.raises(ValueError, match=r"root: source 'demo' has none .* got 'here'"):
        open_vision("demo", root="here")  # type: ignore[arg-type]
