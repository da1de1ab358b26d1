"""A loss that is no finite number: the step is named with its samples, and nothing bad is kept or chosen."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.processes import on_two_processes
from tests.training.settings import language, losses, vision
from toast.data.vision import VisionDataset
from toast.evaluation.choosing import best_of
from toast.files.atomic import strict_json
from toast.training.checkpoints import newest_checkpoint
from toast.training.config_files import load_config
from toast.training.finite import Diverged
from toast.training.loop import Loop, Step
from toast.training.order import EpochBatches
from toast.training.run import run
from toast.training.run_config import RunConfig
from toast.training.sweeping import sweep

_READ = VisionDataset.__getitem__


def _nan_in(monkeypatch: pytest.MonkeyPatch, epoch: int, index: int) -> str:
    """Puts one NaN into a training picture of an epoch; returns the end of its name."""

    def read(self: VisionDataset, key: Any) -> dict[str, Any]:
        item = _READ(self, key)
        if key == (epoch, index):
            item["pixels"][0, 3, 3] = math.nan
        return item

    monkeypatch.setattr(VisionDataset, "__getitem__", read)
    return f"class{index // 8}/"


def _step_of(epoch: int, index: int) -> int:
    order = EpochBatches(24, 8)
    return next(step for step in range(3 * epoch, 3 * epoch + 3) if (epoch, index) in order.keys(step))


def _trained(place: Path) -> dict[str, torch.Tensor]:
    return load_file(place / "trained.safetensors")


@pytest.mark.parametrize("settings", [{}, {"optimizer.clip": None}, {"micro_batches": 2}], ids=str)
def test_a_nan_in_a_picture_stops_the_run_before_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    config = vision(tmp_path, epochs=3, **settings)
    _nan_in(monkeypatch, 1, 10)
    bad = _step_of(1, 10)
    with pytest.raises(
        Diverged, match=rf"step {bad + 1} of 9: the loss \(nan\).*samples: .*class1/.*finite"
    ) as caught:
        run(config, "tune")
    assert caught.value.step == bad + 1
    newest = newest_checkpoint(config.folder / "checkpoints")
    assert newest is not None and newest.name == f"step-{bad:08d}" and str(newest) in str(caught.value)
    assert all(tensor.isfinite().all() for tensor in _trained(newest).values())
    assert len(losses(config.folder)) == bad
    assert not (config.folder / "result.json").exists() and not (config.folder / "adapter").exists()
    monkeypatch.setattr(VisionDataset, "__getitem__", _READ)
    run(config, "tune", resume=True)
    whole = vision(tmp_path, name="whole", epochs=3, **settings)
    run(whole, "tune")
    assert losses(config.folder) == losses(whole.folder)


@pytest.mark.parametrize("resumed", [False, True])
def test_steps_are_left_out_if_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumed: bool
) -> None:
    _nan_in(monkeypatch, 1, 10)
    bad = _step_of(1, 10)
    if resumed:
        with pytest.raises(Diverged):
            run(vision(tmp_path, epochs=3), "tune")
    config = vision(tmp_path, epochs=3, on_nonfinite="skip")
    result = run(config, "tune", resume=resumed)
    assert list(result["skipped_steps"]) == [str(bad + 1)]
    (name,) = result["skipped_steps"][str(bad + 1)]
    assert "class1/" in name and name.endswith("(holds numbers that are not finite)")
    assert len(losses(config.folder)) == 8
    assert result["test"]["loss"] > 0


def test_an_exploding_run_ends_without_an_adapter(tmp_path: Path) -> None:
    config = language(tmp_path, optimizer={"name": "sgd", "learning_rate": 1e30, "clip": None, "warm_up": 0})
    with pytest.raises(
        Diverged, match=r"step 2 of 6: the .*not finite.*Its samples: row \d+, .*learning_rate"
    ):
        run(config, "tune")
    assert not (config.folder / "adapter").exists()


def test_what_is_read_with_the_log_comes_to_light_before_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator, where a look at each step would wait for the device."""
    monkeypatch.setattr(Loop, "is_watched", property(lambda self: False))
    config = vision(tmp_path, epochs=3)
    _nan_in(monkeypatch, 1, 10)
    bad = _step_of(1, 10)
    with pytest.raises(Diverged, match=rf"step {bad + 1} of 9: .*step-00000003 is from before"):
        run(config, "tune")
    assert len(losses(config.folder)) == bad
    (only,) = (config.folder / "checkpoints").iterdir()
    assert all(tensor.isfinite().all() for tensor in _trained(only).values())


def test_weights_that_are_not_finite_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A last step that overflows has a finite loss."""
    steps = Loop.steps

    def broken(self: Loop, start: int = 0) -> Iterator[Step]:
        for step in steps(self, start):
            if step.number == 6:
                self.trained[0].data[0] = math.inf
            yield step

    monkeypatch.setattr(Loop, "steps", broken)
    config = vision(tmp_path)
    with pytest.raises(
        Diverged, match=r"step 6 of 6: the weights after the step are not finite.*step-00000003"
    ):
        run(config, "tune")
    assert [path.name for path in (config.folder / "checkpoints").iterdir()] == ["step-00000003"]


def test_two_processes_stop_together(tmp_path: Path) -> None:
    config = vision(tmp_path, optimizer={"name": "sgd", "learning_rate": 1e30, "clip": None, "warm_up": 0})
    with pytest.raises(Exception, match=r"Diverged: step 2 of 6"):
        on_two_processes(config)
    assert newest_checkpoint(config.folder / "checkpoints") is not None


def test_a_diverged_point_is_never_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert best_of([math.nan, 5.58, math.inf], "loss") == 1
    assert best_of([math.nan, 0.2, 0.5], "accuracy") == 2
    assert best_of([math.nan], "loss") is None
    rates = {"optimizer.learning_rate": [1e30, 1e-2]}
    shared = {"optimizer.name": "sgd", "optimizer.clip": None, "optimizer.warm_up": 0}
    section = {"rows": {"linear": {"method": "linear"}}, "grid": rates, "seeds": 1, "select_by": "loss"}
    config = vision(tmp_path, name="sweep", sweep=section, data__validation_share=0.25, **shared)
    line = sweep(config)["rows"]["linear"]
    assert line["chosen"] == {"optimizer.learning_rate": 1e-2}
    assert "diverged: step 2 of" in capsys.readouterr().out
    table = (config.folder / "sweep.json").read_text()
    assert json.loads(table, parse_constant=pytest.fail)["rows"]["linear"]["searched"][0] is None
    assert config.sweep is not None
    for diverging, message in (
        ([1e30, 1e29], "at every point a run diverged"),
        ([1e30], "the chosen point diverged"),
    ):
        config.sweep.grid = {"optimizer.learning_rate": diverging}
        with pytest.raises(ValueError, match=rf"rows\.linear: {message}"):
            sweep(config)


def test_json_is_strict() -> None:
    held = {"a": math.nan, "b": [1.0, (-math.inf, 2)], "c": {"d": math.inf, "e": "NaN"}}
    assert json.loads(strict_json(held), parse_constant=pytest.fail) == {
        "a": None, "b": [1.0, [None, 2]], "c": {"d": None, "e": "NaN"},
    }  # fmt: skip


def test_the_choice_is_recorded_and_may_change(tmp_path: Path) -> None:
    config: RunConfig = vision(tmp_path, epochs=1)
    run(config, "tune")
    assert load_config(config.folder).on_nonfinite == "stop"
    assert run(vision(tmp_path, epochs=1, on_nonfinite="skip"), "tune", resume=True)["skipped_steps"] == {}
