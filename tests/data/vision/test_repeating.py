"""Pictures that stand in two splits."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.data.vision.pictures import write_folder
from toast.data.vision import open_vision, repeated


def test_a_picture_in_two_splits_is_said(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": 3, "b": 3})
    write_folder(tmp_path / "test", {"b": 2, "a": 2})  # other pictures: they are drawn by place
    for number in range(2):
        (tmp_path / "test" / "b" / f"0{number}.png").write_bytes(b"another" * (number + 1))
        (tmp_path / "test" / "a" / f"0{number}.png").write_bytes(b"")
    (tmp_path / "train" / "a" / "00.png").write_bytes(b"")  # two empty files are no picture in two splits
    train, test = (open_vision("folder", root=tmp_path, split=split) for split in ("train", "test"))
    assert repeated(train, test) is None
    shutil.copy(tmp_path / "train" / "b" / "02.png", tmp_path / "test" / "b" / "copy.png")
    remark = repeated(train, open_vision("folder", root=tmp_path, split="test"))
    assert remark is not None
    assert remark.startswith("1 of the 5 pictures") and remark.endswith("train/b/02.png.")
    assert repeated(train.subset([0, 1]), train.subset([5])) is None
    assert repeated(open_vision("demo", train=4, val=0), open_vision("demo", split="test", test=2)) is None
