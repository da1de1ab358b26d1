"""A LoRA starts from one that was tuned on another task."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.settings import vision, write_pictures
from toast.training.loaded import load_run
from toast.training.preparing import prepare
from toast.training.run import run
from toast.training.run_config import RunConfig
from toast.training.sweeping import sweep

LORA = {"name": "lora", "rank": 2}


def _generic(tmp_path: Path, **settings: Any) -> RunConfig:
    """Returns a run over pictures of three classes."""
    return vision(tmp_path, name="generic", method=LORA, epochs=1, **settings)


def _narrower(tmp_path: Path) -> str:
    """Writes pictures of two classes; returns their folder."""
    root = write_pictures(tmp_path / "two")
    for split in ("train", "test"):
        shutil.rmtree(root / split / "class2")
    return str(root)


def _factors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if ".lora_" in name}


@pytest.mark.parametrize("within", ["", "adapter"])
def test_factors_are_taken_over_and_the_head_is_new(tmp_path: Path, within: str) -> None:
    generic = _generic(tmp_path)
    run(generic, "tune")
    wanted = _factors(load_run(generic.folder).model.state_dict())
    method = LORA | {"start": str(generic.folder / within)}
    config = vision(tmp_path, method=method, data__root=_narrower(tmp_path))
    method_made = prepare(config, "tune").method
    found = _factors(method_made.model.state_dict())
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert any(tensor.any() for name, tensor in wanted.items() if "lora_B" in name)
    fresh = vision(tmp_path, method=LORA, data__root=_narrower(tmp_path))
    same, own = (
        {name: p for name, p in each.model.named_parameters() if "modules_to_save" in name}
        for each in (prepare(fresh, "tune").method, method_made)
    )
    assert all(torch.equal(same[name], own[name]) for name in same)
    assert {p.shape[0] for p in own.values()} == {2}
    assert {group: sum(p.numel() for p in held.values()) for group, held in method_made.groups.items()} == {
        group: sum(p.numel() for p in held.values())
        for group, held in prepare(fresh, "tune").method.groups.items()
    }


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    generic = _generic(tmp_path)
    run(generic, "tune")
    toast_run = vision(tmp_path, name="toast", method="toast", epochs=1)
    run(toast_run, "tune")

    def refused(message: str, start: Path = generic.folder, **method: Any) -> None:
        config = vision(tmp_path, name="x", method=LORA | {"start": str(start)} | method)
        with pytest.raises(ValueError, match=message):
            prepare(config, "tune")

    refused(r"the LoRA in .*adapter has r=2, this one 3; needs the same", rank=3)
    refused(r"lora_alpha=2, this one 8", options={"lora_alpha": 8})
    refused(
        r"does not fit this model; of its tensors are 6 missing: .*fc1", options={"target_modules": ["fc1"]}
    )
    refused(r"adapter is an adapter of method toast; lora needs one of its own kind", toast_run.folder)
    refused(r"is an adapter of method lora; toast needs", name="toast", rank=None)
    refused(r"nowhere does not exist", tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match=r"start: belongs to lora, toast and toast-lite; the method is adapter"
    ):
        vision(tmp_path, method={"name": "adapter", "start": "x"})


def test_rows_of_a_sweep_start_from_what_was_tuned_on_labels(tmp_path: Path) -> None:
    from toast.training.config_files import to_yaml

    (tmp_path / "generic.yaml").write_text(to_yaml(_generic(tmp_path, stage="tune")))
    section = {
        "rows": {"LoRA, stage one": {"method": LORA | {"start": "pretune/lora"}}},
        "pretune": {"lora": str(tmp_path / "generic.yaml")},
        "seeds": 1,
    }
    config = vision(tmp_path, name="sweep", sweep=section, data__validation_share=0.25, epochs=1)
    assert "LoRA, stage one" in sweep(config)["rows"]
    stage_one = config.folder / "pretune" / "lora"
    assert load_run(stage_one).config.method.name == "lora"
    assert (stage_one / "result.json").is_file()
