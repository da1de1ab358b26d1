"""Sources, subsets, fingerprints, and decoding."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data_vision.pictures import picture, touch_later, truncate, write_folder, write_picture
from toast.data.vision import BadSample, VisionSource, open_vision
from toast.data.vision.decoding import decode


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


@pytest.mark.filterwarnings("ignore:(Truncated File Read|Corrupt EXIF data):UserWarning")  # of Pillow
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tif", "ppm"])
def test_truncated_pictures_are_bad(tmp_path: Path, suffix: str) -> None:
    whole = write_picture(tmp_path / f"whole.{suffix}").read_bytes()
    for length in {0, 1, 10, 30, *(len(whole) * part // 10 for part in range(1, 9))}:
        with pytest.raises(BadSample) as caught:
            decode(whole[:length], "a name")
        assert caught.value.name == "a name"
        assert caught.value.reason
        assert "\n" not in str(caught.value)


def test_damaged_bytes_decode_or_are_bad(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    bad = 0
    for suffix in ("png", "jpg", "gif", "webp"):
        whole = np.frombuffer(write_picture(tmp_path / f"a.{suffix}").read_bytes(), np.uint8)
        for _ in range(60):
            damaged = whole.copy()
            where = draw.integers(0, len(whole), 5)
            damaged[where] = draw.integers(0, 256, 5)
            try:
                assert decode(damaged.tobytes(), "a").mode == "RGB"
            except BadSample:
                bad += 1
    assert bad > 50


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadSample, match=r"gone.png: the file is not there"):
        decode(tmp_path / "gone.png", "gone.png")


def test_a_folder_source_names_what_is_bad(tmp_path: Path) -> None:
    root = write_folder(tmp_path, {"cat": 1, "dog": 1})
    truncate(root / "dog" / "00.png")
    source = open_vision("folder", root=root)
    assert source[0].label == 0
    with pytest.raises(BadSample, match=r"dog/00.png: OSError: .*truncated"):
        source[1]


def test_every_mode_becomes_rgb(tmp_path: Path) -> None:
    grey = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    deep = np.asarray(decode(tmp_path / "deep.png", "deep"))
    assert np.array_equal(deep, np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2))
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK"):
        file = tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}"
        picture().convert(mode).save(file)
        assert decode(file, mode).mode == "RGB"
    palette = picture().convert("P")
    palette.save(tmp_path / "clear.png", transparency=bytes(range(256)))
    assert np.array_equal(np.asarray(decode(tmp_path / "clear.png", "p")), np.asarray(palette.convert("RGB")))
