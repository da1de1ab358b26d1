"""What a run measures once beside its test split: further splits, and corrupted pictures."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.training.settings import language, vision
from toast.commands.train import summary
from toast.training.measuring import measure
from toast.training.run import run
from toast.training.run_config import RunConfig
from toast.training.sweeping import sweep

CORRUPTIONS = {"noise": [1, 5], "contrast": [3]}


def _config(tmp_path: Path, **settings: object) -> RunConfig:
    config = vision(tmp_path, evaluation__splits=["shift"], evaluation__corruptions=CORRUPTIONS, **settings)
    root = tmp_path / "pictures"
    for name in ("class0", "class1"):  # a part of the test split, so that figures differ
        shutil.copytree(root / "test" / name, root / "shift" / name, dirs_exist_ok=True)
    return config


def test_a_run_measures_all_of_it(tmp_path: Path) -> None:
    config = _config(tmp_path)
    result = run(config, "tune")
    assert result["splits"].keys() == {"shift"}
    shift = result["splits"]["shift"]
    assert shift["samples"] == len(list((tmp_path / "pictures" / "shift").rglob("*.png")))
    assert {name: list(found) for name, found in result["corrupted"].items()} == {
        "noise": ["1", "5"],
        "contrast": ["3"],
    }
    assert result["corrupted"]["noise"]["5"]["samples"] == result["test"]["samples"]
    losses = [found["loss"] for held in result["corrupted"].values() for found in held.values()]
    assert len({*losses, result["test"]["loss"], shift["loss"]}) == 5
    assert result["samples"]["images"]["shift"] == shift["samples"]
    said = summary(result, config.folder).splitlines()
    assert [line.partition(":")[0] for line in said[:-1]] == [
        "test", "shift", "test, noise 1", "test, noise 5", "test, contrast 3",
    ]  # fmt: skip

    again = measure(config.folder)
    assert again.pop("corrupted") == result["corrupted"]
    assert again.pop("classes") == ["class0", "class1", "class2"]
    assert len(again.pop("remarks")) == 2  # the folder of `shift` has no class2
    assert again == result["test"]
    assert measure(config.folder, split="shift").items() >= shift.items()
    with pytest.raises(ValueError, match=r"one of validation, test, shift; got 'other'.*evaluation\.sp"):
        measure(config.folder, split="other")


def test_a_run_that_has_ended_is_measured_under_corruption(tmp_path: Path) -> None:
    config = vision(tmp_path)
    assert not {"splits", "corrupted"} & run(config, "tune").keys()
    found = measure(config.folder, ["evaluation.corruptions={blur: [3]}"])
    assert list(found["corrupted"]) == ["blur"]
    assert found["corrupted"]["blur"]["3"]["loss"] != found["loss"]
    at = tmp_path / "predictions.jsonl"
    alone = measure(config.folder, ["evaluation.corruption=blur:3"], predictions=at)
    assert alone.pop("classes") == ["class0", "class1", "class2"]
    assert alone == found["corrupted"]["blur"]["3"]
    assert len(at.read_text().splitlines()) == alone["samples"]


def test_a_sweep_opens_them_for_the_chosen_settings_alone(tmp_path: Path) -> None:
    section = {"rows": {"linear": {"method": "linear"}}, "seeds": 2, "grid": {"batch_size": [8, 4]}}
    config = _config(tmp_path, name="sweep", sweep=section, data__validation_share=0.25)
    line = sweep(config)["rows"]["linear"]
    shift, noise = line["splits"]["shift"]["accuracy"], line["corrupted"]["noise"]["5"]["loss"]
    assert len(shift["seeds"]) == len(noise["seeds"]) == 2
    assert noise["mean"] == pytest.approx(sum(noise["seeds"]) / 2)
    for size in (8, 4):
        searched = (config.folder / "search" / "linear" / f"batch_size={size}" / "result.json").read_text()
        assert '"corrupted"' not in searched
        assert '"shift"' not in searched


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluation\.splits: test is set by data\.test"):
        run(vision(tmp_path, evaluation__splits=["test"]), "tune")
    with pytest.raises(ValueError, match=r"these measure the test split; name one with data\.test"):
        run(vision(tmp_path, data__test=None, evaluation__corruptions=CORRUPTIONS), "tune")
    with pytest.raises(ValueError, match="severity of blur: needs 1 to 5; got 9"):
        run(vision(tmp_path, evaluation__corruptions={"blur": [9]}), "tune")
    with pytest.raises(ValueError, match=r"evaluation\.corruption: .*; got 'blur'"):
        vision(tmp_path, evaluation__corruption="blur")
    with pytest.raises(ValueError, match="needs at most one of the two"):
        vision(tmp_path, evaluation__corruption="blur:3", evaluation__corruptions=CORRUPTIONS)
    with pytest.raises(ValueError, match="for vision; the task is language"):
        language(tmp_path, evaluation__corruptions=CORRUPTIONS)
