"""The loop as an iterator, and the modes of the modules that it trains."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from tests.training.settings import TINY_RESNET, language, vision
from toast.training import loop
from toast.training.run import Run
from toast.training.run_config import RunConfig


def test_steps_are_made_when_they_are_asked_for(tmp_path: Path) -> None:
    run = Run(vision(tmp_path, epochs=4, micro_batches=2), "tune")
    before = copy.deepcopy(run.trained)
    steps = run.loop.steps(4)  # in the middle of the second epoch of three steps
    assert all(torch.equal(old, new) for old, new in zip(before, run.trained, strict=True))
    first = next(steps)
    assert (first.number, first.bad) == (5, [])
    assert first.losses.keys() == {"loss", "gradient_norm", "learning_rate"}
    assert not all(torch.equal(old, new) for old, new in zip(before, run.trained, strict=True))
    assert [step.number for step in steps] == list(range(6, 13))


@pytest.mark.parametrize("choice", ["stop", "skip"])
def test_a_step_that_is_not_finite_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choice: str
) -> None:
    run = Run(vision(tmp_path, on_nonfinite=choice), "tune")
    steps = run.loop.steps()
    next(steps)
    before, optimizer = copy.deepcopy(run.trained), copy.deepcopy(run.loop.optimizer.state_dict())
    monkeypatch.setattr(loop, "read", lambda parts: dict.fromkeys(parts, math.nan))
    bad = next(steps)
    assert bad.number == 2
    assert bad.bad == ["loss (nan)", "gradient norm (nan)"]
    assert all(torch.equal(old, new) for old, new in zip(before, run.trained, strict=True))
    assert all(parameter.grad is None for parameter in run.trained)
    now = run.loop.optimizer.state_dict()["state"]
    for number, held in optimizer["state"].items():
        assert all(torch.equal(held[name], now[number][name]) for name in held)


def _resnet(tmp_path: Path, **settings: Any) -> RunConfig:
    return vision(
        tmp_path, model=TINY_RESNET, method="linear", data__validation_share=0.25, batch_size=6,
        evaluation__before=True, **settings,
    )  # fmt: skip


def _norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}


@pytest.mark.parametrize("by_library", [False, True])
def test_what_is_in_evaluation_mode_stays_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_library: bool
) -> None:
    """Whether the model was made so, or somebody has put a part of it there before training begins."""
    create = timm.create_model

    def frozen(*args: Any, **kwargs: Any) -> nn.Module:
        model: Any = create(*args, **kwargs)
        model.layer1.eval()
        return model  # type: ignore[no-any-return]

    if by_library:
        monkeypatch.setattr(timm, "create_model", frozen)
    run = Run(_resnet(tmp_path), "tune")
    model: Any = run.accelerator.unwrap_model(run.objective).model
    if not by_library:
        model.layer1.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    assert not any(training for name, training in modes.items() if name.startswith("layer1"))
    assert all(training for name, training in modes.items() if not name.startswith("layer1"))
    before = {name: norm.running_mean.clone() for name, norm in _norms(model).items()}
    result = run.execute(resume=False)
    assert result["validation"] is not None
    assert {name: module.training for name, module in model.named_modules()} == modes
    for name, norm in _norms(model).items():
        assert torch.equal(norm.running_mean, before[name]) == name.startswith("layer1"), name


def test_a_model_that_comes_in_evaluation_mode_is_trained_in_training_mode(tmp_path: Path) -> None:
    for config in (
        language(tmp_path),
        language(tmp_path, method="lora"),
        vision(tmp_path, method="vpt-deep"),
    ):
        run = Run(config, "tune")
        assert all(module.training for module in run.objective.modules())
