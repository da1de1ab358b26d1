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
        self._samples = [_sample(weight) for weight in weights]

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
        if any(
            version is not None and _version(weight) not in (version, None)
            for weight, version in zip(weights, self._versions, strict=True)
        ):
            return True
        now: list[Tensor] = []
        then: list[Tensor] = []
        for weight, sample in zip(weights, self._samples, strict=True):
            if _is_readable(weight) and weight.dtype == sample.dtype:
                place = now[0].device if now else weight.device  # blocks may be on several
                now.append(_sample(weight).to(place))
                then.append(sample.to(place))
        return bool(now) and not torch.equal(torch.cat(now), torch.cat(then))

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
    """Returns a few values of a weight, copied."""
    flat = weight.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // 8)].clone()
