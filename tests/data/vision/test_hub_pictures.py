"""Data sets through `datasets`, from folders alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.vision.pictures import picture, touch_later, truncate, write_folder
from toast.data.vision import BadSample, VisionSource, open_vision

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def quiet() -> Any:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def save(path: Path, columns: dict[str, Any], features: dict[str, Any]) -> str:
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).save_to_disk(str(path))
    return str(path)


def saved(path: Path, labels: list[Any], feature: Any, column: str = "label") -> str:
    pictures = [picture(i) for i in range(len(labels))]
    return save(path, {"image": pictures, column: labels}, {"image": datasets.Image(), column: feature})


def open_folder(tmp_path: Path, root: Path, split: str = "train") -> VisionSource:
    return open_vision("hub", root=tmp_path / "cache", name=str(root), split=split)


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    root = tmp_path / "pets"
    write_folder(root / "train", {"cat": 2, "dog": 2})
    write_folder(root / "validation", {"cat": 1, "dog": 1})
    source = open_folder(tmp_path, root)
    assert (source.classes, list(source.labels)) == (("cat", "dog"), [0, 0, 1, 1])
    assert np.array_equal(np.asarray(source[3].image), np.asarray(picture(101)))
    assert source[3].name.endswith("[3] 01.png")
    val = open_folder(tmp_path, root, "val")
    assert list(val.labels) == [0, 1]
    assert len(open_folder(tmp_path, root, "train[:3]")) == 3
    with pytest.raises(ValueError, match=r"split 'test': .*pets has no such split; its splits are"):
        open_folder(tmp_path, root, "test")
    same = open_folder(tmp_path, root)
    assert same.fingerprint == source.fingerprint != val.fingerprint
    touch_later(root / "train" / "cat" / "00.png")
    assert open_folder(tmp_path, root).fingerprint != source.fingerprint
    truncate(root / "train" / "dog" / "01.png")
    with pytest.raises(BadSample, match=r"01.png: OSError: .*truncated"):
        source[3]


def test_class_labels(tmp_path: Path) -> None:
    name = saved(tmp_path / "d", [1, 0, -1], datasets.ClassLabel(names=["no", "yes"]), "answer")
    source = open_vision("hub", name=name)
    assert source.classes == ("no", "yes")
    assert list(source.labels) == [1, 0, -1]  # `check` says that a label is missing
    assert source[0].label == 1


def test_whole_numbers_and_names(tmp_path: Path) -> None:
    numbers = open_vision("hub", name=saved(tmp_path / "n", [3, 0, 1], datasets.Value("int64")))
    assert (numbers.classes, list(numbers.labels)) == (("0", "1", "2", "3"), [3, 0, 1])
    names = open_vision("hub", name=saved(tmp_path / "s", ["b", "a", "b"], datasets.Value("string")))
    assert (names.classes, list(names.labels)) == (("a", "b"), [1, 0, 1])


def test_names_are_those_of_the_training_split(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})

    def rows(labels: list[str]) -> Any:
        pictures = [picture(i) for i in range(len(labels))]
        return datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features)

    splits = {"train": rows(["a", "b", "c"]), "validation": rows(["c"]), "test": rows(["c", "d"])}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "d"))
    val = open_vision("hub", name=str(tmp_path / "d"), split="val")
    assert (val.classes, list(val.labels)) == (("a", "b", "c"), [2])
    with pytest.raises(ValueError, match="split 'test', row 1: label 'd' is not one of the 3 classes"):
        open_vision("hub", name=str(tmp_path / "d"), split="test")


def test_columns_are_chosen(tmp_path: Path) -> None:
    columns = {
        "left": [picture(0)], "right": [picture(1)], "fine_label": [2], "coarse_label": [1],
    }  # fmt: skip
    labels = datasets.ClassLabel(names=["a", "b", "c"])
    features = {
        "left": datasets.Image(), "right": datasets.Image(), "fine_label": labels, "coarse_label": labels,
    }  # fmt: skip
    name = save(tmp_path / "d", columns, features)
    with pytest.raises(ValueError, match="left, right suit: say image_column="):
        open_vision("hub", name=name)
    right = open_vision("hub", name=name, image_column="right")
    assert list(right.labels) == [2]
    assert np.array_equal(np.asarray(right[0].image), np.asarray(picture(1)))
    coarse = open_vision("hub", name=name, image_column="right", label_column="coarse_label")
    assert list(coarse.labels) == [1]
    assert coarse.fingerprint != right.fingerprint
    with pytest.raises(ValueError, match=r"label_column: .* got 'colour'"):
        open_vision("hub", name=name, image_column="right", label_column="colour")


def test_columns_that_do_not_suit(tmp_path: Path) -> None:
    name = save(tmp_path / "t", {"text": ["a"]}, {"text": datasets.Value("string")})
    with pytest.raises(ValueError, match="has the columns text; none suits: say image_column="):
        open_vision("hub", name=name)
    name = saved(tmp_path / "f", [0.5], datasets.Value("float32"))
    with pytest.raises(ValueError, match="none suits: say label_column="):
        open_vision("hub", name=name)
    with pytest.raises(ValueError, match="neither numbers nor names"):
        open_vision("hub", name=name, label_column="label")
    name = saved(tmp_path / "m", ["a", None, None], datasets.Value("string"))
    with pytest.raises(ValueError, match="2 of 3 rows have no label, first row 1"):
        open_vision("hub", name=name)


def test_rows_without_a_picture(tmp_path: Path) -> None:
    name = save(
        tmp_path / "d",
        {"image": [None, {"bytes": b"no picture", "path": None}], "label": [0, 1]},
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])},
    )
    source = open_vision("hub", name=name)
    with pytest.raises(BadSample, match=r"\[0\]: the row has no picture"):
        source[0]
    with pytest.raises(BadSample, match=r"\[1\]: UnidentifiedImageError"):
        source[1]


def test_a_data_set_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the data set .* cannot be loaded: .* Needs its name on the Hub"):
        open_vision("hub", root=tmp_path, name=str(tmp_path / "nowhere"))
