"""One picture at a time: what was measured of a batch, and how its row is composed."""

from __future__ import annotations

import pytest
import torch

from tests.models import images, vit
from tests.visual.seen import steer
from toast.visual.grids import Map
from toast.visual.looks import UNKNOWN, Look, looks_of
from toast.visual.maps import look
from toast.visual.panels import FEW, row_of


def test_a_batch_is_measured_as_its_pictures_are() -> None:
    x = images(3)
    model = steer(vit(), x)
    boxes = torch.tensor([[0.0, 0, 8, 8], [torch.nan] * 4, [4, 4, 16, 12]])
    labels = torch.tensor([0, UNKNOWN, 2])
    whole = looks_of(look(model, x), boxes, labels, indices=[5, 6, 7])
    assert [each.index for each in whole] == [5, 6, 7]
    for i, each in enumerate(whole):
        (alone,) = looks_of(look(model, x[i : i + 1]), boxes[i : i + 1], labels[i : i + 1])
        assert each.measures == pytest.approx(alone.measures, rel=1e-6)
        assert each.frozen_on_target == pytest.approx(alone.frozen_on_target)
        assert (each.label, each.predicted, each.box) == (alone.label, alone.predicted, alone.box)
        torch.testing.assert_close(each.difference.values, each.attention.values - each.frozen.values)
    assert whole[0].on_target == pytest.approx(float(whole[0].attention.values[:2, :2].sum()))
    assert (whole[1].on_target, whole[1].selected, whole[1].label, whole[1].box) == (None, None, None, None)
    assert "accuracy" not in whole[1].measures
    assert whole[2].box == [4, 4, 16, 12]


def test_what_is_wrong_or_not_known_is_not_right() -> None:
    map_ = Map(torch.ones(1, 1), (1.0, 1.0))
    scores = torch.tensor([0.0, 2.0])
    assert Look(0, map_, scores=scores, label=1).is_right
    assert not Look(0, map_, scores=scores, label=0).is_right
    assert not Look(0, map_, scores=scores).is_right
    assert not Look(0, map_).is_right


@pytest.mark.parametrize(("moved", "title"), [(0.04, "attention, not moved"), (0.06, "refocused attention")])
def test_attention_is_called_refocused_only_if_it_moved(moved: float, title: str) -> None:
    even = Map(torch.full((1, 2), 0.5), (4.0, 2.0))
    seen = Look(0, even, even, even, measures={"total_variation": moved})
    assert [panel.title for panel in row_of(seen, torch.zeros(4, 4, 3), kinds=FEW).panels][-1] == title


def test_without_colour_bars_the_selection_spans_its_own_range() -> None:
    weights = Map(torch.tensor([[0.25, 0.75]]), (4.0, 2.0))
    even = Map(torch.full((1, 2), 0.5), (4.0, 2.0))
    seen = Look(0, even, even, weights, {0: weights}, 1.0, 1.0)
    picture = torch.zeros(4, 4, 3)
    few = row_of(seen, picture, kinds=FEW, colour_bars=False, after="tuned")
    assert [panel.short for panel in few.panels] == ["input", "frozen", "selection", "tuned"]
    assert (few.panels[2].low, few.panels[2].high, few.panels[2].note) == (0.25, 0.75, "0.25 to 0.75")
    whole = row_of(seen, picture)
    assert [panel.title for panel in whole.panels] == [
        "input", "frozen attention", "selection weights", "top-down signal, block 0", "refocused attention",
        "difference to the frozen model",
    ]  # fmt: skip
    assert (whole.panels[2].low, whole.panels[2].high, whole.panels[2].note) == (0.0, 0.75, "")
    assert whole.strengths == {0: 0.5}
