"""`labels.csv`: a row a picture, a column a target; what is malformed is named with file and row."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.settings import write_pictures
from toast.data.vision import check, open_vision

ROWS = "file,size,kind\nclass0/000.png,1.5,a\nclass1/001.png,2,b\n"


def test_lists_are_read_by_split(tmp_path: Path) -> None:
    write_pictures(tmp_path, train=3, test=2)
    (tmp_path / "train" / "labels.csv").write_text(ROWS)
    (tmp_path / "boxes.csv").write_text("name,x0,y0,x1,y1\ntrain/class0/000.png,1,2,8,9\n")
    source = open_vision("csv", root=tmp_path, split="train")
    assert source.fields is not None
    assert source.fields.columns == {"size": ["1.5", "2"], "kind": ["a", "b"]}
    assert source.fields.places[1] == "labels.csv, row 3 (train/class1/001.png)"
    assert source[0].box == (1, 2, 8, 9)
    assert source[1].box is None
    part = source.subset([1])
    assert part.fields is not None
    assert part.fields.columns["kind"] == ["b"]
    assert check(source, by_class=False) == ()
    before = source.fingerprint
    (tmp_path / "train" / "labels.csv").write_text(ROWS.replace("1.5", "1.6"))
    assert open_vision("csv", root=tmp_path, split="train").fingerprint != before


def test_one_list_names_the_splits(tmp_path: Path) -> None:
    rows = ["file,split,size", "a.png,train,1", "b.png,dev,2", "c.png,train,3"]
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    source = open_vision("csv", root=tmp_path, split="val")
    assert source.fields is not None
    assert source.fields.columns == {"size": ["2"]}
    with pytest.raises(ValueError, match=r"split 'test': the column 'split' of .* has train, dev"):
        open_vision("csv", root=tmp_path, split="test")
    with pytest.raises(ValueError, match=r"1 of 1 picture files do not .*\n .*b\.png \(labels\.csv, row 3\)"):
        check(source, by_class=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "row 1: needs names of columns, 'file' among them, each once; got nothing"),
        ("path,x\na,1\n", "row 1: needs names .* got path, x"),
        ("file,x,x\na,1,2\n", "'x' stands there twice or is empty"),
        ("file,x\na,1\nb\n", r"labels\.csv, row 3: needs 2 cells, as the first row; got 1"),
        ("file,x\na,1\n\na,2\n", r"row 4: a is in labels\.csv, row 2, too"),
        ("file,x\n,1\n", "row 2: the column 'file' is empty"),
        ("file,x\n", "lists no picture"),
    ],
)
def test_what_is_malformed_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_vision("csv", root=tmp_path, split="train")


def test_a_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"split 'train': needs .*train/labels\.csv, or .*neither is there"):
        open_vision("csv", root=tmp_path, split="train")
    (tmp_path / "labels.csv").write_text("file,x\na.png,1\n")
    with pytest.raises(ValueError, match=r"split 'test': .*labels\.csv has no column 'split'"):
        open_vision("csv", root=tmp_path, split="test")
