"""Folders of classes: layouts, splits, boxes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data_vision.pictures import write_folder, write_json
from toast.data.vision import open_vision


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
    with pytest.raises(ValueError, match=r"boxes.json, row 2, column 1: no valid JSON"):
        open_vision("folder", root=tmp_path)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not there; it must hold a folder for each class"):
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
