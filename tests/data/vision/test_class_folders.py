"""Folders of classes: layouts, splits, boxes, and what people keep beside them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.data.vision.pictures import write_folder, write_json, write_picture
from toast.data.vision import check, open_vision


def test_splits(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": 2, "b": 1, "c": 1})
    write_folder(tmp_path / "valid", {"c": 1, "b": 2})
    (tmp_path / "train" / ".thumbnails").mkdir()
    val = open_vision("folder", root=tmp_path, split="val")
    assert val.classes == open_vision("folder", root=tmp_path).classes == ("a", "b", "c")
    assert list(val.labels) == [1, 1, 2]  # not shifted by the class that is not there
    assert val[0].name == "valid/b/00.png"


def test_a_class_called_train_is_no_split(tmp_path: Path) -> None:
    toys = open_vision("folder", root=write_folder(tmp_path, {"car": 1, "train": 1}), name="toys")
    assert toys.classes == ("car", "train")
    assert toys.name == "toys/train"


def test_a_split_of_any_name(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": 1, "b": 1})
    write_folder(tmp_path / "sketches", {"b": 1})
    assert list(open_vision("folder", root=tmp_path, split="sketches").labels) == [1]


@pytest.mark.parametrize("beside", ["root", "split"])
@pytest.mark.parametrize("kind", ["json", "csv"])
def test_boxes(tmp_path: Path, kind: str, beside: str) -> None:
    write_folder(tmp_path / "train", {"a": 2, "b": 1})
    name = "a/01.png" if beside == "split" else "train/a/01.png"
    file = (tmp_path / "train" if beside == "split" else tmp_path) / f"boxes.{kind}"
    if kind == "json":
        write_json(file, {name: [1, 2.5, 7, 9]})
    else:
        file.write_text(f"name, x0, y0, x1, y1\n{name},1,2.5,7,9\n\n")
    source = open_vision("folder", root=tmp_path)
    assert [source[i].box for i in range(3)] == [None, (1, 2.5, 7, 9), None]


def test_boxes_of_other_pictures(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": 1, "b": 1})
    write_json(tmp_path / "boxes.json", {"00.png": [0, 0, 5, 5]})
    with pytest.raises(ValueError, match=r"none of the 1 boxes .*00\.png; names are paths"):
        open_vision("folder", root=tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,x,y,w,h\n", r"boxes.csv, row 1: the header must be name,x0,y0,x1,y1"),
        ("name,x0,y0,x1,y1\na/00.png,0,0,5,5\na/01.png,0,0,5\n", r"boxes.csv, row 3: .* four finite"),
        ("name,x0,y0,x1,y1\na/00.png,0,0,five,5\n", r"boxes.csv, row 2: .* a box is four numbers"),
        ("name,x0,y0,x1,y1\na/00.png,5,0,5,5\n", r"boxes.csv, row 2: .* x0 < x1"),
        ("name,x0,y0,x1,y1\na/00.png,nan,0,5,5\n", r"boxes.csv, row 2: .* finite"),
    ],
)
def test_malformed_boxes(tmp_path: Path, text: str, message: str) -> None:
    write_folder(tmp_path, {"a": 2, "b": 1})
    (tmp_path / "boxes.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_vision("folder", root=tmp_path)


def test_malformed_json_boxes(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": 2, "b": 1})
    write_json(tmp_path / "boxes.json", {"a/00.png": {"x": 1}})
    with pytest.raises(ValueError, match=r"boxes.json, entry 'a/00.png': .* four numbers"):
        open_vision("folder", root=tmp_path)
    (tmp_path / "boxes.json").write_text('{"a/00.png": [0, 0, 1, 1],\n')
    with pytest.raises(ValueError, match=r"boxes.json, row 2, column 1: not valid JSON"):
        open_vision("folder", root=tmp_path)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist; it must contain a folder for each class"):
        open_vision("folder", root=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no folder"):
        open_vision("folder", root=tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="hold no picture"):
        open_vision("folder", root=tmp_path)
    write_folder(tmp_path, {"a": 1, "b": 1})
    with pytest.raises(ValueError, match="all training data; let a share"):
        open_vision("folder", root=tmp_path, split="val")


def test_splits_that_do_not_fit(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": 1, "b": 1})
    write_folder(tmp_path / "test", {"a": 1, "z": 1})
    with pytest.raises(ValueError, match="has the splits test, train"):
        open_vision("folder", root=tmp_path, split="val")
    with pytest.raises(ValueError, match=r"test has class folders that .*train lacks: z"):
        open_vision("folder", root=tmp_path, split="test")


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Training", "Testing"),
        ("Train", "Test"),
        ("seg_train", "seg_test"),
        ("train_set", "test_set"),
        ("seg_train/seg_train", "seg_test/seg_test"),
    ],
)
def test_spellings_of_splits(tmp_path: Path, train: str, test: str) -> None:
    write_folder(tmp_path / train, {"a": 2, "b": 1})
    write_folder(tmp_path / test, {"b": 2})
    source = open_vision("folder", root=tmp_path)
    assert (source.classes, list(source.labels), check(source)) == (("a", "b"), [0, 0, 1], ())
    assert list(open_vision("folder", root=tmp_path, split="test").labels) == [1, 1]
    with pytest.raises(ValueError, match="has the splits"):
        open_vision("folder", root=tmp_path, split="val")


def test_a_split_that_may_be_two_folders(tmp_path: Path) -> None:
    for folder in ("seg_train", "my_train"):
        write_folder(tmp_path / folder, {"a": 1, "b": 1})
    with pytest.raises(ValueError, match="several folders that match: my_train, seg_train"):
        open_vision("folder", root=tmp_path)
    assert len(open_vision("folder", root=tmp_path, split="my_train")) == 2


def test_folders_of_folders_are_never_classes_by_chance(tmp_path: Path) -> None:
    write_folder(tmp_path / "one" / "images", {"a": 1, "b": 1})
    with pytest.raises(
        ValueError, match=r"folders only \(such as a, b\).* If a, b are the classes, set .*images"
    ):
        open_vision("folder", root=tmp_path / "one")
    for folder in ("fold1", "fold2"):
        write_folder(tmp_path / "two" / folder, {"a": 1, "b": 1})
    with pytest.raises(
        ValueError, match=r"cannot be told whether they are classes or splits.*data.train=fold1"
    ):
        open_vision("folder", root=tmp_path / "two")
    as_classes = open_vision("folder", root=tmp_path, split="two")  # what the message advises
    assert as_classes.classes == ("fold1", "fold2")
    assert check(as_classes)[0] == "folders beside the splits are not read: one, two."
    assert "2 classes hold folders" in check(as_classes)[1]


def test_split_folders_without_classes(tmp_path: Path) -> None:
    write_folder(tmp_path / "flat", {"train": 2, "test": 1})
    with pytest.raises(ValueError, match="test, train are named like splits, but contain no class folders"):
        open_vision("folder", root=tmp_path / "flat")
    write_folder(tmp_path / "half" / "train", {"a": 1, "b": 1})
    write_folder(tmp_path / "half", {"test": 1})
    with pytest.raises(ValueError, match="half/test holds no class folders, so its pictures have no labels"):
        open_vision("folder", root=tmp_path / "half", split="test")


def test_what_is_hidden_is_no_data(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": 1, "b": 1})
    for place in (
        "a/.ipynb_checkpoints/00-checkpoint.png",
        "a/@eaDir/00.png",
        "__MACOSX/a/00.png",
        "b/.x.png",
    ):
        write_picture(tmp_path / place)
    (tmp_path / "a" / "Thumbs.db").touch()
    source = open_vision("folder", root=tmp_path)
    assert (source.classes, len(source), check(source)) == (("a", "b"), 2, ())


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": 1, "b": 1})
    for name in ("a/1.gif", "a/2.GIF", "c/3.gif", "00.png"):
        write_picture(tmp_path / name)
    (tmp_path / "b" / "4.jfif").touch()
    (tmp_path / "b" / "README").touch()
    remarks = check(open_vision("folder", root=tmp_path))
    assert "5 files are ignored" in remarks[0] and ".gif 3, .jfif 1, no suffix 1" in remarks[0]
    assert remarks[1:] == (
        "1 pictures beside the class folders are ignored: 00.png.",
        "1 of 3 classes have no picture here, first c.",
    )
    shutil.rmtree(tmp_path / "a"), shutil.rmtree(tmp_path / "b")
    with pytest.raises(ValueError, match=r"hold no picture .* 1 files are ignored.*\.gif 1"):
        open_vision("folder", root=tmp_path)


def test_accents_in_two_spellings_are_one_class(tmp_path: Path) -> None:
    composed, apart = "caf\u00e9", "cafe\u0301"
    write_folder(tmp_path / "train", {apart: 1, "b": 1})
    write_folder(tmp_path / "test", {composed: 2})
    write_json(
        tmp_path / "boxes.json", {f"train/{composed}/00.png": [0, 0, 9, 9], "train\\b\\00.png": [1, 1, 2, 2]}
    )
    source = open_vision("folder", root=tmp_path)
    assert source.classes == ("b", composed)
    assert [source[i].box for i in range(2)] == [(1, 1, 2, 2), (0, 0, 9, 9)]
    assert list(open_vision("folder", root=tmp_path, split="test").labels) == [1, 1]


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "a" / "00.png").rename(tmp_path / "a" / os.fsdecode(b"caf\xe9.png"))
    source = open_vision("folder", root=tmp_path)
    assert source[0].name == r"a/caf\xe9.png"
    (tmp_path / "b").rename(tmp_path / os.fsdecode(b"caf\xe9"))
    with pytest.raises(ValueError, match=r"the folder caf\\xe9 is not UTF-8"):
        open_vision("folder", root=tmp_path)


def test_boxes_without_a_picture_are_said(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": 1, "b": 1})
    boxes = {"train/a/00.png": [0, 0, 9, 9], "train/a/77.png": [0, 0, 9, 9], "test/a/00.png": [0, 0, 9, 9]}
    write_json(tmp_path / "boxes.json", boxes)
    (remark,) = check(open_vision("folder", root=tmp_path))
    assert remark.startswith("1 of 3 boxes belong to no picture: ") and remark.endswith("train/a/77.png.")
