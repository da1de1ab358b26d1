"""The demonstration from end to end on a few pictures, and its measures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console

import toast
from toast.demo import measures
from toast.demo.backbone import load_backbone
from toast.demo.run import Size, run
from toast.demo.task import CLASSES, Pictures, load_task, normalise


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The demonstration's folder and what it printed, after two steps of everything."""
    out = tmp_path_factory.mktemp("demo") / "results"
    console = Console(record=True, width=120, quiet=False)
    run(out, Size(train=64, test=20, generic=64, share=0.01), console=console)
    return out, console.export_text()


def test_the_folder_holds_what_was_promised(finished: tuple[Path, str]) -> None:
    out, printed = finished
    result = json.loads((out / "result.json").read_text())
    assert set(result["methods"]) == {"linear", "lora", "toast", "toast-lite"}
    for row in result["methods"].values():
        assert set(row) == {"accuracy", "trainable_parameters", "seconds", "attention_on_target"}
        assert 0 <= row["accuracy"] <= 1
        assert 0 < row["attention_on_target"] < 1
        assert row["trainable_parameters"] > 0
    assert 0.12 < result["box_share_of_area"] < 0.16
    assert (out / "attention.png").read_bytes().startswith(b"\x89PNG")
    assert "attention on target" in printed
    assert str(out / "attention.png") in printed.replace("\n", "")
    assert not list(out.glob(".*"))  # nothing half-written is left


@pytest.mark.parametrize("name", ["toast", "toast-lite"])
def test_a_saved_adapter_gives_the_accuracy_of_the_table(finished: tuple[Path, str], name: str) -> None:
    out, _ = finished
    model = PeftModel.from_pretrained(load_backbone(len(CLASSES)), str(out / name))
    accuracy, on_target = measures.evaluate(model, load_task(64, 20)[1])
    row = json.loads((out / "result.json").read_text())["methods"][name]
    assert accuracy == pytest.approx(row["accuracy"], abs=1e-4)
    assert on_target == pytest.approx(row["attention_on_target"], abs=1e-4)


def test_attention_that_looks_nowhere_has_the_share_of_the_area() -> None:
    boxes = torch.tensor([[0, 0, 14, 14], [7, 7, 49, 50], [70, 3, 112, 45]])
    nowhere = torch.full((3, 8, 8), 1 / 64)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 112**2
    torch.testing.assert_close(measures.share_in_boxes(nowhere, boxes), area)
    pictures = Pictures(torch.zeros(3, 3, 112, 112), torch.zeros(3), boxes)
    assert measures.box_share_of_area(pictures) == pytest.approx(float(area.mean()))


def test_rows_of_a_map_are_rows_of_the_picture() -> None:
    one_hot = torch.zeros(1, 8, 8)
    one_hot[0, 2, 5] = 1  # the patch from 70 to 84 pixels across, 28 to 42 down
    inside, transposed = torch.tensor([[70, 28, 84, 42]]), torch.tensor([[28, 70, 42, 84]])
    assert measures.share_in_boxes(one_hot, inside) == 1
    assert measures.share_in_boxes(one_hot, transposed) == 0


def test_the_measured_attention_is_that_of_the_trace() -> None:
    images = normalise(load_task(10, 10)[1].images[:3])
    model = toast.wrap(load_backbone(10), init="official").eval()
    with torch.no_grad(), measures.LastAttention() as seen:
        model(images)
    with torch.no_grad():
        traced = toast.trace(model, images, attention_blocks=[-1])
    assert torch.equal(seen.attention, traced.attention[11])
    torch.testing.assert_close(measures.class_attention(seen.attention).sum((1, 2)), torch.ones(3))
