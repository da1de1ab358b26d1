"""Measures of maps, and the comparison of models."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from tests.models import images, vit
from tests.visual.seen import steer
from toast.visual import measures, targets
from toast.visual.comparing import MEASURES, Comparison, _ratio, compare
from toast.visual.grids import Maps
from toast.visual.maps import look
from toast.visual.targets import inside_and_outside

near = torch.testing.assert_close
CELL = (8.0, 4.0)  # of 2 rows and 3 columns: a picture of 16 x 12 pixels


def maps(count: int = 5) -> Tensor:
    return torch.rand(count, 6).double().softmax(-1).view(count, 2, 3)


def as_masks(boxes: Tensor, height: int = 16, width: int = 12) -> Tensor:
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    return masks


BOXES = torch.tensor([[0, 0, 12, 16], [0, 0, 4, 8], [4, 8, 12, 16], [2, 4, 6, 12], [11, 15, 12, 16]])


def test_a_cell_counts_by_the_part_that_the_target_covers() -> None:
    values = maps()
    near(measures.share_in_target(values, BOXES, CELL)[0], torch.tensor(1.0).double())
    near(measures.share_in_target(values, BOXES, CELL)[1], values[1, 0, 0])
    near(measures.share_in_target(values, BOXES, CELL)[2], values[2, 1, 1:].sum())
    near(measures.share_in_target(values, BOXES, CELL)[3], values[3, :, :2].sum() / 4)
    near(measures.share_in_target(values, BOXES, CELL)[4], values[4, 1, 2] / 32)


def test_a_mask_of_a_box_measures_as_the_box() -> None:
    values = maps()
    for target in (as_masks(BOXES), as_masks(BOXES).float()):
        near(
            measures.share_in_target(values, target, CELL),
            measures.share_in_target(values, BOXES, CELL),
            rtol=0, atol=1e-7,
        )  # fmt: skip
        for tolerance in (0, 3):
            hits = [measures.pointing_game(values, where, CELL, tolerance) for where in (target, BOXES)]
            assert torch.equal(*hits)
    area = (BOXES[:, 2] - BOXES[:, 0]) * (BOXES[:, 3] - BOXES[:, 1]) / 192
    near(measures.share_of_area(BOXES, (16, 12)), area)
    near(measures.share_of_area(as_masks(BOXES), (16, 12)), area)


def test_the_pointing_game_asks_for_the_centre_of_the_greatest_cell() -> None:
    values = torch.zeros(1, 2, 3)
    values[0, 1, 0] = 1  # its centre: 2 across, 12 down
    for box, tolerance, hit in [
        ([0, 8, 4, 16], 0, 1), ([2, 12, 3, 13], 0, 1), ([3, 12, 9, 14], 0, 0), ([3, 12, 9, 14], 1, 1),
        ([0, 0, 12, 12], 0, 0), ([0, 0, 12, 12], 1, 1),
    ]:  # fmt: skip
        assert measures.pointing_game(values, torch.tensor([box]), CELL, tolerance) == hit


def test_entropy_and_change() -> None:
    values, others = maps(), maps()
    rows = zip(values.flatten(1).tolist(), others.flatten(1).tolist(), strict=True)
    for i, (p, q) in enumerate(rows):
        entropy = -sum(x * math.log(x) for x in p) / math.log(6)
        moved = sum(max(x - y, 0) for x, y in zip(p, q, strict=True))
        kl = [
            sum(x * math.log2(2 * x / (x + y)) for x, y in zip(*pair, strict=True))
            for pair in ((p, q), (q, p))
        ]
        assert float(measures.entropy(values)[i]) == pytest.approx(entropy)
        assert float(measures.total_variation(values, others)[i]) == pytest.approx(moved)
        assert float(measures.jensen_shannon(values, others)[i]) == pytest.approx(sum(kl) / 2)
    here, there = torch.eye(2).view(2, 1, 1, 2)
    assert measures.entropy(here) == 0
    assert measures.total_variation(here, there) == measures.jensen_shannon(here, there) == 1
    assert measures.total_variation(here, here) == measures.jensen_shannon(here, here) == 0
    assert measures.entropy(torch.full((1, 4, 4), 1 / 16)) == pytest.approx(1)


def test_a_target_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needs boxes \(batch, 4\) or masks .*; got \(5, 3\)"):
        measures.share_in_target(maps(), BOXES[:, :3], CELL)


# The comparison.


@pytest.fixture(scope="module")
def compared() -> tuple[Comparison, dict[str, Tensor], Tensor, Maps]:
    """A steered and a plain model on six pictures in two batches, and the maps by hand."""
    torch.manual_seed(0)
    x, boxes = images(6), torch.tensor([[0, 0, 6, 8], [4, 4, 12, 16]] * 3)
    models = {"steered": steer(vit(), x).train(), "tuned": vit()}
    batches = [(x[:4], boxes[:4]), (x[4:], boxes[4:])]
    found = compare(models, batches, block=1, tolerance=1)
    assert models["steered"].training
    views = {name: look(model.eval(), x, block=1) for name, model in models.items()}
    by_name = {"frozen": views["steered"].frozen.values} | {n: v.attention.values for n, v in views.items()}
    selection = views["steered"].selection
    assert selection is not None
    return found, by_name, boxes, selection


def test_the_frozen_model_stands_first_and_the_others_against_it(
    compared: tuple[Comparison, dict[str, Tensor], Tensor, Maps],
) -> None:
    found, by_name, boxes, selection = compared
    assert list(found.rows) == ["frozen", "steered", "tuned"]
    assert found.reference == "frozen"
    assert found.pictures == 6
    assert found.shows == "attention, block 1 of 0-2, class query, mean over heads"
    for name, values in by_name.items():
        selected: dict[str, Tensor] = {}
        if name == "steered":
            inside, outside = inside_and_outside(selection, boxes, (16, 16))
            selected = {"selection_inside": inside, "selection_outside": outside}
        expected = {
            "on_target": measures.share_in_target(values, boxes, (4, 4)),
            "pointing": measures.pointing_game(values, boxes, (4, 4), 1),
            **selected,
            "entropy": measures.entropy(values),
            "total_variation": measures.total_variation(values, by_name["frozen"]),
            "jensen_shannon": measures.jensen_shannon(values, by_name["frozen"]),
        }
        assert list(found.values[name]) == [k for k in MEASURES if k in expected] == list(expected)
        for measure, singles in expected.items():
            near(found.values[name][measure], singles)
            if measure in found.rows[name]:
                assert found.rows[name][measure].mean == pytest.approx(float(singles.mean()))
    assert "total_variation" not in found.rows["frozen"]
    gain = found.gains["steered"]["on_target"]
    row = found.rows
    assert gain.mean == pytest.approx(row["steered"]["on_target"].mean - row["frozen"]["on_target"].mean)


def test_the_ratio_of_selection_is_one_of_means(
    compared: tuple[Comparison, dict[str, Tensor], Tensor, Maps],
) -> None:
    found, *_ = compared
    inside, outside = (found.values["steered"][f"selection_{side}"] for side in ("inside", "outside"))
    held = found.rows["steered"]["selection_ratio"]
    assert held.mean == pytest.approx(float(inside.mean() / outside.mean()))
    assert held.low <= held.mean <= held.high
    nothing = {"selection_inside": inside, "selection_outside": outside * 0}
    assert _ratio(nothing, torch.zeros(5, 6).long(), 0.9) == {}


def test_intervals_are_those_of_a_mean() -> None:
    """Of many values the percentile interval is 1.96 standard errors to either side."""
    from toast.visual.comparing import _estimate

    values = torch.randn(400).double()
    estimate = _estimate(values, torch.randint(400, (4000, 400)), 0.95)
    error = float(values.std()) / 20
    assert estimate.mean == pytest.approx(float(values.mean()))
    assert estimate.low == pytest.approx(estimate.mean - 1.96 * error, abs=0.15 * error)
    assert estimate.high == pytest.approx(estimate.mean + 1.96 * error, abs=0.15 * error)


def test_a_comparison_is_written(
    compared: tuple[Comparison, dict[str, Tensor], Tensor, Maps], tmp_path: Path
) -> None:
    found, *_ = compared
    held = json.loads(found.save(tmp_path / "new" / "table.json").read_text())
    assert held["models"]["steered"]["entropy"]["mean"] == found.rows["steered"]["entropy"].mean
    assert held["reference"] == "frozen"
    lines = list(csv.DictReader(io.StringIO(found.save(tmp_path / "table.csv").read_text())))
    assert len(lines) == 3 + 8 + 5
    (line,) = [x for x in lines if (x["model"], x["measure"]) == ("tuned", "on_target")]
    assert float(line["gain_low"]) == found.gains["tuned"]["on_target"].low
    assert not list(tmp_path.glob("**/.*"))
    console = Console(record=True, width=160, file=io.StringIO())
    console.print(found.table())
    printed = console.export_text()
    assert str(found.rows["steered"]["on_target"]) in printed
    assert "6 pictures" in printed
    with pytest.raises(ValueError, match=r"ends in \.json or \.csv; got '.*table\.txt'"):
        found.save(tmp_path / "table.txt")


def test_without_a_frozen_model_the_first_is_the_reference() -> None:
    x, boxes = images(2), torch.tensor([[0, 0, 6, 8]] * 2)
    found = compare({"one": vit(), "other": vit("registers-layer-scale")}, [(x, boxes)], resamples=10)
    assert found.reference == "one"
    assert list(found.gains) == ["other"]
    given = compare({"tuned": vit(), "frozen": vit()}, [(x, boxes)], resamples=10)
    assert list(given.rows) == ["frozen", "tuned"]


def test_a_comparison_without_models_pictures_or_targets_is_refused() -> None:
    x = images(2)
    with pytest.raises(ValueError, match="needs at least one model"):
        compare({}, [])
    with pytest.raises(ValueError, match="needs at least one batch"):
        compare({"plain": vit()}, [])
    with pytest.raises(ValueError, match="needs a target for each picture; got 2 pictures and 3"):
        compare({"plain": vit()}, [(x, torch.zeros(3, 4))])
    with pytest.raises(ValueError, match="needs a label for each picture; got 2 pictures and 1"):
        compare({"plain": vit()}, [(x, None, torch.zeros(1))])


def test_what_needs_no_target_is_measured_without() -> None:
    """Of four pictures one has a target in sight, one a target that is cropped away."""
    torch.manual_seed(0)
    x, labels = images(4), torch.tensor([0, 1, -100, 2])
    model, nan = steer(vit(), x), torch.nan
    boxes = torch.tensor([[nan] * 4, [2, 2, 10, 12], [20, 2, 30, 12], [nan] * 4])
    found = compare({"steered": model}, [(x, boxes, labels)], resamples=50)
    assert (found.pictures, found.in_sight, found.out_of_sight) == (4, 1, 1)
    bare = compare({"steered": model}, [(x[:2], None, labels[:2]), (x[2:], None)], resamples=50)
    assert (bare.pictures, bare.in_sight, bare.out_of_sight, bare.area) == (4, 0, 0, None)
    for name in ("entropy", "total_variation", "jensen_shannon"):
        near(bare.values["steered"][name], found.values["steered"][name])
    views = look(model.eval(), x)
    share = measures.share_in_target(views.attention.values, boxes, (4, 4))[1]
    assert found.rows["steered"]["on_target"].mean == pytest.approx(float(share))
    assert found.values["steered"]["on_target"].isnan().tolist() == [True, False, True, True]
    assert not {"on_target", "pointing", "selection_ratio"} & bare.rows["steered"].keys()
    right = [float(int(views.output[i].argmax()) == int(labels[i])) for i in (0, 1, 3)]
    assert found.rows["steered"]["accuracy"].mean == pytest.approx(sum(right) / 3)
    assert "accuracy" not in found.rows["frozen"]
    json.dumps(bare.as_dict(), allow_nan=False)
    assert "accuracy" not in compare({"m": model}, [(x, None, labels)], classifiers=[], resamples=5).rows["m"]
    console = Console(record=True, width=160, file=io.StringIO())
    console.print(bare.table())
    assert "attention on target" not in console.export_text()


# What counts on targets.


def test_tokens_inside_and_outside_of_a_target_by_hand() -> None:
    """A grid of 2 rows and 3 columns whose last column reaches half beyond the picture of 16 x 10 pixels."""
    weights = Maps(torch.tensor([[[0.6, 0.2, 0.4], [0.1, 0.3, 0.9]]]).expand(3, 2, 3), CELL)
    boxes = torch.tensor([[0, 0, 6, 8], [0, 0, 10, 16], [30, 0, 40, 8]])
    inside, outside = inside_and_outside(weights, boxes, (16, 10))
    near(inside[0], torch.tensor((0.6 + 0.2 / 2) / 1.5))
    near(outside[0], torch.tensor((0.2 / 2 + 0.4 / 2 + 0.1 + 0.3 + 0.9 / 2) / 3.5))
    assert inside[1:].isnan().all() and outside[1:].isnan().all()  # nothing outside, nothing inside
    masks = torch.stack([as_masks(boxes[:1], 16, 10)[0].float(), torch.zeros(16, 10)])
    found = targets.measure(None, Maps(weights.values[:2], CELL), masks, (16, 10))
    near(found["selection_inside"], torch.stack([inside[0], torch.tensor(torch.nan)]), equal_nan=True)
    assert targets.ratio({"selection_inside": 0.3, "selection_outside": 0.1}) == pytest.approx(3)
    for means in ({"selection_inside": 0.3, "selection_outside": 0.0}, {}, dict.fromkeys(MEASURES, math.nan)):
        assert targets.ratio(means) is None


def test_a_target_is_in_sight_where_half_a_pixel_of_it_is() -> None:
    masks = torch.zeros(4, 16, 12)
    masks[1, 3, 3], masks[2, 3, 3], masks[3] = 0.5, 0.4, torch.nan
    assert targets.in_sight(masks).tolist() == [False, True, False, False]
    assert targets.is_known(masks).tolist() == [True, True, True, False]
    boxes = torch.tensor([[0, 0, 4, 4], [-9, 2, 0, 4], [12, 0, 14, 4], [3, 15.5, 9, 30], [torch.nan] * 4])
    assert targets.in_sight(boxes, (16, 12)).tolist() == [True, False, False, True, False]
    assert targets.is_known(boxes).tolist() == [True, True, True, True, False]


def test_targets_that_count_otherwise_are_refused() -> None:
    with pytest.raises(ValueError, match=r"boxes need pixels; got \[0\.1, 0\.2, 0\.5, 0\.9\].*shares of"):
        measures.share_in_target(maps(1), torch.tensor([[0.1, 0.2, 0.5, 0.9]]), CELL)
    with pytest.raises(ValueError, match="masks need values from 0 to 1; got some up to 255"):
        measures.share_in_target(maps(1), torch.full((1, 16, 12), 255, dtype=torch.uint8), CELL)
    one_pixel = measures.share_in_target(maps(1), torch.tensor([[0, 0, 1, 1]]), CELL)
    near(one_pixel, torch.zeros(1).double(), rtol=0, atol=0.04)
