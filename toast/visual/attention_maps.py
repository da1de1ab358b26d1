"""What `toast.look` returns: maps over pictures, and what they show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from toast.visual.grids import Maps
from toast.visual.methods import METHODS, Method
from toast.visual.patch_attention import AnyQuery
from toast.visual.relevance import class_scores

Target = int | Tensor | Callable[[Any], Tensor]


@dataclass(frozen=True)
class AttentionMaps:
    """Where a vision model looks, for a batch of pictures: what `toast.look` returns.

    `maps.attention.values` is `(batch, rows, columns)`, `maps.attention.cell` the height and width of a
    token's place in pixels, and `maps.attention[i]` the map of one picture. All are on the CPU, in float32 or
    finer, without a graph.

    Args:
        attention: What the pass that made the output attends to; each map sums to 1 (Grad-CAM may be 0
            everywhere).
        frozen: The same of the frozen model; None of a plain model.
        selection: Selection weights, 0 to 1; None of a model that is not steered.
        signals: By block, the norm of the top-down signal of each token, in the units of the features.
        on_patches: Share of the attention that falls on patches at all, `(batch,)`; the rest is on class
            token, registers and padding, and is left out of the maps. 1 for other methods.
        frozen_on_patches: The same of the frozen model.
        output: What the model returned, as it was.
        frozen_output: What the frozen model returned.
        size: Height and width of the pictures in pixels.
        block: The shown block, counted from 0.
        blocks: How many there are.
        head: A head, or "mean".
        query: "class", "mean" or, of an attentive probe, "probe"; None where the method has no query.
        method: A key of `METHODS`.
    """

    attention: Maps
    frozen: Maps | None
    selection: Maps | None
    signals: dict[int, Maps]
    on_patches: Tensor
    frozen_on_patches: Tensor | None
    output: Any
    frozen_output: Any
    size: tuple[int, int]
    block: int
    blocks: int
    head: int | Literal["mean"]
    query: AnyQuery | None
    method: Method

    @property
    def difference(self) -> Maps | None:
        """What was gained (positive) and lost (negative) against the frozen model; sums to 0."""
        if self.frozen is None:
            return None
        return Maps(self.attention.values - self.frozen.values, self.attention.cell)

    @property
    def before(self) -> AttentionMaps | None:
        """The frozen model's maps by themselves; None of a plain model."""
        if self.frozen is None or self.frozen_on_patches is None:
            return None
        return replace(
            self,
            attention=self.frozen, frozen=None, selection=None, signals={},
            on_patches=self.frozen_on_patches, frozen_on_patches=None,
            output=self.frozen_output, frozen_output=None,
        )  # fmt: skip

    @property
    def scores(self) -> Tensor | None:
        """What the model says of the classes, `(batch, classes)`; None if it gives no scores."""
        return class_scores(self.output)

    @property
    def name(self) -> str:
        """What the maps show, in a few words."""
        if self.query == "probe":
            return f"{METHODS[self.method]}, attentive probe, mean over queries"
        words = [METHODS[self.method], f"block {self.block} of 0-{self.blocks - 1}"]
        if self.query is not None:
            words += [
                f"{self.query} query",
                "mean over heads" if self.head == "mean" else f"head {self.head}",
            ]
        return ", ".join(words)
