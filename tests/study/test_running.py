"""A study runs what has no line yet, and nothing twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.study.studies import Runs, study
from toast.study import running
from toast.study.lines import append_line, read_lines, read_pictures
from toast.study.running import run_study
from toast.training import sweeping
from toast.training.run_config import RunConfig

CURVE = {"curve": {"data.limit": [12, 24]}, "choose_at": 24, "tasks": {"a": {}, "b": {"batch_size": 4}}}


def _with(monkeypatch: pytest.MonkeyPatch, runs: Runs) -> Runs:
    monkeypatch.setattr(running, "run", runs)
    monkeypatch.setattr(sweeping, "run", runs)
    return runs


def _lines(tmp_path: Path) -> list[dict[str, Any]]:
    return read_lines(tmp_path / "results" / "small.jsonl")


def _run(config: RunConfig, tmp_path: Path, **options: Any) -> int:
    return run_study(config, results=tmp_path / "results", **options)


def test_a_line_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = _with(monkeypatch, Runs())
    assert _run(study(tmp_path), tmp_path) == 4
    assert runs.names == [
        "all/search/linear/learning_rate=0.001",
        "all/search/linear/learning_rate=0.01",
        "all/final/linear/learning_rate=0.01,seed-0",
        "all/final/linear/learning_rate=0.01,seed-1",
        "runs/small/pretune/top",
        "all/final/toast/learning_rate=0.01,seed-0",
        "all/final/toast/learning_rate=0.01,seed-1",
    ]
    opened = [each.data.test for each in runs.asked if "search" in each.out.parts]
    assert opened == [None, None]
    line = _lines(tmp_path)[1]
    assert line["chosen"] == {"optimizer.learning_rate": 1e-2}
    assert (line["task"], line["row"], line["point"], line["seed"]) == ("small", "linear", None, 1)
    assert line["test"] == {"accuracy": 0.55, "loss": 1.0}
    assert (line["validation"], line["steps"], line["step_seconds"]) == (0.5, 10, 0.5)
    assert line["median_step_seconds"] == 0.4
    assert (line["trainable_parameters"], line["trained_on"]) == (123, 24)
    pictures = read_pictures(tmp_path / "results" / line["pictures"])
    assert pictures.correct.mean() == 0.55
    assert pictures.attention[[0, -1]].tolist() == [0, 1]
    assert runs.asked[-1].method.start == tmp_path / "runs/small/pretune/top/adapter"
    assert runs.asked[-1].method.options == {"steer_from": 1}
    assert not list(tmp_path.rglob("final/*/*/checkpoints"))
    assert not list(tmp_path.rglob("search/*/*/checkpoints"))


def test_a_curve_is_chosen_at_one_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = _with(monkeypatch, Runs())
    assert _run(study(tmp_path, CURVE), tmp_path) == 16
    searched = [(each.data.limit, each.batch_size) for each in runs.asked if "search" in each.out.parts]
    assert searched == [(24, 8)] * 2 + [(24, 4)] * 2
    final = [each for each in runs.asked if "final" in each.out.parts]
    assert [each.data.limit for each in final] == [24] * 8 + [
        12
    ] * 8  # where others' settings come from first
    assert len({each.folder for each in final}) == 16
    assert sum("generic" in str(each.name) or each.name == "top" for each in runs.asked) == 1
    stored = {each.first_pass.folder for each in runs.asked if each.name != "top"}
    assert stored == {tmp_path / "runs/small/first-pass"}


@pytest.mark.parametrize("stop", [0, 2, 3, 4, 6])
def test_a_study_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    runs = _with(monkeypatch, Runs(stop, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        _run(study(tmp_path), tmp_path)
    assert len(runs.asked) == stop
    before = len(_lines(tmp_path))
    assert before + _run(study(tmp_path), tmp_path) == 4
    assert len(runs.asked) == 7
    assert _run(study(tmp_path), tmp_path) == 0
    assert len(runs.asked) == 7


def test_lines_are_enough_where_the_runs_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = _with(monkeypatch, Runs())
    _run(study(tmp_path, CURVE), tmp_path, only=["linear"])
    path = tmp_path / "results" / "small.jsonl"
    kept = [line for line in _lines(tmp_path) if line["point"] == 24 or line["seed"] == 0]
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    (tmp_path / "runs").rename(tmp_path / "gone")
    before = len(runs.asked)
    assert _run(study(tmp_path, CURVE), tmp_path, only=["lin*"]) == 2
    assert [each.name for each in runs.asked[before:]] == ["learning_rate=0.01,seed-1"] * 2


def test_a_row_that_fails_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _with(monkeypatch, Runs(2, ValueError("no room")))
    with pytest.raises(ValueError, match=r"the others are done:\n  small: linear: no room"):
        _run(study(tmp_path), tmp_path)
    assert {line["row"] for line in _lines(tmp_path)} == {"toast"}
    assert _run(study(tmp_path), tmp_path) == 2


def test_other_settings_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = _with(monkeypatch, Runs())
    _run(study(tmp_path), tmp_path)
    count = len(runs.asked)
    with pytest.raises(ValueError, match=r"small\.jsonl holds linear \(small\) of other settings"):
        _run(study(tmp_path, epochs=3), tmp_path)
    more = study(tmp_path)
    assert more.sweep is not None
    more.sweep.seeds = 3  # more of the same
    assert _run(more, tmp_path) == 2
    assert len(runs.asked) == count + 2
    text = (tmp_path / "generic.yaml").read_text()
    (tmp_path / "generic.yaml").write_text(text.replace("epochs: 1", "epochs: 2"))
    with pytest.raises(ValueError, match=r"holds toast \(small\) of other settings"):
        _run(more, tmp_path)


def test_lines_hold_wherever_the_files_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that an environment variable names may be another; what is in it may not."""
    config = study(tmp_path)
    _with(monkeypatch, Runs())

    def at(root: str, assets: Path) -> RunConfig:
        monkeypatch.setenv("ASSETS", str(assets))
        data = config.data.model_copy(update={"root": assets / root})
        return config.model_copy(update={"data": data})

    _run(at("pictures", tmp_path), tmp_path, only=["linear"])
    assert _run(at("pictures", Path("some/where")), tmp_path, only=["linear"]) == 0
    with pytest.raises(ValueError, match="of other settings"):
        _run(at("other/pictures", tmp_path), tmp_path, only=["linear"])


def test_a_task_leaves_no_settings_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = _with(monkeypatch, Runs())
    config = study(tmp_path, {"tasks": {"a": {"method.options.select_from": 1}, "b": {}}})
    assert config.sweep is not None
    _run(config, tmp_path, only=["toast"])
    options = {each.folder.parts[-5]: each.method.options for each in runs.asked if each.method.start}
    assert options["a"] == {"steer_from": 1, "select_from": 1}
    assert options["b"] == {"steer_from": 1}


def test_further_evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _with(monkeypatch, Runs())
    asked = []

    def measure(place: Path, overrides: list[str], split: str, predictions: Path) -> dict[str, Any]:
        asked.append((place.name, overrides, split))
        predictions.write_text('{"index": 0, "label": "a", "predicted": "a"}\n')
        return {"accuracy": 1.0, "confusion": [[1]]}

    monkeypatch.setattr(running, "measure", measure)
    _run(study(tmp_path), tmp_path, only=["linear"])
    config = study(tmp_path, {"evaluations": {"blurred": {"data.options.blur": 2, "data.name": "x"}}})
    assert _run(config, tmp_path, only=["linear"]) == 2
    assert asked == [
        (f"learning_rate=0.01,seed-{seed}", ["data.options.blur=2", 'data.name="x"'], "test")
        for seed in (0, 1)
    ]
    line = _lines(tmp_path)[-1]
    assert (line["evaluation"], line["test"], line["steps"]) == ("blurred", {"accuracy": 1.0}, 10)
    assert len(read_pictures(tmp_path / "results" / line["pictures"]).index) == 1
    assert _run(config, tmp_path, only=["linear"]) == 0


def test_faults_are_said_before_the_first_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = _with(monkeypatch, Runs())
    with pytest.raises(ValueError, match="only: 'lora' matches none of linear, toast"):
        _run(study(tmp_path), tmp_path, only=["lora"])
    with pytest.raises(ValueError, match=r"study\.reference: needs one of linear, toast; got 'lora'"):
        _run(study(tmp_path, {"reference": "lora"}), tmp_path)
    with pytest.raises(ValueError, match=r"choose_at: needs a value of the curve, \[1, 2\]; got 3"):
        _run(study(tmp_path, {"curve": {"seed": [1, 2]}, "choose_at": 3}), tmp_path)
    with pytest.raises(
        ValueError, match=r"linear: the grid searches optimizer\.learning_rate, which cells set"
    ):
        _run(study(tmp_path, {"curve": {"optimizer.learning_rate": [1]}}), tmp_path)
    with pytest.raises(ValueError, match="study: needs a section"):
        _run(study(tmp_path).model_copy(update={"study": None}), tmp_path)
    config = study(tmp_path)
    assert config.sweep is not None
    config.sweep.pretune = {"all": tmp_path / "generic.yaml"}
    with pytest.raises(ValueError, match=r"method\.start is pretune/top, but sweep\.pretune names all"):
        _run(config, tmp_path)
    config.sweep.pretune = {"top": tmp_path / "nowhere.yaml"}
    with pytest.raises(ValueError, match=r"nowhere\.yaml does not exist"):
        _run(config, tmp_path)
    assert not runs.asked


def test_a_dry_run_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = _with(monkeypatch, Runs())
    _run(study(tmp_path), tmp_path, only=["linear"])
    capsys.readouterr()
    _run(study(tmp_path), tmp_path, dry_run=True)
    assert capsys.readouterr().out == "small: toast, seed 0, 1\n"
    assert len(runs.asked) == 4


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    line = {"task": "a", "row": "b", "point": 1, "seed": 0, "evaluation": None}
    append_line(path, line)
    path.write_text(path.read_text() + '{"task": "a", "ro')
    append_line(path, line | {"seed": 1})
    append_line(path, line | {"steps": 3})
    assert read_lines(path) == [line | {"steps": 3}, line | {"seed": 1}]
