"""The data set of tensors: keys, repeatability, bad pictures, masks."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tests.data.vision.pictures import CONFIG, truncate, write_folder, write_json
from toast.data.vision import PRESETS, VisionDataset, VisionSource, collate, open_vision, transforms

COUNT = 6


@pytest.fixture
def source(tmp_path: Path) -> VisionSource:
    return open_vision("folder", root=write_folder(tmp_path, {"a": 4, "b": 2}))


def training(source: VisionSource, seed: int = 0, augmented: bool = True, **options: Any) -> VisionDataset:
    transform = transforms(CONFIG, train=True, augment=PRESETS["randaugment"])
    return VisionDataset(source, transform, seed, augmented, **options)


def epochs(data: VisionDataset, wanted: list[int], workers: int = 0, batch: int = 4) -> dict[Any, Tensor]:
    """Pixels by epoch and index, through a loader."""
    keys = [(epoch, index) for epoch in wanted for index in torch.randperm(len(data)).tolist()]
    loader = DataLoader(data, batch, sampler=keys, num_workers=workers, collate_fn=collate)  # type: ignore[arg-type]
    pixels = torch.cat([batch["pixels"] for batch in loader])
    return dict(zip(keys, pixels, strict=True))


def assert_same(one: dict[Any, Tensor], other: dict[Any, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_items(source: VisionSource) -> None:
    item = training(source)[(3, 5)]
    assert item.keys() == {"pixels", "label", "index"}
    assert item["pixels"].shape == (3, 32, 32)
    assert (item["label"], item["index"]) == (1, 5)
    batch = collate([training(source)[i] for i in (5, 0)])
    assert batch.keys() == {"pixels", "labels", "index"}
    assert batch["pixels"].shape == (2, 3, 32, 32)
    assert batch["labels"].tolist() == [1, 0]
    assert batch["index"].tolist() == [5, 0]
    assert batch["labels"].dtype == batch["index"].dtype == torch.int64


def test_each_draw_is_another(source: VisionSource) -> None:
    data = training(source)
    drawn = [data[key]["pixels"] for key in ((0, 0), (1, 0), (2, 0))] + [training(source, 1)[0]["pixels"]]
    assert len({pixels.double().sum().item() for pixels in drawn}) == 4
    assert torch.equal(data[0]["pixels"], drawn[0])
    assert torch.equal(data[torch.tensor(0)]["pixels"], drawn[0])  # type: ignore[index]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_neither_workers_nor_order_nor_batches_matter(source: VisionSource, workers: int) -> None:
    wanted = {
        key: training(source)[key]["pixels"] for key in ((e, i) for e in range(2) for i in range(COUNT))
    }
    torch.manual_seed(workers)
    assert_same(epochs(training(source), [0, 1], workers, batch=3 + workers), wanted)


def test_resumption_does_not_matter(source: VisionSource) -> None:
    whole = epochs(training(source), [0, 1, 2])
    torch.manual_seed(9)
    resumed = epochs(pickle.loads(pickle.dumps(training(source))), [2])
    assert_same(resumed, {key: pixels for key, pixels in whole.items() if key[0] == 2})


def test_processes_do_not_matter(source: VisionSource) -> None:
    whole = epochs(training(source), [1])
    shares = {}
    for rank in range(2):
        torch.manual_seed(rank)
        keys = [(1, index) for index in range(rank, COUNT, 2)]
        shares |= {key: training(source)[key]["pixels"] for key in keys}
    assert_same(shares, whole)


def test_views_repeat(source: VisionSource) -> None:
    data = training(source, views=2)
    first, second, third = (data[(epoch, 3)]["pixels"] for epoch in range(3))
    assert torch.equal(first, third)
    assert not torch.equal(first, second)
    assert torch.equal(second, training(source)[(1, 3)]["pixels"])
    still = training(source, augmented=False)
    assert torch.equal(still[(7, 3)]["pixels"], still[3]["pixels"])


def test_the_callers_random_state_is_left_alone(source: VisionSource) -> None:
    data = training(source)
    state = torch.get_rng_state()
    data[(1, 2)]
    assert torch.equal(state, torch.get_rng_state())


def test_bad_pictures_are_left_out(source: VisionSource, tmp_path: Path) -> None:
    for name in ("a/01.png", "b/00.png"):
        truncate(tmp_path / name)
    data = training(source)
    item = data[1]
    assert item["bad"][0] == "a/01.png"
    assert "truncated" in item["bad"][1]
    assert item["index"] == 1
    batch = collate([data[i] for i in range(COUNT)])
    assert batch["index"].tolist() == [0, 2, 3, 5]
    assert [name for name, _ in batch["bad"]] == ["a/01.png", "b/00.png"]


def test_a_batch_of_bad_pictures_keeps_a_step(source: VisionSource, tmp_path: Path) -> None:
    for name in ("a/01.png", "b/00.png"):
        truncate(tmp_path / name)
    data = training(source)
    batch = collate([data[4], data[1]])
    assert torch.equal(batch["pixels"], torch.zeros(1, 3, 32, 32))
    assert batch["labels"].tolist() == [-100]
    assert batch["index"].tolist() == [4]
    assert len(batch["bad"]) == 2
    logits = torch.randn(1, 2, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum")
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()  # type: ignore[union-attr]


def test_targets(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": 2, "b": 1})
    write_json(tmp_path / "boxes.json", {"a/01.png": [5, 6, 30, 20]})
    source = open_vision("folder", root=tmp_path)
    transform = transforms(CONFIG, train=False)
    data = VisionDataset(source, transform, 0, augmented=False, with_targets=True)
    assert "target" not in data[0]
    assert torch.equal(data[1]["target"], transform.mask((5, 6, 30, 20), (40, 36)))
    batch = collate([data[0], data[1]])
    assert batch["target"].shape == (2, 32, 32)
    assert batch["target"][0].isnan().all()
    assert torch.equal(batch["target"][1], data[1]["target"])
    assert "target" not in collate([data[0], data[2]])
    assert "target" not in VisionDataset(source, transform, 0, augmented=False)[1]


def test_wrong_arguments(source: VisionSource) -> None:
    with pytest.raises(ValueError, match="views: at least 1"):
        training(source, views=0)
    with pytest.raises(ValueError, match="with_targets: a mask follows the geometry"):
        training(source, with_targets=True)
    for key in (COUNT, -1, (0, COUNT)):
        with pytest.raises(IndexError, match=f"pictures 0 to {COUNT - 1}; got"):
            training(source)[key]
