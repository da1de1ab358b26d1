"""The demonstration's pictures: sizes, truth, determinism and disjoint splits."""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path

import pytest
import torch

from toast.embedded import task
from toast.embedded.backbone import MEAN, STD
from toast.embedded.task import (
    CLASSES,
    Pictures,
    cut_out,
    load_generic,
    load_materials,
    load_task,
    normalise,
)

ASSETS = Path(str(resources.files("toast.embedded"))) / "assets"


@pytest.fixture(scope="module")
def pictures() -> tuple[Pictures, Pictures]:
    return load_task(120, 60)


def test_size_on_disk() -> None:
    assert (ASSETS / "task.safetensors").stat().st_size < 5e6


def test_shapes_and_ranges(pictures: tuple[Pictures, Pictures]) -> None:
    for part, count in zip(pictures, (120, 60), strict=True):
        assert part.images.shape == (count, 3, 112, 112)
        assert part.images.dtype == torch.uint8
        assert part.labels.dtype == part.boxes.dtype == torch.int64
        assert torch.equal(part.labels.bincount(), torch.full((10,), count // 10))
        assert len(part) == count
        assert part.boxes.min() >= 0
        assert part.boxes.max() <= 112


def test_share_of_the_area(pictures: tuple[Pictures, Pictures]) -> None:
    width, height = (pictures[0].boxes[:, 2:] - pictures[0].boxes[:, :2]).unbind(1)
    assert width.min() >= 40
    assert width.max() <= 44
    assert torch.equal(width, height)
    assert float((width * height / 112**2).float().mean()) == pytest.approx(0.14, abs=0.01)


def test_the_item_is_in_its_box() -> None:
    """Two pictures that differ in the item alone would differ in the box alone: its middle is not ground."""
    part, _ = load_task(200, 10)
    changed = 0
    for image, (x0, y0, x1, y1) in zip(part.images, part.boxes.tolist(), strict=True):
        inside = image[:, y0:y1, x0:x1].float()
        changed += int(inside.std(dim=(1, 2)).mean() > 8)
    assert changed > 190


def test_same_seed_same_pictures() -> None:
    first, second, other = load_task(20, 20, 3), load_task(20, 20, 3), load_task(20, 20, 4)
    for a, b, c in zip(first, second, other, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.boxes, b.boxes)
        assert not torch.equal(a.images, c.images)
    assert torch.equal(load_generic(20, 3).images, load_generic(20, 3).images)
    assert not torch.equal(load_generic(20, 3).images, load_generic(20, 4).images)


def test_pictures_are_those_of_earlier_versions() -> None:
    """Figures that were published are of these pictures."""
    prints = []
    for part in (*load_task(30, 20, 3), load_generic(40, 1)):
        digest = hashlib.sha256()
        for tensor in (part.images, part.labels, part.boxes):
            digest.update(tensor.contiguous().numpy().tobytes())
        prints.append(digest.hexdigest()[:16])
    assert prints == ["6c10cefe36698668", "091a35a7660b988d", "b72ff30ece507b2d"]


@pytest.mark.parametrize("distractors", [0, 8])
def test_the_number_of_distractors(distractors: int) -> None:
    few, many = load_task(20, 20, 0, 1), load_task(20, 20, 0, distractors)
    for one, other in zip(few, many, strict=True):
        assert torch.equal(one.labels.bincount(), other.labels.bincount())
        assert not torch.equal(one.images, other.images)
    with pytest.raises(ValueError, match="distractors: needs 0 to 144; got -1"):
        load_task(10, 10, 0, -1)


def test_global_random_state_is_left_alone() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    load_task(10, 10)
    assert torch.equal(state, torch.get_rng_state())


def test_splits_are_disjoint() -> None:
    materials = load_materials()
    prints = {
        split: {hashlib.sha256(sprite.tobytes()).digest() for sprite in sprites}
        for split, sprites in materials.sprites.items()
    }
    assert all(len(prints[split]) == len(materials.sprites[split]) > 100 for split in prints)
    assert not prints["train"] & prints["test"]
    assert not prints["train"] & prints["pretune"]
    assert not prints["test"] & prints["pretune"]
    train, test = ({bytes(item.numpy().tobytes()) for item in materials.items[s]} for s in ("train", "test"))
    assert not train & test


def test_no_clothing_among_the_distractors() -> None:
    assert not [name for name in load_materials().folders if "cloth" in name]


def test_generic_pictures() -> None:
    part = load_generic(100)
    folders = load_materials().folders
    assert part.images.shape == (100, 3, 112, 112)
    assert torch.equal(part.labels.bincount(minlength=len(folders)), torch.full((20,), 5))
    longer = (part.boxes[:, 2:] - part.boxes[:, :2]).amax(1)
    assert longer.min() >= 46
    assert longer.max() <= 58


def test_too_many_pictures() -> None:
    with pytest.raises(ValueError, match="1001 test pictures"):
        load_task(10, 1001)


def test_normalise() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 2, 2)
    out = normalise(images)
    assert out.dtype == torch.float32
    low = torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)])
    high = torch.tensor([(1 - m) / s for m, s in zip(MEAN, STD, strict=True)])
    torch.testing.assert_close(out[0, :, 0, 0], low)
    torch.testing.assert_close(out[1, :, 1, 1], high)


def test_cut_out_keeps_dark_spots_inside() -> None:
    item = torch.zeros(1, 28, 28, dtype=torch.uint8)
    item[0, 8:20, 8:20] = 200
    item[0, 12:15, 12:15] = 0
    shape = cut_out(item)
    assert torch.equal(shape[0] > 0, torch.nn.functional.pad(torch.ones(12, 12), (8, 8, 8, 8)) > 0)


def test_damaged_materials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "assets").mkdir()
    whole = (ASSETS / "task.safetensors").read_bytes()
    (tmp_path / "assets" / "task.safetensors").write_bytes(whole[: len(whole) // 2])
    monkeypatch.setattr(task.resources, "files", lambda _: tmp_path)
    with pytest.raises(ValueError, match="cannot be read"):
        task.load_materials.__wrapped__()


def test_class_names() -> None:
    assert len(set(CLASSES)) == 10
