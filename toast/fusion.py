"""What an adapter's fused matrix (`toast.fuse`) was made of, and whether that has changed since."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from toast.compiled import is_transformed
from toast.families.layouts import is_plain

#: What stands before the adapter's name in the name of the buffer that holds its fused matrix.
FUSED = "fused_"


class Fusion:
    """What is known of an adapter's fused matrix (`toast.fuse`) since it was made.

    Args:
        with_values: Whether W_V is part of it. A weight that is quantised or traced afterwards would say
            something else if it were asked in each call.
        made_of: The weights that it was computed from: the adapter's, then the base's.
    """

    def __init__(self, with_values: bool, made_of: Iterable[Tensor]) -> None:
        self.with_values = with_values
        self.replaced = False  # whether other weights were loaded since
        weights = list(made_of)
        self._versions = [_version(weight) for weight in weights]
        self._samples = [_sample(weight).clone() for weight in weights]
        self._kept: tuple[Any, Tensor] | None = None

    def is_stale(self, made_of: Iterable[Tensor]) -> bool:
        """Whether a weight is another than it was.

        PyTorch counts what is written, but not by fused optimisers nor through `.data`, so a few values are
        compared, too. A weight of another precision, or one that is quantised, was right.

        Args:
            made_of: The weights as they are now.
        """
        if self.replaced or is_transformed():  # what is traced has no values
            return self.replaced
        weights = list(made_of)
        now: list[Tensor] = []
        then: list[Tensor] = []
        with torch.no_grad():
            for weight, version, sample in zip(weights, self._versions, self._samples, strict=True):
                if not _is_readable(weight):
                    continue
                if version is not None and not weight.is_inference() and weight._version != version:
                    return True
                if weight.dtype == sample.dtype:
                    now.append(_sample(weight))
                    then.append(sample)
            return bool(now) and not torch.equal(_joined(now), self._joined(then, now[0].device))

    def _joined(self, samples: list[Tensor], device: torch.device) -> Tensor:
        """Returns samples in one piece on a device; kept, as it is asked for in every call."""
        key = ([id(sample) for sample in samples], device)
        kept = self._kept
        if kept is not None and kept[0] == key:
            return kept[1]
        joined = torch.cat([sample.to(device) for sample in samples])
        if type(joined) is Tensor:  # and none that stands for another while a program is traced
            self._kept = key, joined
        return joined

    def __deepcopy__(self, memo: dict[int, Any]) -> Fusion:
        return _copied(self.with_values, self.replaced, self._samples)

    def __reduce__(self) -> tuple[Any, ...]:
        return _copied, (self.with_values, self.replaced, self._samples)


def _copied(with_values: bool, replaced: bool, samples: list[Tensor]) -> Fusion:
    """Returns what is known of the matrix of a copied model, whose weights count their writes anew."""
    fusion = Fusion(with_values, [])
    fusion.replaced = replaced
    fusion._versions, fusion._samples = [None] * len(samples), samples
    return fusion


def _version(weight: Tensor) -> int | None:
    """Returns how often a tensor was written to; None of one that does not count."""
    return None if weight.is_inference() or not _is_readable(weight) else weight._version


def _is_readable(weight: Tensor) -> bool:
    return is_plain(weight) and not weight.is_meta


def _sample(weight: Tensor) -> Tensor:
    """Returns a few values of a weight: where it lies in one piece, in place, which takes one operation."""
    count = weight.numel()
    step = max(1, count // 8)
    if weight.is_contiguous():
        return weight.detach().as_strided((-(-count // step),), (step,))
    return weight.detach().reshape(-1)[::step]


def _joined(samples: list[Tensor]) -> Tensor:
    """Returns samples in one piece, on the device of the first: blocks may be on several."""
    device = samples[0].device
    return torch.cat([sample if sample.device == device else sample.to(device) for sample in samples])
