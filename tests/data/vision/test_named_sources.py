"""`open_vision`, `check` and `split_validation`."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.data.vision.pictures import picture, write_folder
from toast.data.vision import Sample, VisionSource, check, open_vision, split_validation


class Listed(VisionSource):
    """A source of labels alone."""

    def __init__(self, labels: list[int], classes: int = 3) -> None:
        super().__init__("listed", [f"c{i}" for i in range(classes)], labels)

    def __getitem__(self, index: int) -> Sample:
        return Sample(picture(index), self.labels[index], str(index))


def test_wrong_fields(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the kinds are folder \(a folder for each class\); .* got 'disk'"):
        open_vision("disk")
    with pytest.raises(ValueError, match="root: source 'vtab' needs one"):
        open_vision("vtab", name="svhn")
    with pytest.raises(ValueError, match="name: source 'hub' needs one"):
        open_vision("hub")
    with pytest.raises(ValueError, match="source 'vtab' has no options; got images"):
        open_vision("vtab", root=tmp_path, name="svhn", images="x")
    with pytest.raises(ValueError, match="source 'fgvc' has the options images; got boxes, seed"):
        open_vision("fgvc", root=tmp_path, name="cub", boxes="x", seed=1)


def test_importing_is_quick() -> None:
    code = (
        "import sys, toast.data.vision.augmentation, toast.data.vision as v; v.open_vision, v.check; "
        "sys.exit(bool({'torch', 'timm', 'torchvision', 'datasets'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_check_finds(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="listed has no picture"):
        check(Listed([]))
    with pytest.raises(ValueError, match="labels must be 0 to 2; 2 of 3 are not, first -1 of picture 1"):
        check(Listed([0, -1, 3]))
    with pytest.raises(ValueError, match="at least two classes are needed; all 2 pictures are of 'c1'"):
        check(Listed([1, 1]))
    assert check(Listed([0, 1, 2])) == ()
    assert check(Listed([0, 2, 2])) == ("1 of 3 classes have no picture here, first c1.",)
    source = open_vision("folder", root=write_folder(tmp_path, {"a": 9, "b": 1}))
    for file in (tmp_path / "a").iterdir():
        file.unlink()
    with pytest.raises(
        ValueError, match=r"9 of 10 picture files do not exist:\n(.*a/\d\d.png\n){5}  and 4 more"
    ):
        check(source)
    assert check(Listed([0, 1]).subset([0, 1]))[0].startswith("1 of 3")


@pytest.mark.parametrize("amount", [0.2, 20])
def test_validation_is_stratified(amount: float) -> None:
    source = Listed([0] * 50 + [1] * 30 + [2] * 20)
    train, val = split_validation(source, amount, seed=1)
    assert Counter(val.labels) == {0: 10, 1: 6, 2: 4}
    names = [part[i].name for part in (train, val) for i in range(len(part))]
    assert sorted(names, key=int) == [str(i) for i in range(100)]
    assert names[:80] == sorted(names[:80], key=int)
    again = split_validation(source, amount, seed=1)
    assert (train.fingerprint, val.fingerprint) == (again[0].fingerprint, again[1].fingerprint)
    assert val.fingerprint != split_validation(source, amount, seed=2)[1].fingerprint


@pytest.mark.parametrize("count", range(1, 13))
def test_validation_counts(count: int) -> None:
    sizes = {0: 7, 1: 3, 2: 2, 3: 1}
    source = Listed([label for label, size in sizes.items() for _ in range(size)], classes=4)
    train, val = split_validation(source, count)
    assert (len(train), len(val)) == (13 - count, count)
    for label, size in sizes.items():
        assert abs(Counter(val.labels)[label] - size * count / 13) < 1
    if count <= 8:  # more than that cannot leave every class a picture and keep the proportions
        assert 3 in train.labels


def test_validation_that_leaves_nothing() -> None:
    source = Listed([0, 1, 0, 1])
    for amount in (0, 4, 0.01, 0.99):
        with pytest.raises(ValueError, match="1 to 3 can be held out"):
            split_validation(source, amount)
    with pytest.raises(ValueError, match=r"a share between 0 and 1 or a whole number is needed; got 1.5"):
        split_validation(source, 1.5)
