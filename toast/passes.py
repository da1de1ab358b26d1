"""One pass of one call: what the layers of a model may know of it, and who observes it.

Signals belong to the call: they are never kept on a module.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from toast.adapter import Adapter
from toast.families.anatomy import Unit
from toast.signals import Selection, Signal


class Observer:
    """Observes the two passes of a call; `toast.trace` makes one. Does nothing by itself."""

    wants_states = False
    replaces_signals = False  # the call is an experiment: it is none that the model starts from

    def on_block(self, number: int, unit: Unit) -> None:
        """The value projection of a block is about to run, in pass 1 or 2."""

    def on_states(self, number: int, index: int, state: Tensor) -> None:
        """What enters a unit, in pass 1 or 2; under the number of units, what leaves the last block.

        Channels last. Only if `wants_states`.
        """

    def on_signals(self, signals: dict[int, Signal]) -> dict[int, Signal]:
        """Signals were computed, by number of the unit; what is returned is what the second pass gets."""
        return signals

    def on_selection(self, selection: Selection) -> None:
        """Features were selected, and are fed back."""

    def on_output(self, number: int, output: Any) -> None:
        """The trunk returned, in pass 1 or 2."""


class Pass:
    """What the layers of a model may know of the pass that runs.

    Args:
        owner: The `Steering` of the model that runs.
        number: 1 or 2; 0 where the plain model runs because no adapter is active.
        adapter: The adapter of the call; None in the plain model.
        signals: By number of the unit, its top-down signal; none in pass 1.
        reads: The selector that leaves the features here; None in the second pass.
        observer: Is called at every block, if there is one.
        once: How many of the lowest blocks run in the first pass only.
        known: What the highest of them gave.
    """

    def __init__(
        self,
        owner: object,
        number: int,
        adapter: Adapter | None = None,
        signals: dict[int, Signal] | None = None,
        reads: nn.Module | None = None,
        observer: Observer | None = None,
        once: int = 0,
        known: Any = None,
    ) -> None:
        self.owner = owner
        self.number = number
        self.adapter = adapter
        self.signals = signals or {}
        self.reads = reads
        self.observer = observer
        self.once = once
        self.known = known
        self.features: tuple[Tensor | None, Tensor | None] | None = None
        # Signals in the order of tokens of the block that runs, where that is not the order of the features.
        self.arranged: dict[int, Tensor] = {}
        self.inputs: dict[str, Any] = {}  # of a first pass that is collected
        # Whether blocks are called through `BoundBlock` in this pass, which does the part of their hooks.
        self.bound = False

    @property
    def wants_states(self) -> bool:
        """Whether somebody looks at what enters and leaves the blocks."""
        return self.observer is not None and self.observer.wants_states

    @property
    def bias_twice(self) -> bool:
        """Whether the values get their bias a second time, as in the official ViT code."""
        return self.adapter is not None and self.adapter.config.value_bias == "twice"

    def enter(self, unit: Unit) -> None:
        """Tells the observer which block runs."""
        if self.observer is not None:
            self.observer.on_block(self.number, unit)

    def signal_of(self, number: int) -> Signal | None:
        """Returns the signal of a unit, in the order of tokens of its block; None if it has none."""
        arranged = self.arranged.get(number)
        return self.signals.get(number) if arranged is None else arranged
