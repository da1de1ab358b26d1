"""What is measured on targets, by a run and by all who look at it later."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import torch
from PIL import Image

import toast
from tests.training.settings import vision
from toast.data.vision import transforms
from toast.report.held_out import look_at_split
from toast.report.samples import TargetCounts, batches, of_split, open_split
from toast.training.loaded import load_run
from toast.training.measuring import measure
from toast.training.preparing import open_all
from toast.training.run import run
from toast.visual.comparing import compare


def _box_pictures(tmp_path: Path, box: list[int]) -> None:
    test = tmp_path / "pictures" / "test"
    boxes = {str(path.relative_to(test)): box for path in test.rglob("*.png")}
    (test / "boxes.json").write_text(json.dumps(boxes))


def _wide_pictures(tmp_path: Path) -> dict[str, list[int]]:
    """Makes the test pictures twice as wide as the model's; the first has no box, and a third lose theirs."""
    test = tmp_path / "pictures" / "test"
    boxes = {}
    for number, path in enumerate(sorted(test.rglob("*.png"))):
        with Image.open(path) as picture:
            picture.resize((40, 20)).save(path)
        if number:
            boxes[str(path.relative_to(test))] = [1, 2, 6, 18] if number % 3 == 0 else [14, 4, 24, 18]
    (test / "boxes.json").write_text(json.dumps(boxes))
    return boxes


def test_targets_in_sight_are_measured_alike_by_all(tmp_path: Path) -> None:
    """Of eight pictures the first has no box, and the crop removes that of two: five are measured."""
    config = vision(
        tmp_path,
        steps=3,
        epochs=None,
        method__calibrate=False,
        batch_size=3,
        evaluation__predictions=True,
    )
    boxes = _wide_pictures(tmp_path)
    assert (len(boxes), [box[0] for box in boxes.values()].count(1)) == (7, 2)
    found = run(config, "tune")["test"]
    assert (found["samples"], found["targets_in_sight"], found["targets_out_of_sight"]) == (8, 5, 2)
    names = ("attention_on_target", "selection_inside", "selection_outside", "selection_ratio")
    text = (config.folder / "predictions.jsonl").read_text()
    shares = [json.loads(line)["attention_on_target"] for line in text.splitlines()]
    assert shares.count(None) == 3
    of_pictures = statistics.mean(share for share in shares if share is not None)
    assert of_pictures == pytest.approx(found["attention_on_target"], abs=1e-5)
    again = measure(config.folder)
    assert {name: again[name] for name in names} == pytest.approx({name: found[name] for name in names})
    loaded = load_run(config.folder)
    splits = open_all(config)[1]
    looks = look_at_split(loaded.model, None, splits).seen
    held = [look for look in looks if look.on_target is not None and look.selected is not None]
    assert len(held) == 5
    reported = [
        statistics.mean(look.on_target for look in held),
        *(statistics.mean(look.selected[side] for look in held) for side in (0, 1)),
    ]
    assert reported == pytest.approx([found[name] for name in names[:3]], abs=1e-6)
    some = of_split(
        open_split(config, "test"), transforms(loaded.backbone.data, train=False), None, pytest.fail
    )
    compared = compare({"run": loaded.model}, batches(some, 3, counted := TargetCounts()), resamples=10)
    assert (compared.in_sight, compared.out_of_sight) == (len(held), len(counted.away)) == (5, 2)
    row = compared.rows["run"]
    figures = [row[name].mean for name in ("on_target", *names[1:])]
    assert figures == pytest.approx([found[name] for name in names], abs=1e-6)
    assert row["accuracy"].mean == pytest.approx(found["accuracy"])


def test_selection_is_that_of_the_trace(tmp_path: Path) -> None:
    config = vision(tmp_path, steps=3, epochs=None, method__calibrate=False)
    _box_pictures(tmp_path, [0, 0, 10, 20])  # 8.5 of 16 columns, see above
    result = run(config, "tune")["test"]
    loaded = load_run(config.folder)
    splits = open_all(config)[1]
    pixels = splits.collate([splits.test[index] for index in range(8)])["pixels"]
    weights = toast.trace(loaded.model, pixels).selection_weights[:, 1:].view(8, 4, 4).mean(1)
    covered = torch.tensor([1, 1, 0.5 / 4, 0])
    inside = (weights @ covered / covered.sum()).mean()
    outside = (weights @ (1 - covered) / (1 - covered).sum()).mean()
    assert 0 < float(inside) < 1
    assert result["selection_inside"] == pytest.approx(float(inside), abs=1e-3)
    assert result["selection_outside"] == pytest.approx(float(outside), abs=1e-3)
    assert result["selection_ratio"] == pytest.approx(float(inside / outside), abs=1e-2)


@pytest.mark.parametrize("name", ["linear", "vpt-deep"])
def test_what_selects_nothing_has_no_selection(tmp_path: Path, name: str) -> None:
    config = vision(tmp_path, method=name, steps=1, epochs=None)
    _box_pictures(tmp_path, [0, 0, 10, 20])
    measured = run(config, "tune")["test"]
    assert measured["targets_in_sight"] == 8
    assert not [name for name in measured if name.startswith("selection")]
