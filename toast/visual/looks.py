"""One picture: where a model looks in it, what the model says of it, and how both fit what is known of it.

Every drawing, report, table and measure of pictures reads a `Look`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from toast.visual import measures, targets
from toast.visual.attention_maps import AttentionMaps
from toast.visual.grids import Map, Maps
from toast.visual.methods import Method

#: Label of a picture whose class is not known.
UNKNOWN = -100
#: What is measured of a picture beside `targets.INSIDE` and `targets.OUTSIDE`, see `toast.visual.measures`.
ACCURACY, ON_TARGET, POINTING, ENTROPY = "accuracy", "on_target", "pointing", "entropy"
#: How far its attention is from that of the reference.
TOTAL_VARIATION, JENSEN_SHANNON = "total_variation", "jensen_shannon"


#: Least share of the attention that has to go elsewhere for a title to say that it did.
MOVED = 0.05


@dataclass(frozen=True)
class Look:
    """Where a model looks in one picture.

    Args:
        index: The picture's place among those that were looked at.
        attention: Where the model looks; sums to 1.
        frozen: The same of the frozen model, or of another one that the model is held against.
        selection: Selection weights, 0 to 1; None of a model that is not steered.
        signals: By block, the norm of the top-down signal of each token.
        on_patches: Share of the attention that falls on patches at all.
        frozen_on_patches: The same of the frozen model.
        scores: Of the classes, `(classes,)`; None if the model gives none.
        block: The shown block, counted from 0.
        method: A key of `METHODS`.
        label: The picture's class; None if it is not known.
        target: What counts in the picture: a box `(4,)` in pixels, or a mask `(height, width)`, 0 to 1; None
            if it is not known.
        measures: What was measured, by name; only what there is. What is measured on targets is there if the
            target is in sight, and the changes if both attentions have the same grid.
        frozen_on_target: Share of the frozen model's attention on the target; None if it was not measured.
    """

    index: int
    attention: Map
    frozen: Map | None = None
    selection: Map | None = None
    signals: dict[int, Map] = field(default_factory=dict)
    on_patches: float = 1.0
    frozen_on_patches: float | None = None
    scores: Tensor | None = None
    block: int = 0
    method: Method = "attention"
    label: int | None = None
    target: Tensor | None = None
    measures: dict[str, float] = field(default_factory=dict)
    frozen_on_target: float | None = None

    @property
    def predicted(self) -> int | None:
        """The class that the model says; None if it gives no scores."""
        return None if self.scores is None else int(self.scores.argmax())

    @property
    def confidence(self) -> float | None:
        """The probability of that class, 0 to 1."""
        return None if self.scores is None else float(self.scores.softmax(-1).max())

    @property
    def is_right(self) -> bool:
        """Whether the model says the picture's class; False as well if either is not known."""
        return self.label is not None and self.label == self.predicted

    @property
    def on_target(self) -> float | None:
        """Share of the attention on the target; None if none is in sight."""
        return self.measures.get(ON_TARGET)

    @property
    def selected(self) -> tuple[float, float] | None:
        """Mean selection weight inside the target and outside of it; None if there are not both."""
        inside, outside = (self.measures.get(name) for name in (targets.INSIDE, targets.OUTSIDE))
        return None if inside is None or outside is None else (inside, outside)

    @property
    def moved(self) -> float | None:
        """Share of the attention that went elsewhere, total variation, 0 to 1."""
        return self.measures.get(TOTAL_VARIATION)

    @property
    def stayed(self) -> bool:
        """Whether the attention is where the frozen model's is, but for less than `MOVED` of it."""
        return self.moved is not None and self.moved < MOVED

    @property
    def difference(self) -> Map | None:
        """What was gained (positive) and lost (negative) against the frozen model."""
        if self.frozen is None or self.frozen.values.shape != self.attention.values.shape:
            return None
        return Map(self.attention.values - self.frozen.values, self.attention.cell)

    @property
    def strengths(self) -> dict[int, float]:
        """By block, the mean norm of the signal over the patches."""
        return {block: float(norm.values.mean()) for block, norm in self.signals.items()}

    @property
    def box(self) -> list[float] | None:
        """The box, or what is drawn around the mask: x0, y0, x1, y1 in pixels; None if there is none."""
        return None if self.target is None else targets.frame(self.target)


def looks_of(
    maps: AttentionMaps,
    target: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    reference: Maps | None = None,
    indices: Sequence[int] | None = None,
    tolerance: float = 0.0,
) -> list[Look]:
    """Measures a batch, and returns its pictures one by one.

    Args:
        maps: Of the batch.
        target: Boxes `(batch, 4)` in pixels or masks `(batch, height, width)`, 0 to 1; not a number where one
            is not known.
        labels: `(batch,)`, `UNKNOWN` where one is not known.
        reference: What the attention is held against; None is the frozen model's, if there is one.
        indices: Places of the pictures among all; None counts from 0.
        tolerance: Of the pointing game, in pixels.
    """
    count = len(maps.attention.values)
    frozen = maps.frozen if reference is None else reference
    target = torch.full((count, 4), torch.nan) if target is None else target.cpu()
    labels = torch.full((count,), UNKNOWN) if labels is None else labels.cpu()
    scores = None if maps.scores is None else maps.scores.detach().float().cpu()
    measured = _measured(maps, scores, target, labels, tolerance)
    before: dict[str, Tensor] = {}
    if frozen is not None:
        before = targets.measure(frozen, None, target, maps.size)
        measured |= _changed(maps.attention, frozen)
    known = targets.is_known(target)
    return [
        Look(
            index=i if indices is None else indices[i],
            attention=maps.attention[i],
            frozen=None if frozen is None else frozen[i],
            selection=None if maps.selection is None else maps.selection[i],
            signals={block: norms[i] for block, norms in maps.signals.items()},
            on_patches=float(maps.on_patches[i]),
            frozen_on_patches=None if maps.frozen_on_patches is None else float(maps.frozen_on_patches[i]),
            scores=None if scores is None else scores[i],
            block=maps.block,
            method=maps.method,
            label=None if labels[i] == UNKNOWN else int(labels[i]),
            target=target[i] if known[i] else None,
            measures=_numbers(measured, i),
            frozen_on_target=_numbers(before, i).get(targets.ATTENTION),
        )
        for i in range(count)
    ]


def _measured(
    maps: AttentionMaps, scores: Tensor | None, target: Tensor, labels: Tensor, tolerance: float
) -> dict[str, Tensor]:
    """Returns the measures of each picture, not a number where there is none."""
    attention = maps.attention
    found = {ENTROPY: measures.entropy(attention.values)}
    if scores is not None:
        right = (scores.argmax(-1) == labels).double()
        found[ACCURACY] = torch.where(labels == UNKNOWN, torch.nan, right)
    here = targets.measure(attention, maps.selection, target, maps.size)
    found[ON_TARGET] = here.pop(targets.ATTENTION)
    hits = measures.pointing_game(attention.values, target, attention.cell, tolerance)
    found[POINTING] = torch.where(found[ON_TARGET].isnan(), torch.nan, hits)
    return found | here


def _changed(maps: Maps, reference: Maps) -> dict[str, Tensor]:
    """Returns how far each picture's map is from the reference's, if both have the same grid."""
    if maps.values.shape != reference.values.shape:
        return {}
    return {
        TOTAL_VARIATION: measures.total_variation(maps.values, reference.values),
        JENSEN_SHANNON: measures.jensen_shannon(maps.values, reference.values),
    }


def _numbers(measured: dict[str, Tensor], index: int) -> dict[str, float]:
    """Returns what was measured of one picture, without what is not a number."""
    found = {name: float(values[index]) for name, values in measured.items()}
    return {name: value for name, value in found.items() if not math.isnan(value)}
