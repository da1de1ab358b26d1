"""Measuring before training, keeping the best measurement, and stopping early, resumed to the bit."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from tests.training.processes import on_two_processes
from tests.training.settings import losses, vision
from toast.evaluation.choosing import best_of
from toast.training import measurements
from toast.training.best import Best
from toast.training.interrupts import Interrupted
from toast.training.log import Log
from toast.training.run import run
from toast.training.run_config import RunConfig
from toast.training.split_measures import Measured

#: Three steps an epoch on 24 pictures, of which six are held out to select.
SETTINGS = {"data.validation_share": 0.25, "batch_size": 6, "epochs": 5}
MEASURE = measurements.evaluate


def _adapter(config: RunConfig) -> dict[str, torch.Tensor]:
    return load_file(config.folder / "adapter" / "adapter_model.safetensors")


def _result(config: RunConfig) -> dict[str, Any]:
    held: dict[str, Any] = json.loads((config.folder / "result.json").read_text())
    return held


def _give(monkeypatch: pytest.MonkeyPatch, values: dict[int, float]) -> None:
    """Lets the validation split's accuracy be what a test wants, by the number of the measurement."""
    count = iter(range(1, 100))

    def evaluate(*args: Any, **options: Any) -> Measured | None:
        found = MEASURE(*args, **options)
        if found is not None and options["name"] == "validation":
            found.metrics["accuracy"] = values[next(count)]
        return found

    monkeypatch.setattr(measurements, "evaluate", evaluate)


def test_before_is_what_the_untrained_model_gives(tmp_path: Path) -> None:
    plain = vision(tmp_path, name="plain", data__validation_share=0.25, epochs=1)
    run(plain, "tune")
    both = vision(tmp_path, name="both", data__validation_share=0.25, epochs=1, evaluation__before=True)
    result = run(both, "tune")
    assert losses(both.folder) == losses(plain.folder)  # measuring draws nothing
    assert result["test"] == _result(plain)["test"]
    assert "before" not in _result(plain)
    before = result["before"]
    assert before.keys() == {"validation", "test"}
    assert before["test"]["samples"] == result["test"]["samples"] == 8
    assert before["test"]["loss"] == pytest.approx(math.log(3), abs=0.3)
    assert result["test"]["loss"] < before["test"]["loss"]


def test_what_is_not_measured_at_the_end_is_not_measured_before(tmp_path: Path) -> None:
    result = run(vision(tmp_path, epochs=1, evaluation__before=True), "tune")
    assert result["before"].keys() == {"test"}
    result = run(vision(tmp_path, name="none", epochs=1, evaluation__before=True, data__test=None), "tune")
    assert "before" not in result


def test_the_best_is_saved_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = vision(tmp_path, name="short", **SETTINGS, checkpoint__keep=9)
    _give(monkeypatch, dict(enumerate([0.2, 0.5, 0.4, 0.5, 0.1], 1)))
    run(short, "tune")
    _give(monkeypatch, dict(enumerate([0.2, 0.5, 0.4, 0.5, 0.1], 1)))
    best = vision(tmp_path, name="best", **SETTINGS, checkpoint__best="accuracy")
    result = run(best, "tune")
    assert result["best"] == {"measure": "accuracy", "value": 0.5, "step": 6, "stopped_early": False}
    assert result["steps"] == 15
    assert result["validation"]["accuracy"] == 0.5
    assert losses(best.folder) == losses(short.folder)
    wanted = load_file(short.folder / "checkpoints" / "step-00000006" / "trained.safetensors")
    saved = _adapter(best)
    embedding = next(name for name in saved if "task_embedding" in name)
    (held,) = (tensor for name, tensor in wanted.items() if "task_embedding" in name)
    assert saved[embedding].equal(held)
    assert not _adapter(short)[embedding].equal(held)


def test_training_is_over_when_nothing_gets_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _give(monkeypatch, dict(enumerate([0.3, 0.4, math.nan, 0.4, 0.9], 1)))
    settings = {**SETTINGS, "checkpoint.best": "accuracy", "checkpoint.patience": 2}
    config = vision(tmp_path, **settings)
    result = run(config, "tune")
    assert result["steps"] == len(losses(config.folder)) == 12
    assert result["best"] == {"measure": "accuracy", "value": 0.4, "step": 6, "stopped_early": True}
    said = capsys.readouterr().out
    assert "stopped after 12 of 15 steps: 2 measurements without a better accuracy" in said
    assert "the adapter is that of step 6, whose accuracy was best: 0.4000" in said


@pytest.mark.parametrize("stop_at", [4, 7, 12])
def test_a_stopped_run_ends_as_one_that_went_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    """Before the best measurement, behind it, and at the step after which training is over."""
    values = [0.3, 0.4, 0.35, 0.4, 0.9]
    settings = {
        **SETTINGS, "checkpoint.best": "accuracy", "checkpoint.patience": 2, "evaluation.before": True,
        "augment.preset": "flip",
    }  # fmt: skip
    whole = vision(tmp_path, name="whole", **settings)
    _give(monkeypatch, dict(enumerate([0.9, *values], 1)))  # the first is from before training
    run(whole, "tune")
    _give(monkeypatch, dict(enumerate([0.9, *values], 1)))
    stopped = vision(tmp_path, name="stopped", **settings)
    note = Log.note

    def note_and_stop(self: Log, step: int, losses: Any) -> None:
        note(self, step, losses)
        if step == stop_at:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Log, "note", note_and_stop)
        with pytest.raises(Interrupted):
            run(stopped, "tune")
    run(stopped, "tune", resume=True)
    a, b = _adapter(stopped), _adapter(whole)
    assert a.keys() == b.keys()
    assert all(a[name].equal(b[name]) for name in b)
    assert losses(stopped.folder) == losses(whole.folder)
    for key in ("best", "before", "validation", "test", "steps"):
        assert _result(stopped)[key] == _result(whole)[key], key
    assert _result(whole)["best"]["step"] == 6


def test_a_checkpoint_without_its_best_is_damaged(tmp_path: Path) -> None:
    config = vision(tmp_path, **SETTINGS, checkpoint__best="loss")
    run(config, "tune")
    (config.folder / "result.json").unlink()
    (checkpoint,) = (config.folder / "checkpoints").iterdir()
    (checkpoint / "best.safetensors").unlink()
    with pytest.raises(ValueError, match=r"best\.safetensors does not exist"):
        run(config, "tune", resume=True)


def test_two_processes_choose_as_one(tmp_path: Path) -> None:
    settings = {**SETTINGS, "checkpoint.best": "loss", "optimizer.name": "sgd"}
    one = vision(tmp_path, name="one", **settings)
    run(one, "tune")
    two = vision(tmp_path, name="two", **settings)
    on_two_processes(two)
    assert _result(two)["best"]["step"] == _result(one)["best"]["step"]
    for name, tensor in _adapter(one).items():
        torch.testing.assert_close(_adapter(two)[name], tensor, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoint.best": "acuracy"}, r"checkpoint\.best: needs one of accuracy, .*; got 'acuracy'"),
        ({"checkpoint.best": "perplexity"}, r"checkpoint\.best: needs one of accuracy"),
        ({"data.validation_share": 0, "checkpoint.best": "loss"}, "needs a validation split"),
        ({"checkpoint.best": "loss", "evaluation.every": 0}, r"evaluation\.every is 0"),
        ({"checkpoint.patience": 2}, r"checkpoint: patience: needs best"),
        ({"checkpoint.best": "loss", "checkpoint.patience": 0}, r"checkpoint\.patience"),
    ],
)
def test_what_cannot_choose_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vision(tmp_path, **{**SETTINGS, **settings})


def test_a_measure_that_the_data_have_not_is_named(tmp_path: Path) -> None:
    config = vision(tmp_path, **SETTINGS, checkpoint__best="attention_on_target")
    with pytest.raises(ValueError, match=r"attention_on_target was not measured .*; choose one of loss"):
        run(config, "tune")


def test_the_choice_may_not_change_when_a_run_goes_on(tmp_path: Path) -> None:
    config = vision(tmp_path, **SETTINGS)
    run(config, "tune")
    (config.folder / "result.json").unlink()
    other = vision(tmp_path, **SETTINGS, checkpoint__best="loss")
    with pytest.raises(ValueError, match=r"checkpoint\.best was None, now loss"):
        run(other, "tune", resume=True)
    best = vision(tmp_path, name="best", **SETTINGS, checkpoint__best="loss")
    run(best, "tune")
    (best.folder / "result.json").unlink()
    seldom = vision(tmp_path, name="best", **SETTINGS, checkpoint__best="loss", evaluation__every=2)
    with pytest.raises(ValueError, match=r"evaluation\.every was 1, now 2"):
        run(seldom, "tune", resume=True)


def test_the_first_of_equals_is_the_best() -> None:
    assert best_of([0.2, 0.5, math.nan, 0.5], "accuracy") == 1
    assert best_of([0.2, 0.1, math.inf, 0.1], "calibration_error") == 1
    best = Best(Accelerator(), torch.nn.Linear(1, 1), None, None)
    assert not best.note(1, {"accuracy": 1.0})
    assert best.summary() == {}
