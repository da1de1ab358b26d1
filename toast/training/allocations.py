"""Which memory a computation takes and gives back, seen at the operators that PyTorch dispatches.

It works on tensors with and without memory (`FakeTensor`) alike, so a step can be measured before it fits.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: What is held of a number of bytes that grows with the batch: the part that does not, and that of a sample.
Part = tuple[float, float]


@dataclass
class Timeline:
    """How much was held after each operator: `fixed + samples * sample + gradients` bytes.

    Args:
        fixed: What does not depend on the batch.
        sample: What each sample adds.
        gradients: Gradients of parameters.
    """

    fixed: list[float] = field(default_factory=list)
    sample: list[float] = field(default_factory=list)
    gradients: list[float] = field(default_factory=list)

    def peak(self, samples: float, share: float = 1.0, held: float | None = None) -> float:
        """Returns the most bytes that are held at a time.

        Args:
            samples: Samples of the batch.
            share: Share of the gradients that this process holds.
            held: Bytes of gradients that are held all the time; None are those of the moment.
        """
        fixed, sample, gradients = self._columns(share, held)
        return float((fixed + samples * sample + gradients).max()) if len(fixed) else 0.0

    def most_samples(self, room: float, share: float = 1.0, held: float | None = None) -> int | None:
        """Returns how many samples fit into a number of bytes; None if their number does not matter.

        Args:
            room: The bytes.
            share: As in `peak`.
            held: As in `peak`.
        """
        fixed, sample, gradients = self._columns(share, held)
        left = room - fixed - gradients
        if len(left) and bool((left < 0).any()):
            return 0
        grows = sample > 0
        return int((left[grows] / sample[grows]).min()) if bool(grows.any()) else None

    def _columns(self, share: float, held: float | None) -> tuple[Tensor, Tensor, Tensor]:
        fixed, sample, gradients = (
            torch.tensor(column, dtype=torch.float64) for column in (self.fixed, self.sample, self.gradients)
        )
        return fixed, sample, gradients * share if held is None else torch.full_like(gradients, held)


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every storage that operators make, from its making to its end.

    Args:
        known: Tensors that are not counted: parameters, buffers.
        label: Says what a storage is made for, when it is made.
        batch: A number of samples that divides no other size of the computation: a storage whose size it
            divides grows with the batch. 0 tells none apart.
        also: Is called with every operator, its arguments and what it gives.

    Attributes:
        timeline: What was held after each operator.
    """

    def __init__(
        self,
        known: Iterable[Tensor] = (),
        label: Callable[[], str] = lambda: "",
        batch: int = 0,
        also: Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.label = label
        self.batch = batch
        self.also = also
        self.timeline = Timeline()
        self._ignored = {t.untyped_storage()._cdata for t in known}
        self._alive: dict[int, tuple[weakref.ref[Any], int, str]] = {}
        self._held: dict[str, int] = {}
        self._growing: dict[str, int] = {}
        self._all = self._all_growing = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operator and notes what it has made."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.also is not None:
            self.also(func, args, kwargs, out)
        made = False
        for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            made |= isinstance(leaf, Tensor) and self.note(leaf)
        if made:
            self._mark()
        return out

    def note(self, tensor: Tensor) -> bool:
        """Counts the storage of a tensor from now on; False if it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or key in self._ignored:
            return False
        size, label = storage.nbytes(), self.label()
        self._alive[key] = weakref.ref(storage, lambda _: self._drop(key)), size, label
        self._add(size, label)
        return True

    def as_gradient(self, tensor: Tensor) -> None:
        """Counts a tensor as a gradient of a parameter from now on."""
        key = tensor.untyped_storage()._cdata
        reference, size, label = self._alive[key]
        if label != GRADIENT:
            self._add(-size, label)
            self._add(size, GRADIENT)
            self._alive[key] = reference, size, GRADIENT
            self._mark()

    def held(self) -> dict[str, Part]:
        """Returns what is held now, by label: fixed bytes, and bytes a sample."""
        found = {}
        for label, size in self._held.items():
            growing = self._growing.get(label, 0)
            if size:
                found[label] = float(size - growing), growing / max(1, self.batch)
        return found

    @property
    def bytes_held(self) -> int:
        """All bytes that are held now."""
        return self._all

    def _add(self, size: int, label: str) -> None:
        self._held[label] = self._held.get(label, 0) + size
        self._all += size
        if self.batch and size % self.batch == 0 and label != GRADIENT:
            self._growing[label] = self._growing.get(label, 0) + size
            self._all_growing += size

    def _drop(self, key: int) -> None:
        _, size, label = self._alive.pop(key)
        self._add(-size, label)

    def _mark(self) -> None:
        gradients = self._held.get(GRADIENT, 0)
        self.timeline.fixed.append(self._all - gradients - self._all_growing)
        self.timeline.sample.append(self._all_growing / max(1, self.batch))
        self.timeline.gradients.append(gradients)


#: Label of gradients of parameters.
GRADIENT = "gradients"
