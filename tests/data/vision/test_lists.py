"""Data sets by lists: VTAB-1k and the fine-grained ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.vision.pictures import write_json, write_picture
from toast.data.vision import check, open_vision
from toast.data.vision.fgvc import DATASETS
from toast.data.vision.vtab import CLASSES


def write_vtab(root: Path, rows: list[str], file: str = "train800.txt") -> None:
    folder = root / "svhn"
    for row in filter(None, rows):
        write_picture(folder / row.rpartition(" ")[0])
    (folder / file).write_text("\n".join(rows) + "\n")


def test_vtab(tmp_path: Path) -> None:
    write_vtab(tmp_path, ["images/a b.png 9", "", "images/c.png 0"])
    source = open_vision("vtab", root=tmp_path, name="svhn")
    assert list(source.labels) == [9, 0]
    assert source.classes == tuple("0123456789")
    assert source[0].name == "images/a b.png"
    assert check(source)[0] == "train800.txt lists 2 pictures; VTAB-1k has 800 there."


@pytest.mark.parametrize(
    ("split", "file"), [("val", "val200.txt"), ("trainval", "train800val200.txt"), ("test", "test.txt")]
)
def test_vtab_splits(tmp_path: Path, split: str, file: str) -> None:
    write_vtab(tmp_path, ["images/a.png 3"], file)
    assert list(open_vision("vtab", root=tmp_path, name="svhn", split=split).labels) == [3]


def test_vtab_has_nineteen_tasks() -> None:
    assert len(CLASSES) == 19


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("images/foo.jpg 12x", r"train800.txt, row 2: 'images/foo.jpg 12x': the label is not a whole number"),
        ("images/foo.jpg -1", "row 2: .* not a whole number"),
        ("images/foo.jpg 1²", "row 2: .* not a whole number"),
        ("foo.jpg", "row 2: 'foo.jpg': a path and a label are needed"),
        ("foo.jpg 10", "row 2: .* not one of the 10 classes 0 to 9"),
    ],
)
def test_malformed_rows(tmp_path: Path, row: str, message: str) -> None:
    write_vtab(tmp_path, ["images/a.png 3"])
    (tmp_path / "svhn" / "train800.txt").write_text(f"images/a.png 3\n{row}\n{row}\n")
    with pytest.raises(ValueError, match=message + r".*\(1 more rows are wrong\)"):
        open_vision("vtab", root=tmp_path, name="svhn")


def test_lists_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train800\.txt does not exist"):
        open_vision("vtab", root=tmp_path, name="svhn")
    (tmp_path / "svhn").mkdir()
    (tmp_path / "svhn" / "train800.txt").write_bytes(b"a.png 1\n\xe9.png 1\n")
    with pytest.raises(ValueError, match=r"train800\.txt, line 2: not UTF-8: .*0xe9"):
        open_vision("vtab", root=tmp_path, name="svhn")
    (tmp_path / "svhn" / "train800.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"train800\.txt lists no picture"):
        open_vision("vtab", root=tmp_path, name="svhn")


def test_unknown_tasks_and_splits(tmp_path: Path) -> None:
    for source in ("vtab", "fgvc"):
        with pytest.raises(ValueError, match=r"name: .* got 'cifar11'"):
            open_vision(source, root=tmp_path, name="cifar11")
    with pytest.raises(ValueError, match="split: vtab has train, val, trainval, test; got 'dev'"):
        open_vision("vtab", root=tmp_path, name="svhn", split="dev")
    with pytest.raises(ValueError, match="split: fgvc has train, val, trainval, test; got 'dev'"):
        open_vision("fgvc", root=tmp_path, name="cub", split="dev")


def write_fgvc(folder: Path, name: str) -> None:
    for file, entries in {
        "train": {"x/1.png": 4, "x/2.png": 9, "x/3.png": 7},
        "val": {"x/4.png": 9},
        "test": {"x/5.png": 7, "x/6.png": 4},
    }.items():
        write_json(folder / f"{file}.json", entries)
        for path in entries:
            write_picture(folder / DATASETS[name].images / path)


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("nested", [False, True])
def test_fgvc(tmp_path: Path, name: str, nested: bool) -> None:
    write_fgvc(tmp_path / DATASETS[name].folder if nested else tmp_path, name)
    labels = {}
    for split in ("train", "val", "trainval", "test"):
        source = open_vision("fgvc", root=tmp_path, name=name, split=split)
        assert source.classes == ("4", "7", "9")
        assert [source[i].label for i in range(len(source))] == list(source.labels)
        labels[split] = list(source.labels)
    # class 9 is the third in every split, though val has no other class
    assert labels == {"train": [0, 2, 1], "val": [2], "trainval": [0, 2, 1, 2], "test": [1, 0]}


def test_fgvc_boxes(tmp_path: Path) -> None:
    write_fgvc(tmp_path, "cub")
    (tmp_path / "images.txt").write_text("1 x/2.png\n2 x/1.png\n")
    (tmp_path / "bounding_boxes.txt").write_text("1 60.0 27.0 325.0 304.0\n2 0 0 3 4\n")
    source = open_vision("fgvc", root=tmp_path, name="cub")
    assert [source[i].box for i in range(3)] == [(0, 0, 3, 4), (60, 27, 385, 331), None]
    (tmp_path / "bounding_boxes.txt").write_text("1 60.0 27.0 325.0 304.0\n3 0 0 3 4\n")
    with pytest.raises(ValueError, match=r"bounding_boxes.txt, row 2: images.txt has no picture '3'"):
        open_vision("fgvc", root=tmp_path, name="cub")
    (tmp_path / "bounding_boxes.txt").write_text("1 60.0 27.0 325.0\n")
    with pytest.raises(ValueError, match=r"bounding_boxes.txt, row 1: .*: 5 fields are needed"):
        open_vision("fgvc", root=tmp_path, name="cub")


def test_fgvc_pictures_elsewhere(tmp_path: Path) -> None:
    write_fgvc(tmp_path, "cub")
    (tmp_path / "images").rename(tmp_path / "jpg")
    assert open_vision("fgvc", root=tmp_path, name="cub", images="jpg")[0].label == 0
    with pytest.raises(
        ValueError, match=r"3 of 3 picture files do not exist:\n.*train.json, entry 'x/1.png'"
    ):
        check(open_vision("fgvc", root=tmp_path, name="cub"))


def test_fgvc_remarks(tmp_path: Path) -> None:
    write_fgvc(tmp_path, "cub")
    remarks = check(open_vision("fgvc", root=tmp_path, name="cub"))
    assert remarks == ("train.json has 3 classes; CUB-200-2011 has 200.",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", r"train.json must map .* it holds a list"),
        ('{"a": 1', r"train.json, row 1, column 8: not valid JSON"),
        ('{"a": 1.5}', r"train.json, entry 'a': 1.5: the class id is neither"),
        ('{"a": true}', r"train.json, entry 'a': True: the class id is neither"),
        ('{"a": 1, "b": "1"}', r"train.json, entry 'b': '1': some class ids are numbers"),
        ('{"a": 1, "a": 2}', r"train.json, entry 'a': it is in the file twice"),
        ("{}", r"train.json lists no picture"),
    ],
)
def test_malformed_mappings(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_vision("fgvc", root=tmp_path, name="cub")


def test_fgvc_splits_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"CUB-200-2011: there is no train.json"):
        open_vision("fgvc", root=tmp_path, name="cub")
    write_fgvc(tmp_path, "cub")
    write_json(tmp_path / "test.json", {"x/1.png": 4, "x/2.png": 5})
    with pytest.raises(ValueError, match=r"test.json, entry 'x/2.png': 5: train.json has no such class id"):
        open_vision("fgvc", root=tmp_path, name="cub", split="test")
    (tmp_path / "val.json").unlink()
    with pytest.raises(ValueError, match=r"val\.json does not exist"):
        open_vision("fgvc", root=tmp_path, name="cub", split="trainval")
