"""The code of the report works as it is pasted, and gives the model that was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from tests.report.reports import Page, run_on_pictures
from tests.training.settings import language
from toast.report.writing import write_report
from toast.training.loaded import load_run
from toast.training.run import run


def pasted(place: Path) -> dict[str, Any]:
    """Runs both blocks of a report's code by themselves; returns the names that they made."""
    found: dict[str, Any] = {}
    codes = Page(write_report(place, place / "report.html", pictures=1).read_text(encoding="utf-8")).codes
    assert len(codes) == 2
    for code in codes:
        names: dict[str, Any] = {}
        torch.manual_seed(99)  # whatever state the reader's session is in
        exec(compile(code, "pasted", "exec"), names)
        found |= names
    return found


def check_pictures(place: Path) -> None:
    found, loaded = pasted(place), load_run(place)
    batch = {"pixels": found["prepare"](found["image"])[None]}
    args, kwargs = loaded.backbone.feed(batch)
    with torch.inference_mode():
        expected = loaded.backbone.logits(loaded.model(*args, **kwargs))[0].softmax(-1)
    torch.testing.assert_close(found["scores"], expected)
    assert tuple(found["classes"]) == loaded.classes
    assert found["logits"].shape == (1, len(loaded.classes))


@pytest.mark.parametrize("method", ["toast", "full", "vpt-deep"])
def test_timm(tmp_path: Path, method: str) -> None:
    check_pictures(run_on_pictures(tmp_path, method=method))


def test_transformers(tmp_path: Path) -> None:
    model = tmp_path / "vit"
    config = ViTConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    ViTForImageClassification(config).save_pretrained(model)
    check_pictures(run_on_pictures(tmp_path, model={"library": "transformers", "name": str(model)}))


def test_the_demonstration(tmp_path: Path) -> None:
    data = {"source": "demo", "test": "test", "options": {"train": 10, "val": 0, "test": 10}}
    model = {"library": "demo"}
    check_pictures(run_on_pictures(tmp_path, model=model, data=data, method="lora", steps=1))


@pytest.mark.parametrize("method", ["toast", "partial"])
def test_language(tmp_path: Path, method: str) -> None:
    options = {"name": "partial", "freeze": 1} if method == "partial" else method
    config = language(tmp_path, method=options, epochs=None, steps=1)
    run(config, "tune")
    found, loaded = pasted(config.folder), load_run(config.folder)
    with torch.inference_mode():
        expected = loaded.model.generate(**found["inputs"], max_new_tokens=20, do_sample=False)
    assert found["tokens"].tolist() == expected.tolist()
