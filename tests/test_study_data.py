"""The study's external tasks from stand-ins of what is fetched: splits share nothing, boxes lie on things."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from toast.data.vision import open_vision
from toast.embedded.task import load_materials

SCRIPT = Path(__file__).parents[1] / "scripts" / "study_data.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("study_data", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "study_data", module)
    spec.loader.exec_module(module)
    return module


def drawing(path: Path, colour: tuple[int, int, int]) -> None:
    """Writes a solid drawing of 60 x 40 pixels with a margin of nothing around it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGBA", (60, 40), (*colour, 255))
    image.save(path)


def pattern(path: Path, seed: int) -> None:
    """Writes a drawing that a small copy knows again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    small = np.dstack([values, np.full((8, 8, 1), 255, np.uint8)])
    Image.fromarray(small).resize((64, 64), Image.Resampling.NEAREST).save(path)


def written(place: Path) -> dict[str, list[str]]:
    """Returns the pictures of each split, as CLASS/NAME."""
    splits = sorted(path for path in place.iterdir() if path.is_dir())
    return {
        split.name: sorted(path.relative_to(split).as_posix() for path in split.rglob("*.png"))
        for split in splits
    }


def emoji(assets: Path) -> None:
    entries: list[dict[str, Any]] = []
    kinds = {"animal-bird": 15, "sky & weather": 20, "few": 3, "person": 15}
    for kind, count in kinds.items():
        for _ in range(count):
            number = len(entries)
            category = "People & Body" if kind == "person" else "Other"
            entries.append({"image": f"{number}.png", "subcategory": kind, "category": category})
            drawing(assets / "emoji" / "google" / f"{number}.png", (4 * number, 0, 255))
            drawing(assets / "emoji" / "twitter" / f"{number}.png", (4 * number, 255, 0))
    (assets / "emoji" / "emoji.json").write_text(json.dumps(entries))


def test_emoji_are_split_by_drawing_and_shifted_by_style(script: ModuleType, tmp_path: Path) -> None:
    emoji(tmp_path)
    script.main("emoji", tmp_path, tmp_path / "study", share=0.02)
    place = tmp_path / "study" / "emoji"
    found = written(place)
    assert {name: len(held) for name, held in found.items()} == {
        "train": 60, "val": 12, "test": 20, "shift": 20
    }  # fmt: skip
    assert {name.partition("/")[0] for name in found["train"]} == {"animal-bird", "sky and weather"}
    assert found["test"] == found["shift"]
    boxes = json.loads((place / "boxes.json").read_text())
    reds: dict[str, set[int]] = {}
    for split, held in found.items():
        assert len(held) == len(set(held))
        for name in held:
            x0, y0, x1, y1 = boxes[f"{split}/{name}"]
            assert min(x0, y0) >= 0 and max(x1, y1) <= 112
            assert 43 < x1 - x0 < 78 and (x1 - x0) / (y1 - y0) == pytest.approx(1.5, abs=0.05)
            image = Image.open(place / split / name)
            red, green, blue = image.getpixel(((x0 + x1) // 2, (y0 + y1) // 2))  # type: ignore[misc]
            assert (green, blue) == ((255, 0) if split == "shift" else (0, 255))
            reds.setdefault(split, set()).add(red)
    assert reds["test"] == reds["shift"]
    assert not reds["train"] & reds["val"] and not reds["train"] & reds["test"]
    assert not reds["val"] & reds["test"]
    assert all(boxes[f"test/{name}"] == boxes[f"shift/{name}"] for name in found["test"])
    source = open_vision("folder", root=place, split="shift")
    assert source.classes == ("animal-bird", "sky and weather")
    assert source[0].box is not None


def test_the_same_files_give_the_same_pictures(script: ModuleType, tmp_path: Path) -> None:
    emoji(tmp_path)
    for out in ("one", "two"):
        script.main("emoji", tmp_path, tmp_path / out, share=0.01)
    one, two = (sorted((tmp_path / out).rglob("*.png")) for out in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    assert len(one) == 30 + 6 + 10 + 10


def test_clip_art_that_stage_one_has_seen_is_left_out(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "openclipart"
    for number in range(14):
        pattern(root / "things" / "new" / f"{number}.png", number)
        pattern(root / "things" / "other" / "deep" / f"{number}.png", 100 + number)
    pattern(root / "things" / "other" / "copy.png", 100)
    pattern(root / "things" / "few" / "one.png", 500)
    sprite = next(s for s in load_materials().sprites["test"] if max(s.size) == 48)
    sprite.resize((2 * sprite.width, 2 * sprite.height), Image.Resampling.NEAREST).save(
        root / "things" / "new" / "seen.png"
    )
    (root / "things" / "new" / "damaged.png").write_bytes(b"no picture")
    kinds = {"new": ["things/new"], "other": ["things/other"], "few": ["things/few"]}
    monkeypatch.setattr(script, "CLIPART", kinds)
    monkeypatch.setattr(script, "compose", lambda name, drawings, counts: drawings)
    found = script.clipart(tmp_path, {})
    assert {label: {s: len(held) for s, held in splits.items()} for label, splits in found.items()} == {
        "new": {"train": 8, "val": 3, "test": 3},
        "other": {"train": 8, "val": 3, "test": 3},
    }
    monkeypatch.setattr(script, "CLIPART", kinds | {"mine": ["animals"], "cats": ["animals/mammals/cats"]})
    with pytest.raises(SystemExit, match="stage one has seen animals, animals/mammals/cats"):
        script.clipart(tmp_path, {})


def test_the_shipped_categories_are_new_to_stage_one(script: ModuleType) -> None:
    folders = [folder for held in script.CLIPART.values() for folder in held]
    assert not [folder for folder in folders if script._is_in(folder, load_materials().folders)]
    assert len(set(folders)) == len(folders)


def test_fashion_is_written_item_by_item(script: ModuleType, tmp_path: Path) -> None:
    place = tmp_path / "fashion_mnist"
    place.mkdir()
    for file, first in (("train", 0), ("t10k", 100)):
        images = np.zeros((100, 28, 28), np.uint8)
        images[:, 4:24, 7:20] = np.arange(100, 200)[:, None, None] - first // 2
        for kind, values in (("images-idx3", images), ("labels-idx1", np.arange(100) % 10)):
            head = b"\0\0\x08" + bytes([values.ndim]) + np.array(values.shape, ">i4").tobytes()
            (place / f"{file}-{kind}-ubyte.gz").write_bytes(
                gzip.compress(head + values.astype(np.uint8).tobytes())
            )
    script.main("fashion", tmp_path, tmp_path / "study", share=0.02)
    found = written(tmp_path / "study" / "fashion")
    assert {name: len(held) for name, held in found.items()} == {"train": 60, "val": 10, "test": 20}
    assert not set(found["train"]) & set(found["val"])
    sample = open_vision("folder", root=tmp_path / "study" / "fashion", split="test")[0]
    assert sample.box == (7, 4, 20, 24)
    label, row = sample.name.split("/")[1], int(Path(sample.name).stem)
    assert script.FASHION.index(label) == row % 10
    assert sample.image.getpixel((10, 10)) == (50 + row,) * 3


def test_solar_cells_are_shared_out_by_kind_and_probability(script: ModuleType, tmp_path: Path) -> None:
    place = tmp_path / "elpv-dataset" / "src" / "elpv_dataset" / "data"
    chances = list(script.SOLAR)
    lines = []
    for number in range(160):
        name = f"images/cell{number:04d}.png"
        (place / "images").mkdir(parents=True, exist_ok=True)
        Image.new("L", (30, 30), number).save(place / name)
        lines.append(f"{name}  {chances[number % 4]}    {'mono' if number < 80 else 'poly'}")
    (place / "labels.csv").write_text("\n".join(lines) + "\n")
    script.main("solar", tmp_path, tmp_path / "study")
    found = written(tmp_path / "study" / "solar")
    assert {name: len(held) for name, held in found.items()} == {"train": 88, "val": 32, "test": 40}
    for held in found.values():
        numbers = [int(Path(name).stem.removeprefix("cell")) for name in held]
        labels = ["defective" if number % 4 > 1 else "functional" for number in numbers]
        assert [name.partition("/")[0] for name in held] == labels
        assert sum(number < 80 for number in numbers) == len(numbers) / 2
        assert [sum(number % 4 == each for number in numbers) for each in range(4)] == [len(held) / 4] * 4
    assert not (tmp_path / "study" / "solar" / "boxes.json").exists()
    copied = tmp_path / "study" / "solar" / "train" / found["train"][0]
    assert copied.read_bytes() == (place / "images" / copied.name).read_bytes()
    (place / "labels.csv").write_text("images/cell0000.png 0.5 mono\n")
    with pytest.raises(SystemExit, match=r"probability must be one of .*; got '0.5'"):
        script.main("solar", tmp_path, tmp_path / "again")


def test_what_is_missing_or_there_already_is_said(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="needs one of emoji, clipart, fashion, solar"):
        script.main("birds", tmp_path, tmp_path)
    with pytest.raises(SystemExit, match=r"emoji\.json does not exist; the head of study_data\.py says"):
        script.main("emoji", tmp_path, tmp_path / "study")
    assert not list((tmp_path / "study").glob("[!.]*"))
    emoji(tmp_path)
    script.main("emoji", tmp_path, tmp_path / "study", share=0.01)
    with pytest.raises(SystemExit, match="is there already"):
        script.main("emoji", tmp_path, tmp_path / "study", share=0.01)
