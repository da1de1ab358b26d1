"""Pictures of two objects: the same for both label sets, with nothing shared between the parts."""

from __future__ import annotations

import itertools

import pytest
import torch

from toast.embedded import two_objects
from toast.embedded.task import CLASSES, load_materials
from toast.embedded.two_objects import kinds, load_two_objects


def test_both_label_sets_are_of_the_same_pictures() -> None:
    item, clipart = (load_two_objects("train", 90, labels, 2) for labels in two_objects.LABELS)
    assert torch.equal(item.images, clipart.images)
    assert torch.equal(item.labels.bincount(), torch.full((10,), 9))
    assert torch.equal(clipart.labels.bincount(), torch.full((len(kinds()),), 10))
    pairs = {*zip(item.labels.tolist(), clipart.labels.tolist(), strict=True)}
    assert len(pairs) > 45  # of 90: the one label says nothing about the other


def test_boxes_are_of_comparable_size_and_do_not_touch() -> None:
    item, clipart = (load_two_objects("test", 100, labels).boxes for labels in two_objects.LABELS)
    for boxes, least, most in ((item, 40, 44), (clipart, 42, 50)):
        longer = (boxes[:, 2:] - boxes[:, :2]).amax(1)
        assert (boxes.min() >= 0, boxes.max() <= 112) == (True, True)
        assert (longer.min() >= least, longer.max() <= most) == (True, True)
    across = torch.minimum(item[:, 2], clipart[:, 2]) - torch.maximum(item[:, 0], clipart[:, 0])
    down = torch.minimum(item[:, 3], clipart[:, 3]) - torch.maximum(item[:, 1], clipart[:, 1])
    assert ((across <= 0) | (down <= 0)).all()


def test_the_seed_decides() -> None:
    first, again, other = (load_two_objects("val", 20, "item", seed) for seed in (3, 3, 4))
    two_objects._composed.cache_clear()
    fresh = load_two_objects("val", 20, "item", 3)
    for one in (again, fresh):
        assert torch.equal(first.images, one.images)
        assert torch.equal(first.boxes, one.boxes)
    assert not torch.equal(first.images, other.images)
    more = load_two_objects("val", 20, "item", 3, distractors=5)
    assert not torch.equal(first.images, more.images)


def test_parts_share_nothing() -> None:
    materials = load_materials()
    items, sprites = {}, {}
    for part, (of_items, of_sprites, _) in two_objects._MATERIALS.items():
        rows = two_objects._items_by_class(part, materials.labels[of_items].numpy())
        items[part] = {bytes(materials.items[of_items][row].numpy()) for each in rows for row in each}
        sprites[part] = {sprite.tobytes() for sprite in materials.sprites[of_sprites]}
    assert {part: len(held) for part, held in items.items()} == {"train": 2500, "val": 500, "test": 1000}
    for one, other in itertools.combinations(items, 2):
        assert not items[one] & items[other]
        assert not sprites[one] & sprites[other]


def test_every_kind_has_clip_art_everywhere() -> None:
    assert len(kinds()) == 9
    assert not set(kinds()) & set(CLASSES)
    for part in ("train", "val", "test"):
        assert load_two_objects(part, 18, "clipart").labels.unique().numel() == 9


def test_wrong_requests() -> None:
    with pytest.raises(ValueError, match="labels: needs one of item, clipart; got 'both'"):
        load_two_objects("train", 10, "both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="part: needs one of train, val, test; got 'generic'"):
        load_two_objects("generic", 10, "item")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="501 val pictures are asked for; needs 1 to 500"):
        load_two_objects("val", 501, "item")
    with pytest.raises(ValueError, match="distractors: needs 0 to 124; got 125"):
        load_two_objects("test", 10, "item", distractors=125)
