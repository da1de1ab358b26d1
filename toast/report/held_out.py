"""What a vision run's model says of held-out pictures, and where it looks before and after."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from toast.baselines.attentive import find_probe
from toast.baselines.vpt import find_prompts
from toast.training.data import Splits
from toast.training.on_target import OnTarget
from toast.visual import measures, targets
from toast.visual.grids import Maps
from toast.visual.maps import look
from toast.visual.relevance import class_scores

#: Most pictures that are looked at, spread over the split, and how many at a time.
MOST, BATCH = 200, 20


@dataclass(frozen=True)
class Look:
    """One picture.

    Args:
        index: Its place in the split.
        label: Its class.
        predicted: What the model says.
        confidence: Probability of that, 0 to 1.
        attention: Where the model looks, `(rows, columns)`, sums to 1.
        frozen: The same of the frozen backbone; None if the method leaves it as it is.
        selection: Selection weights, 0 to 1; None of another method than TOAST.
        cell: Height and width of a cell of the maps in pixels.
        target: Where the answer is, `(height, width)`, 0 to 1; None if that is not known.
        on_target: Share of the attention on the target; None if none is in sight.
        frozen_on_target: The same of the frozen backbone.
        selected: Mean selection weight inside the target and outside of it; None as well where there is no
            selection.
        moved: Share of the attention that went elsewhere, total variation, 0 to 1.
    """

    index: int
    label: int
    predicted: int
    confidence: float
    attention: Tensor
    frozen: Tensor | None
    selection: Tensor | None
    cell: tuple[float, float]
    target: Tensor | None
    on_target: float | None
    frozen_on_target: float | None
    selected: tuple[float, float] | None
    moved: float | None

    @property
    def is_right(self) -> bool:
        """Whether the model says the class."""
        return self.label == self.predicted


@dataclass(frozen=True)
class HeldOutLooks:
    """All pictures that were looked at.

    Args:
        split: Where they come from: `test`, `validation`, or `train` if there is no other.
        of: Pictures of the split.
        shows: What the maps show.
        seen: The pictures.
    """

    split: str
    of: int
    shows: str
    seen: list[Look]

    def chosen(self, count: int) -> list[Look]:
        """Returns pictures to show, half of them right and half wrong if there are, spread over the split."""
        right = [look for look in self.seen if look.is_right]
        wrong = [look for look in self.seen if not look.is_right]
        wrongs = min(len(wrong), max(count // 2, count - len(right)))
        return _spread(right, count - wrongs) + _spread(wrong, wrongs)


def _spread(looks: list[Look], count: int) -> list[Look]:
    count = min(count, len(looks))
    return [looks[i * len(looks) // count] for i in range(count)]


def look_at_split(
    model: nn.Module, frozen: nn.Module | None, splits: Splits, most: int = MOST
) -> HeldOutLooks:
    """Looks at pictures that the model was not trained on.

    Args:
        model: The model, in evaluation mode.
        frozen: The backbone as it was before, where the model holds it no more (full tuning, VPT, …).
        splits: The run's data.
        most: Pictures to look at.

    Raises:
        ValueError: If the model is one whose looking cannot be shown; the message says why.
    """
    name = next(n for n in ("test", "validation", "train") if getattr(splits, n) is not None)
    data = getattr(splits, name)
    count = min(most, len(data))
    seen: list[Look] = []
    shows = ""
    for start in range(0, count, BATCH):
        rows = [i * len(data) // count for i in range(start, min(start + BATCH, count))]
        items = [item for item in (data[0, row] for row in rows) if "bad" not in item]
        if not items:
            continue
        pixels = torch.stack([item["pixels"] for item in items])
        views = _view(model, pixels)
        before = _view(frozen, pixels) if frozen is not None else None
        shows = shows or views.name
        seen += _looks(items, views, before.attention if before else views.frozen)
    return HeldOutLooks(name, len(data), shows, seen)


@dataclass(frozen=True)
class _Views:
    attention: Maps
    frozen: Maps | None
    selection: Maps | None
    scores: Tensor
    name: str


def _view(model: nn.Module, pixels: Tensor) -> _Views:
    if not isinstance(model, PeftModel) and (find_prompts(model) or find_probe(model)) is not None:
        return _view_of_last(model, pixels)
    views = look(model, pixels)
    scores = views.scores
    assert scores is not None  # what a run trains gives scores of its classes
    return _Views(views.attention, views.frozen, views.selection, scores.detach().float().cpu(), views.name)


@torch.no_grad()
def _view_of_last(model: nn.Module, pixels: Tensor) -> _Views:
    """Returns the attention of a probe over the patches, or VPT's last block's without that on prompts."""
    watcher = OnTarget(model)
    with watcher.watching() as seen:
        scores = class_scores(model(pixels.to(next(model.parameters()))))
    assert scores is not None
    maps = watcher.attention_maps(seen, (pixels.shape[-2], pixels.shape[-1]))
    return _Views(maps.attention, None, None, scores.float().cpu(), maps.name)


def _looks(items: list[dict[str, Any]], views: _Views, frozen: Maps | None) -> Iterator[Look]:
    """Yields what was seen of each picture of a batch."""
    chances, said = views.scores.softmax(-1).max(-1)
    maps, cell = views.attention.values, views.attention.cell
    same = frozen is not None and frozen.values.shape == maps.shape
    moved = measures.total_variation(maps, frozen.values) if same and frozen is not None else None
    after, before = _of_targets(items, views.attention, views.selection), _of_targets(items, frozen, None)
    for i, item in enumerate(items):
        inside, outside = after(targets.INSIDE, i), after(targets.OUTSIDE, i)
        yield Look(
            index=int(item["index"]),
            label=int(item["label"]),
            predicted=int(said[i]),
            confidence=float(chances[i]),
            attention=maps[i],
            frozen=None if frozen is None else frozen.values[i],
            selection=None if views.selection is None else views.selection.values[i],
            cell=cell,
            target=item.get("target"),
            on_target=after(targets.ATTENTION, i),
            frozen_on_target=before(targets.ATTENTION, i),
            selected=None if inside is None or outside is None else (inside, outside),
            moved=None if moved is None else float(moved[i]),
        )


def _of_targets(
    items: list[dict[str, Any]], attention: Maps | None, selection: Maps | None
) -> Callable[[str, int], float | None]:
    """Measures a batch on its targets; returns what gives a figure by name and picture, if there is one."""
    size = tuple(items[0]["pixels"].shape[-2:])
    unknown = torch.full(size, torch.nan)
    target = torch.stack([item.get("target", unknown) for item in items])
    found = targets.measure(attention, selection, target, (size[0], size[1]))

    def figure(name: str, index: int) -> float | None:
        value = float(found[name][index]) if name in found else math.nan
        return None if math.isnan(value) else value

    return figure
