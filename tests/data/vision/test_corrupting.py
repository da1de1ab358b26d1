"""Corruptions against ImageNet-C's definitions; a picture is made worse in the same way every time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.data.vision.pictures import CONFIG, truncate, write_folder, write_json
from toast.data.vision import CORRUPTIONS, Corrupted, VisionDataset, collate, open_vision, transforms
from toast.data.vision.corrupting import corrupt

MEAN, STD = (torch.tensor(CONFIG[name]).view(3, 1, 1) for name in ("mean", "std"))


@pytest.fixture
def plain(tmp_path: Path) -> VisionDataset:
    root = write_folder(tmp_path, {"a": 3, "b": 1})
    write_json(root / "boxes.json", {"a/00.png": [0, 0, 20, 20]})
    return VisionDataset(
        open_vision("folder", root=root), transforms(CONFIG, train=False), 0, False, with_targets=True
    )


def corrupted(plain: VisionDataset, name: str, severity: int = 3) -> Corrupted:
    return Corrupted(plain, name, severity, CONFIG["mean"], CONFIG["std"])


def picture(side: int = 224) -> Tensor:
    return torch.rand(3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("severity", "deviation"), [(1, 0.08), (2, 0.12), (3, 0.18), (4, 0.26), (5, 0.38)])
def test_noise_has_its_deviation(severity: int, deviation: float) -> None:
    """Its quantiles at one deviation: what is cut off at 0 and 1 lies beyond."""
    torch.manual_seed(0)
    found = corrupt(torch.full((3, 224, 224), 0.5), "noise", severity).flatten()
    normal = torch.distributions.Normal(0.5, deviation)
    shares = normal.cdf(torch.tensor([0.5 - deviation, 0.5 + deviation]))
    low, high = (float(found.kthvalue(int(share * len(found))).values) for share in shares)
    assert (high - low) / 2 == pytest.approx(deviation, rel=0.01)
    assert (high + low) / 2 == pytest.approx(0.5, abs=0.003)


@pytest.mark.parametrize(("severity", "factor"), [(1, 0.4), (2, 0.3), (3, 0.2), (4, 0.1), (5, 0.05)])
def test_contrast_pulls_each_channel_to_its_mean(severity: int, factor: float) -> None:
    x = picture() * torch.tensor([0.5, 1, 0.2]).view(3, 1, 1)
    expected = factor * x + (1 - factor) * x.mean((1, 2), keepdim=True)
    torch.testing.assert_close(corrupt(x, "contrast", severity), expected)


@pytest.mark.parametrize(
    ("side", "severity", "deviation"), [(224, 1, 1), (224, 5, 6), (112, 3, 1.5), (448, 2, 4)]
)
def test_blur_spreads_a_point_as_the_size_says(side: int, severity: int, deviation: float) -> None:
    point = torch.zeros(3, side, side)
    point[:, side // 2, side // 2] = 1
    found = corrupt(point, "blur", severity)[0]
    places = torch.arange(side) - side // 2
    assert float(found.sum()) == pytest.approx(1, abs=1e-5)
    assert float((found.sum(0) * places**2).sum()) ** 0.5 == pytest.approx(deviation, rel=0.01)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_results_are_pictures_of_any_size(name: str) -> None:
    for side, severity in ((224, 1), (16, 1), (16, 5), (2, 5)):
        found = corrupt(picture(side).round(), name, severity)
        assert found.shape == (3, side, side)
        assert found.min() >= 0
        assert found.max() <= 1


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_pixels_of_a_data_set_are_corrupted_before_they_are_normalised(
    plain: VisionDataset, name: str
) -> None:
    data = corrupted(plain, name)
    item, other = data[0], plain[0]
    assert len(data) == 4
    assert torch.equal(item["target"], other["target"])
    assert (item["label"], item["index"]) == (other["label"], 0)
    shown = item["pixels"] * STD + MEAN
    if name != "noise":
        expected = corrupt(other["pixels"] * STD + MEAN, name, 3)
        torch.testing.assert_close(shown, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(item["pixels"], other["pixels"], atol=0.01)
    assert shown.min() > -1e-6
    assert shown.max() < 1 + 1e-6


def test_noise_depends_on_seed_and_index_alone(plain: VisionDataset) -> None:
    def noise(index: int, severity: int = 1) -> Tensor:
        return (corrupted(plain, "noise", severity)[index]["pixels"] - plain[index]["pixels"]) * STD

    state = torch.get_rng_state()
    first = [noise(index) for index in range(4)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert all(torch.equal(noise(index), first[index]) for index in (3, 1, 0, 2))
    assert not torch.allclose(first[0], first[1], atol=0.01)
    plain.seed = 1
    assert not torch.allclose(noise(0), first[0], atol=0.01)


def test_a_bad_picture_stays_one(plain: VisionDataset, tmp_path: Path) -> None:
    truncate(tmp_path / "a" / "01.png")
    data = corrupted(plain, "noise")
    assert collate([data[index] for index in range(4)])["bad"] == [data[1]["bad"]]


def test_what_is_not_there_is_refused(plain: VisionDataset) -> None:
    with pytest.raises(ValueError, match="corruption: needs one of noise, blur, contrast; got 'fog'"):
        corrupt(picture(8), "fog", 1)
    with pytest.raises(ValueError, match="severity of blur: needs 1 to 5; got 0"):
        corrupt(picture(8), "blur", 0)
    with pytest.raises(ValueError, match="severity of noise: needs 1 to 5; got 6"):
        corrupted(plain, "noise", 6)
