"""Names of splits, as they are spelled in the wild."""

from __future__ import annotations

import pytest

from toast.data.splits import find_split, is_split, split_of


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (
            ("train", "Training", "seg_train", "train_set", "trainset", "TRAIN", "train2017", "TrainImages"),
            "train",
        ),
        (("val", "valid", "Validation", "dev", "images-val", "valSet", "eval_data", "val2017"), "val"),
        (("test", "Testing", "alpaca_test", "test-00000-of-00002", "testset", "Test1"), "test"),
        (("trainval", "train_val", "train-dev"), "trainval"),
        (("train_test",), "test+train"),
        (("contest", "latest", "trainers", "device", "cat", "évalué", "attestation", "restrain", ""), None),
    ],
)
def test_what_a_name_says(names: tuple[str, ...], split: str | None) -> None:
    assert {name: split_of(name) for name in names} == dict.fromkeys(names, split)


def test_a_name_that_is_a_split_and_nothing_else() -> None:
    assert all(map(is_split, ("Test", "training", "valset")))
    assert not any(map(is_split, ("test tube", "seg_train", "cat")))


def test_the_best_spelling_is_found() -> None:
    assert find_split("val", ["dev", "valid", "val", "Val"]) == ["val"]
    assert find_split("val", ["dev", "Val"]) == ["Val"]
    assert find_split("val", ["dev", "my_val"]) == ["dev"]
    assert find_split("validation", ["dev", "valid"]) == ["dev", "valid"]
    assert find_split("train", ["my_train", "cat"]) == ["my_train"]
    assert find_split("Testing", ["test"]) == ["test"]
    assert find_split("sketches", ["Sketches", "photos"]) == ["Sketches"]
    assert find_split("train", ["test", "trainval"]) == []
