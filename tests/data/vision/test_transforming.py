"""Augmentation settings, transforms and masks."""

from __future__ import annotations

import random
import resource
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform

from tests.data.vision.pictures import CONFIG, picture
from toast.data.vision import PRESETS, Augmentation, transforms
from toast.data.vision.channels import channels_of, with_channels
from toast.data.vision.dataset import seeded

CROP_MODES = ("center", "squash", "border")
EVALUATION = create_transform(**CONFIG, is_training=False)


@pytest.fixture
def image() -> Iterator[Image.Image]:
    yield picture(3, (50, 40))


def draw(transform: Any, image: Image.Image, count: int) -> list[torch.Tensor]:
    """Several draws of a transform."""
    outs = []
    for seed in range(count):
        with seeded(seed):
            outs.append(transform(image))
    return outs


def test_presets() -> None:
    assert [name for name in PRESETS if PRESETS[name].is_none] == ["none"]
    assert [name for name in PRESETS if not PRESETS[name].moves] == ["none"]
    assert Augmentation.preset("flip") == Augmentation(hflip=0.5)
    assert not Augmentation(color_jitter=0.1).is_none
    assert not Augmentation(color_jitter=0.1).moves
    with pytest.raises(ValueError, match="presets are none, flip, crop-flip, randaugment; got 'mixup'"):
        Augmentation.preset("mixup")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale": (0.5, 0.2)}, "scale: two shares"),
        ({"scale": [0.5]}, "scale: two shares"),
        ({"hflip": 1.5}, "hflip: a probability"),
        ({"re_prob": -1}, "re_prob: a probability"),
        ({"color_jitter": -0.1}, "color_jitter: 0 or more"),
    ],
)
def test_wrong_settings(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**fields)


def test_a_scale_from_a_configuration_file() -> None:
    assert hash(Augmentation(scale=[0.1, 1])) == hash(Augmentation(scale=(0.1, 1)))  # type: ignore[arg-type]


def test_without_augmentation_training_is_evaluation(image: Image.Image) -> None:
    for transform in (
        transforms(CONFIG, train=True, augment=PRESETS["none"]),
        transforms(CONFIG, train=True),
        transforms(CONFIG, train=False, augment=PRESETS["randaugment"]),
    ):
        assert not transform.moves
        assert all(torch.equal(out, EVALUATION(image)) for out in draw(transform, image, 3))


def test_a_flip_is_a_flip(image: Image.Image) -> None:
    plain = EVALUATION(image)
    mirrored = plain.flip(-1)
    outs = draw(transforms(CONFIG, train=True, augment=PRESETS["flip"]), image, 40)
    straight = sum(torch.equal(out, plain) for out in outs)
    assert straight + sum(torch.equal(out, mirrored) for out in outs) == 40
    assert 8 < straight < 32


def test_random_crops_are_timms(image: Image.Image) -> None:
    augment = Augmentation(scale=(0.3, 0.6), hflip=0.5, color_jitter=0.3, re_prob=0.5)
    ours = draw(transforms(CONFIG, train=True, augment=augment), image, 8)
    theirs = create_transform(
        **CONFIG, is_training=True, scale=(0.3, 0.6), hflip=0.5, color_jitter=0.3, re_prob=0.5
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, draw(theirs, image, 8), strict=True))
    assert len({out.sum().item() for out in ours}) == 8


def test_colour_alone_leaves_the_place(image: Image.Image) -> None:
    transform = transforms(CONFIG, train=True, augment=Augmentation(color_jitter=0.5))
    assert not transform.moves
    flat = Image.new("RGB", (40, 40), (120, 60, 30))
    flat.paste((200, 180, 90), (0, 0, 20, 40))
    out = draw(transform, flat, 1)[0]
    edge = (out[:, :, 1:] - out[:, :, :-1]).abs().sum((0, 1)).argmax()
    assert edge == 15  # between the two halves, as in evaluation
    assert not torch.equal(out, EVALUATION(flat))


@pytest.mark.parametrize("augment", PRESETS.values(), ids=PRESETS)
def test_shapes(image: Image.Image, augment: Augmentation) -> None:
    out = draw(transforms(CONFIG, train=True, augment=augment), image, 1)[0]
    assert out.shape == (3, 32, 32)
    assert out.dtype == torch.float32


@pytest.mark.parametrize("mode", CROP_MODES)
@pytest.mark.parametrize("size", [(50, 40), (30, 70), (32, 32)])
@pytest.mark.parametrize("input_size", [(3, 32, 32), (3, 24, 40)])
def test_a_mask_lies_over_the_pixels(mode: str, size: tuple[int, int], input_size: Any) -> None:
    """A white rectangle on black, taken through the evaluation transform, is its own mask."""
    config = CONFIG | {"crop_mode": mode, "input_size": input_size, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    box = (7, 11, 21, 25)
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), box)
    transform = transforms(config, train=False)
    mask = transform.mask(box, size)
    assert mask.shape == input_size[1:]
    torch.testing.assert_close(mask, transform(image)[1], rtol=0, atol=0)
    assert mask.any() or (mode, size) == ("center", (30, 70))  # there the box is cropped away
    # what pads the picture with the mean's colour does not show in the mask
    padded = transforms(CONFIG | {"crop_mode": mode, "input_size": input_size}, train=False)
    torch.testing.assert_close(padded.mask(box, size), mask, rtol=0, atol=0)


def test_a_mask_of_fractions() -> None:
    config = CONFIG | {"crop_pct": 1.0, "input_size": (3, 8, 8)}
    mask = transforms(config, train=False).mask((1.25, 2, 3.5, 100), (8, 8))
    expected = np.zeros((8, 8))
    expected[2:, 1:4] = [0.75, 1, 0.5]
    np.testing.assert_allclose(mask.numpy(), expected, atol=1 / 255)


def test_the_random_state_goes_on_as_before() -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    wanted = random.random(), np.random.rand(), torch.rand(()).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with seeded(5, 6):
        first = random.random(), np.random.rand(), torch.rand(()).item()
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == wanted
    with pytest.raises(KeyError), seeded(5, 6):
        assert (random.random(), np.random.rand(), torch.rand(()).item()) == first
        raise KeyError
    with seeded(56):
        assert random.random() != first[0]


@pytest.mark.parametrize("augment", PRESETS.values(), ids=PRESETS)
def test_a_model_of_one_channel_gets_grey_pictures(image: Image.Image, augment: Augmentation) -> None:
    config = with_channels(CONFIG, 1)
    assert config["input_size"] == (1, 32, 32)
    assert config["mean"] + config["std"] == pytest.approx((0.4, 0.25))
    transform = transforms(config, train=True, augment=augment)
    assert draw(transform, image, 1)[0].shape == (1, 32, 32)
    flat = Image.new("RGB", (40, 40), (200, 100, 50))
    grey = (0.299 * 200 + 0.587 * 100 + 0.114 * 50) / 255
    plain = transforms(config | {"crop_mode": "border"}, train=False)(flat)
    assert plain.mean().item() == pytest.approx((grey - 0.4) / 0.25, abs=0.02)
    assert transform.mask((0, 0, 40, 40), (40, 40)).min() == 1


def test_other_numbers_of_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"takes 4 channels; pictures have 3, .* or 1, grey"):
        transforms(with_channels(CONFIG, 4), train=False)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_channels_of_a_model(channels: int) -> None:
    model = timm.create_model("test_vit", pretrained=False, in_chans=channels)
    assert channels_of(model) == channels
    assert channels_of(torch.nn.Linear(2, 2)) == 3


@pytest.mark.parametrize("mode", CROP_MODES)
@pytest.mark.parametrize("size", [(100_000, 2), (2, 100_000), (1, 1)])
def test_an_elongated_picture_needs_little_memory(mode: str, size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (10, 20, 30))
    config = CONFIG | {"crop_mode": mode, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    transform = transforms(config, train=True, augment=PRESETS["flip"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = transform(image)
    assert out.shape == (3, 32, 32)
    assert out[:, 16, 16].tolist() == pytest.approx([10 / 255, 20 / 255, 30 / 255], abs=0.01)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB
