"""Sources, subsets and fingerprints."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from tests.data.vision.pictures import picture, touch_later, truncate, write_folder, write_picture
from toast.data.vision import BadSample, VisionSource, open_vision


@pytest.fixture
def source(tmp_path: Path) -> VisionSource:
    return open_vision("folder", root=write_folder(tmp_path / "pets", {"cat": 3, "dog": 2}))


def test_a_sample(source: VisionSource) -> None:
    assert (source.name, source.classes, list(source.labels)) == (
        "pets/train",
        ("cat", "dog"),
        [0, 0, 0, 1, 1],
    )
    sample = source[3]
    assert (sample.label, sample.name, sample.box, sample.image.mode) == (1, "dog/00.png", None, "RGB")
    assert np.array_equal(np.asarray(sample.image), np.asarray(picture(100)))


def test_a_subset_keeps_the_given_order(source: VisionSource) -> None:
    part = source.subset([4, 0]).subset([1, 0])
    assert [part[i].name for i in range(len(part))] == ["cat/00.png", "dog/01.png"]
    assert list(part.labels) == [0, 1]
    assert part.classes == source.classes


def test_a_subset_of_what_is_not_there(source: VisionSource) -> None:
    with pytest.raises(ValueError, match=r"pictures 0 to 4; got 2 other indices, first 5"):
        source.subset([0, 5, -1])


def test_the_fingerprint_follows_the_data(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "pets", {"cat": 3, "dog": 2})

    def fingerprint() -> str:
        return open_vision("folder", root=root).fingerprint

    seen = [fingerprint()]
    assert len(seen[0]) == 64
    assert fingerprint() == seen[0]
    touch_later(root / "cat" / "00.png")
    seen.append(fingerprint())
    write_picture(root / "dog" / "02.png")
    seen.append(fingerprint())
    (root / "dog" / "02.png").rename(root / "dog" / "03.png")
    seen.append(fingerprint())
    (root / "dog").rename(root / "fox")
    seen.append(fingerprint())
    (root / "boxes.json").write_text('{"cat/00.png": [0, 0, 5, 5]}')
    seen.append(fingerprint())
    assert len(set(seen)) == len(seen)


def test_the_fingerprint_of_a_subset(source: VisionSource) -> None:
    first = source.subset([0, 1]).fingerprint
    assert first == source.subset([0, 1]).fingerprint
    assert len({first, source.subset([1, 0]).fingerprint, source.fingerprint}) == 3


def test_sources_go_to_other_processes(source: VisionSource) -> None:
    copied = pickle.loads(pickle.dumps(source.subset([1])))
    assert copied.fingerprint == source.subset([1]).fingerprint
    assert copied[0].name == "cat/01.png"


def test_a_folder_source_names_what_is_bad(tmp_path: Path) -> None:
    root = write_folder(tmp_path, {"cat": 1, "dog": 1})
    truncate(root / "dog" / "00.png")
    source = open_vision("folder", root=root)
    assert source[0].label == 0
    with pytest.raises(BadSample, match=r"dog/00.png: OSError: .*truncated"):
        source[1]
