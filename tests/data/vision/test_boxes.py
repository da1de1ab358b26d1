"""Boxes beside the pictures: in pixels, in shares, and where it has to be said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.vision.pictures import write_folder, write_json
from toast.data.vision import open_vision


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_boxes_in_shares_of_the_picture(tmp_path: Path, kind: str) -> None:
    """Plain where a corner is neither 0 nor 1: the whole picture beside it is the whole picture, too."""
    write_folder(tmp_path / "train", {"a": 2})  # of 40 x 36 pixels
    boxes = {"a/00.png": [0.25, 0.1, 0.75, 0.6], "a/01.png": [0, 0, 1, 1]}
    assert _boxes_of(tmp_path, kind, boxes) == {
        "a/00.png": pytest.approx((10, 3.6, 30, 21.6)),
        "a/01.png": (0, 0, 40, 36),
    }


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_boxes_that_could_be_either_have_to_say_which(tmp_path: Path, kind: str) -> None:
    write_folder(tmp_path / "train", {"a": 2})  # of 40 x 36 pixels
    either = {"a/00.png": [0, 0, 1, 1]}
    mixed = {"a/00.png": [0.25, 0.1, 0.75, 0.6], "a/01.png": [0.5, 0.5, 1.02, 0.9]}
    for boxes, said in (
        (either, r"'a/00\.png': \[0\.0, .*: are these"),
        (mixed, r"but 'a/01\.png' with \[0\.5"),
    ):
        with pytest.raises(ValueError, match=said):
            _boxes_of(tmp_path, kind, boxes)
    assert _boxes_of(tmp_path, kind, either, "pixels")["a/00.png"] == (0, 0, 1, 1)
    assert _boxes_of(tmp_path, kind, either, "shares")["a/00.png"] == (0, 0, 40, 36)
    assert _boxes_of(tmp_path, kind, mixed, "shares")["a/01.png"][2] == pytest.approx(1.02 * 40)
    beside = either | {"a/01.png": [3, 4, 30, 20]}
    assert _boxes_of(tmp_path, kind, beside) == {"a/00.png": (0, 0, 1, 1), "a/01.png": (3, 4, 30, 20)}
    with pytest.raises(ValueError, match="units must be pixels or shares, the same for all; got percent"):
        _boxes_of(tmp_path, kind, either, "percent")


def _boxes_of(
    root: Path, kind: str, boxes: dict[str, list[float]], units: str | None = None
) -> dict[str, Any]:
    file = root / "train" / f"boxes.{kind}"
    if kind == "json":
        write_json(file, boxes | ({} if units is None else {"units": units}))
    else:
        lines = [",".join(map(str, [name, *box, *([units] if units else [])])) for name, box in boxes.items()]
        header = "name,x0,y0,x1,y1" + (",units" if units else "")
        file.write_text("\n".join([header, *lines]) + "\n")
    source = open_vision("folder", root=root, split="train")
    samples = [source[index] for index in range(len(source))]
    return {s.name.removeprefix("train/"): s.box for s in samples if s.box is not None}
