"""A source as a map-style data set of tensors, where augmentation is a function of seed, epoch and index."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from toast.data.vision.source import BadSample, VisionSource
from toast.data.vision.transforming import Transform

IGNORED = -100
"""Label of a row that no loss counts: what `torch.nn.functional.cross_entropy` leaves out."""


class VisionDataset(Dataset[dict[str, Any]]):
    """The pictures of a source as tensors.

    Keys are indices, or pairs `(epoch, index)`, which a sampler yields; an index alone is of epoch 0. What is
    drawn for a picture depends on the seed, the epoch and the index alone. So neither the order of the
    pictures, nor the number of workers or processes, nor a resumption in the middle of an epoch changes it.

    Args:
        source: The pictures.
        transform: Maps a picture in mode RGB to a tensor `(channels, height, width)`, such as `transforms`
            builds.
        seed: Seed of the augmentation.
        augmented: Whether epochs differ; else every epoch is epoch 0.
        views: Number of different augmentations of each picture, which then repeat; None is no limit.
        with_targets: Whether to add masks of the boxes.
        labels: Float `(pictures, columns)`, instead of the source's own labels.

    Raises:
        ValueError: If `views` is not positive, or masks are asked for that would not lie over the pixels.
    """

    def __init__(
        self,
        source: VisionSource,
        transform: Callable[[Image.Image], Tensor],
        seed: int,
        augmented: bool,
        views: int | None = None,
        with_targets: bool = False,
        labels: Tensor | None = None,
    ) -> None:
        if views is not None and views < 1:
            raise ValueError(f"views: at least 1, or None for a new one every epoch; got {views}.")
        if with_targets and (not isinstance(transform, Transform) or transform.moves):
            raise ValueError(
                "with_targets: a mask follows the geometry of the evaluation transform; got a transform that "
                "moves the object. Use transforms(..., train=False)."
            )
        self.source = source
        self.transform = transform
        self.seed = seed
        self.augmented = augmented
        self.views = views
        self.with_targets = with_targets
        self.labels = labels

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        """Prepares one picture.

        Args:
            key: `(epoch, index)`, or the index.

        Returns:
            `pixels`, float `(channels, height, width)`; `label`; `index`; with targets, and where the box is
            known, `target`, float `(height, width)`, 0 to 1; `notes`, names with what was met, if anything
            was. Of a picture that cannot be decoded `bad`, its name and the reason, with `index`, the
            `shape` that its pixels would have had, and a `label` that no loss counts.

        Raises:
            IndexError: If there is no such picture.
        """
        epoch, index = (int(part) for part in key) if isinstance(key, tuple) else (0, int(key))
        if not 0 <= index < len(self):
            raise IndexError(f"{self.source.name} has pictures 0 to {len(self) - 1}; got {index}.")
        try:
            sample = self.source[index]
        except BadSample as bad:
            none = IGNORED if self.labels is None else torch.full_like(self.labels[index], torch.nan)
            return {"bad": (bad.name, bad.reason), "index": index, "shape": self._shape(), "label": none}
        label = sample.label if self.labels is None else self.labels[index]
        with seeded(self.seed, self._view(epoch), index):
            item: dict[str, Any] = {"pixels": self.transform(sample.image), "label": label, "index": index}
        if self.with_targets and sample.box is not None:
            assert isinstance(self.transform, Transform)
            item["target"] = self.transform.mask(sample.box, sample.image.size)
        if sample.notes:
            item["notes"] = [(sample.name, note) for note in sample.notes]
        return item

    def _view(self, epoch: int) -> int:
        """Returns which of a picture's augmentations an epoch sees."""
        if not self.augmented:
            return 0
        return epoch if self.views is None else epoch % self.views

    def _shape(self) -> tuple[int, ...]:
        """Returns the shape of any picture's pixels: that of a blank one."""
        with seeded(self.seed, 0, 0):
            return tuple(self.transform(Image.new("RGB", (64, 64))).shape)


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Lets Python's, NumPy's and PyTorch's CPU generators start from a hash of numbers, then go on as before.

    Other devices' generators are not touched, which `torch.manual_seed` would do.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(digest)
    np.random.seed(np.frombuffer(digest, np.uint32))
    torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stacks the items of a batch and leaves out those that could not be decoded.

    If none could, one blank picture stays whose label no loss counts, so that every process has a step.

    Args:
        items: What `VisionDataset` returns.

    Returns:
        `pixels` `(batch, channels, height, width)`, `labels` and `index` `(batch,)`, int64 (labels of heads
        float, `(batch, columns)`); `target`
        `(batch, height, width)` if an item has one, NaN for those without; `bad`, names and reasons, and
        `notes`, names and what was met, if there are any.
    """
    bad = [item for item in items if "bad" in item]
    good = [item for item in items if "bad" not in item]
    if not good:
        blank = torch.zeros(bad[0]["shape"])
        good = [{"pixels": blank, "label": bad[0].get("label", IGNORED), "index": bad[0]["index"]}]
    batch: dict[str, Any] = {
        "pixels": torch.stack([item["pixels"] for item in good]),
        "labels": _stacked([item["label"] for item in good]),
        "index": torch.tensor([item["index"] for item in good], dtype=torch.int64),
    }
    if any("target" in item for item in good):
        unknown = torch.full(batch["pixels"].shape[-2:], torch.nan)
        batch["target"] = torch.stack([item.get("target", unknown) for item in good])
    notes = [note for item in good for note in item.get("notes", [])]
    if notes:
        batch["notes"] = notes
    if bad:
        batch["bad"] = [item["bad"] for item in bad]
    return batch


def _stacked(labels: Sequence[int | Tensor]) -> Tensor:
    columns = [label for label in labels if isinstance(label, Tensor)]
    return torch.stack(columns) if columns else torch.tensor(labels, dtype=torch.int64)
