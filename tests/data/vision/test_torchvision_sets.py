"""The data sets of torchvision."""

from __future__ import annotations

import gzip
import inspect
import struct
from pathlib import Path

import numpy as np
import pytest
import torchvision

from tests.data.vision.pictures import touch_later, truncate, write_folder, write_picture
from toast.data.vision import BadSample, check, open_vision
from toast.data.vision.torchvision_sets import DATASETS

DIGITS = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)


def write_idx(root: Path, kind: str, digits: np.ndarray, labels: list[int], part: str = "train") -> None:
    """Writes the two files of a data set of the MNIST family."""
    folder = root / kind / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    header = struct.pack(">4B3i", 0, 0, 8, 3, *digits.shape)
    (folder / f"{part}-images-idx3-ubyte").write_bytes(header + digits.tobytes())
    (folder / f"{part}-labels-idx1-ubyte").write_bytes(
        struct.pack(">4Bi", 0, 0, 8, 1, len(labels)) + bytes(labels)
    )


@pytest.mark.parametrize("kind", ["MNIST", "FashionMNIST", "KMNIST"])
def test_mnist_family(tmp_path: Path, kind: str) -> None:
    write_idx(tmp_path, kind, DIGITS, [5, 0, 4, 1, 9, 2])
    write_idx(tmp_path, kind, DIGITS[:2], [7, 3], "t10k")
    source = open_vision("torchvision", root=tmp_path, name=kind)
    assert list(source.labels) == [5, 0, 4, 1, 9, 2]
    assert len(source.classes) == 10
    assert source[4].label == 9
    assert np.array_equal(np.asarray(source[4].image), DIGITS[4][..., None].repeat(3, 2))
    assert list(open_vision("torchvision", root=tmp_path, name=kind, split="test").labels) == [7, 3]


def test_the_fingerprint_follows_the_pixels(tmp_path: Path) -> None:
    def fingerprint(digits: np.ndarray, labels: list[int]) -> str:
        write_idx(tmp_path, "MNIST", digits, labels)
        return open_vision("torchvision", root=tmp_path, name="MNIST").fingerprint

    labels = [5, 0, 4, 1, 9, 2]
    write_idx(tmp_path, "MNIST", DIGITS[:1], [0], "t10k")  # torchvision wants all four files
    changed = DIGITS.copy()
    changed[3, 2, 1] ^= 1
    prints = [fingerprint(DIGITS, labels), fingerprint(changed, labels), fingerprint(DIGITS, labels[::-1])]
    assert len(set(prints)) == 3
    assert fingerprint(DIGITS, labels) == prints[0]


def test_a_data_set_of_files(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "eurosat" / "2750", {"Forest": 2, "River": 1})
    source = open_vision("torchvision", root=tmp_path, name="EuroSAT")
    assert source.classes == ("Forest", "River")
    assert source[2].name == "EuroSAT/train[2] 00.png"
    before = source.fingerprint
    touch_later(folder / "River" / "00.png")
    source = open_vision("torchvision", root=tmp_path, name="EuroSAT")
    assert source.fingerprint != before
    truncate(folder / "Forest" / "01.png")
    with pytest.raises(BadSample, match=r"EuroSAT/train\[1\] 01.png: OSError"):
        source[1]
    (folder / "Forest" / "00.png").unlink()
    with pytest.raises(BadSample, match="the file does not exist"):
        source[0]
    with pytest.raises(ValueError, match=r"1 of 3 picture files do not exist:\n.*00\.png"):
        check(source)
    assert list(source.subset([1, 0]).absent([1])) == [str(folder / "Forest" / "00.png")]


def test_splits_of_files(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        write_folder(tmp_path / "country211" / split, {"AD": 1, "ZW": 1})
    for split in ("train", "val", "test"):
        source = open_vision("torchvision", root=tmp_path, name="Country211", split=split)
        assert list(source.labels) == [0, 1]


def write_pets(root: Path) -> None:
    base = root / "oxford-iiit-pet"
    for number in range(3):
        write_picture(base / "images" / f"{number:02d}.jpg", number)
    (base / "annotations").mkdir()
    rows = ["00 2 1 1", "01 1 1 1", "02 2 1 1"]
    (base / "annotations" / "trainval.txt").write_text("\n".join(rows))


def test_another_spelling_and_a_list_of_labels(tmp_path: Path) -> None:
    write_pets(tmp_path)
    with pytest.raises(ValueError, match="split: OxfordIIITPet has train, test; got 'val'; let a share"):
        open_vision("torchvision", root=tmp_path, name="OxfordIIITPet", split="val")
    source = open_vision("torchvision", root=tmp_path, name="OxfordIIITPet")
    assert list(source.labels) == [1, 0, 1]
    assert source[0].image.mode == "RGB"


def test_a_data_set_without_a_list_of_labels(tmp_path: Path) -> None:
    options = {"size": 5, "image_size": (3, 8, 8), "num_classes": 4}
    source = open_vision("torchvision", root=tmp_path, name="FakeData", **options)
    assert [source[i].label for i in range(5)] == list(source.labels)
    assert set(source.labels) <= {0, 1, 2, 3}
    test = open_vision("torchvision", root=tmp_path, name="FakeData", split="test", **options)
    assert test.fingerprint != source.fingerprint


@pytest.mark.parametrize("name", DATASETS)
def test_rows_are_what_torchvision_takes(name: str, tmp_path: Path) -> None:
    kind = getattr(torchvision.datasets, name.partition("-")[0])
    for arguments in DATASETS[name].values():
        parameters = inspect.signature(kind.__init__).parameters
        assert set(arguments) <= set(parameters) or "kwargs" in parameters
    if name == "FakeData":
        return
    for split in DATASETS[name]:
        # ImportError: SciPy or h5py, which some data sets need, are not among the dependencies
        with pytest.raises((ValueError, ImportError), match=f"{name}") as caught:
            open_vision("torchvision", root=tmp_path / "nowhere", name=name, split=split)
        # torchvision has no complaint about the arguments, only about the files
        assert "Unknown value" not in str(caught.value)
        assert "unexpected keyword" not in str(caught.value)


def test_what_torchvision_lacks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"name: torchvision has CIFAR10, .* got 'CIFAR11'"):
        open_vision("torchvision", root=tmp_path, name="CIFAR11")
    with pytest.raises(ValueError, match=r"EMNIST-letters, .* got 'EMNIST-latin'"):
        open_vision("torchvision", root=tmp_path, name="EMNIST-latin")
    with pytest.raises(ValueError, match=r"split: SVHN has train, test, extra; got 'val'"):
        open_vision("torchvision", root=tmp_path, name="SVHN", split="val")
    with pytest.raises(ValueError, match=r"CIFAR10, split 'train', is not complete in .*download: true"):
        open_vision("torchvision", root=tmp_path, name="CIFAR10")
    with pytest.raises(ValueError, match="unexpected keyword argument 'fold'"):
        open_vision("torchvision", root=tmp_path, name="STL10", fold=1)
    with pytest.raises(ValueError, match="it is not known how torchvision's SBU spells"):
        open_vision("torchvision", root=tmp_path, name="SBU")
    with pytest.raises(ValueError, match="download: torchvision cannot download ImageNet"):
        open_vision("torchvision", root=tmp_path, name="ImageNet", download=True)


@pytest.mark.slow
def test_the_real_fashion_mnist(assets: Path, tmp_path: Path) -> None:
    files = list((assets / "fashion_mnist").glob("*.gz"))
    if not files:
        pytest.skip(f"{assets / 'fashion_mnist'} holds no files")
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for file in files:
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    source = open_vision("torchvision", root=tmp_path, name="FashionMNIST", split="test")
    assert check(source) == ()
    assert np.bincount(source.labels).tolist() == [1000] * 10
    assert source.classes[9] == "Ankle boot"
    assert source[0].label == 9
    assert source[0].image.size == (28, 28)
