"""A sweep selects on the validation split, and never on the test split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
from safetensors.torch import save_file

from tests.training.settings import TINY_VIT, vision, write_pictures
from toast.training import sweeping as module
from toast.training.config_files import load_config, to_yaml
from toast.training.finite import Diverged
from toast.training.run_config import RunConfig
from toast.training.sweep_config import SweepConfig
from toast.training.sweeping import NoChoice, sweep

ROWS: dict[str, Any] = {
    "linear": {"method": "linear", "grid": {"optimizer.learning_rate": [1e-9, 0.1], "epochs": [2]}},
    "toast": {"method": {"name": "toast", "start": "pretune"}},
}


def _config(tmp_path: Path, **settings: Any) -> RunConfig:
    weights = tmp_path / "vit.safetensors"
    if not weights.is_file():
        save_file(timm.create_model(TINY_VIT["name"], **TINY_VIT["options"]).state_dict(), weights)
    settings = {"model.weights": str(weights), "model.pretrained": True, **settings}
    generic = vision(tmp_path, **{**settings, "name": "generic", "epochs": 1})
    (tmp_path / "generic.yaml").write_text(to_yaml(generic))
    section = {
        "rows": ROWS, "grid": {"optimizer.learning_rate": [1e-2]}, "seeds": 2,
        "pretune": str(tmp_path / "generic.yaml"),
        "select_by": "loss",
    }  # fmt: skip
    return vision(tmp_path, name="sweep", sweep=section, data__validation_share=0.25, **settings)


def test_a_sweep_selects_measures_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(tmp_path)
    runs: list[RunConfig] = []
    run = module.run

    def counted(config: RunConfig, *args: Any, **options: Any) -> Any:
        runs.append(config)
        return run(config, *args, **options)

    monkeypatch.setattr(module, "run", counted)
    table = sweep(config)["rows"]
    searches = [each for each in runs if "search" in each.out.parts]
    finals = [each for each in runs if "final" in each.out.parts]
    # The grid of the row `toast` has one point: there is nothing to choose.
    assert [each.data.test for each in searches] == [None] * 2
    assert (table["toast"]["validation"], table["toast"]["searched"]) == (None, [])
    assert {each.data.validation_share for each in finals} == {0.0}
    assert {each.data.test for each in finals} == {"test"}
    assert [each.seed for each in finals] == [0, 1, 0, 1]
    assert table["linear"]["chosen"] == {"optimizer.learning_rate": 0.1, "epochs": 2}
    accuracy = table["linear"]["test"]["accuracy"]
    results = [json.loads((each.folder / "result.json").read_text()) for each in finals[:2]]
    assert accuracy["seeds"] == [result["test"]["accuracy"] for result in results]
    assert accuracy["mean"] == pytest.approx(sum(accuracy["seeds"]) / 2)
    assert accuracy["deviation"] == pytest.approx(abs(accuracy["seeds"][0] - accuracy["seeds"][1]) / 2**0.5)
    assert results[0]["samples"]["images"] == {"train": 24, "test": 8}  # what was held out is trained on now

    stamps = {path: path.stat().st_mtime_ns for path in config.folder.rglob("adapter_model.safetensors")}
    (finals[-1].folder / "result.json").unlink()
    assert sweep(config)["rows"]["toast"]["test"] == table["toast"]["test"]
    changed = [p for p, stamp in stamps.items() if p.stat().st_mtime_ns != stamp]
    assert changed == [finals[-1].folder / "adapter" / "adapter_model.safetensors"]
    lines = (config.folder / "table.md").read_text().splitlines()
    assert lines[2].startswith("| linear | learning_rate 0.1, epochs 2 |")
    assert lines[3].startswith("| toast | learning_rate 0.01 | – |")


def test_results_of_other_settings_are_not_taken(tmp_path: Path) -> None:
    config = _config(tmp_path)
    assert config.sweep is not None
    config.sweep.rows, config.sweep.seeds, config.sweep.pretune = {"linear": ROWS["linear"]}, 1, None
    sweep(config)
    other = config.model_copy(update={"batch_size": 4})
    with pytest.raises(ValueError, match=r"holds a run of other settings: batch_size was 8, now 4"):
        sweep(other)


def test_the_loss_is_selected_by_its_least(tmp_path: Path) -> None:
    config = _config(tmp_path)
    assert config.sweep is not None
    config.sweep.rows, config.sweep.seeds, config.sweep.pretune = {"linear": ROWS["linear"]}, 1, None
    line = sweep(config)["rows"]["linear"]
    assert line["validation"] == min(line["searched"])
    config.sweep.select_by = "speed"
    with pytest.raises(ValueError, match=r"'speed' was not measured; there are .*accuracy"):
        sweep(config)


def test_a_search_with_several_seeds_takes_their_mean(tmp_path: Path) -> None:
    config = _config(tmp_path)
    assert config.sweep is not None
    config.sweep.rows, config.sweep.seeds, config.sweep.pretune = {"linear": ROWS["linear"]}, 1, None
    config.sweep.search_seeds = 2
    line = sweep(config)["rows"]["linear"]
    place = config.folder / "search" / "linear"
    names = [f"learning_rate={rate},epochs=2" for rate in (1e-9, 0.1)]
    assert {at.parent.name for at in place.glob("*/result.json")} == {
        name + further for name in names for further in ("", ",seed-1")
    }
    for value, name in zip(line["searched"], names, strict=True):
        runs = [place / name, place / f"{name},seed-1"]
        assert [load_config(each).seed for each in runs] == [0, 1]
        losses = [json.loads((each / "result.json").read_text())["validation"]["loss"] for each in runs]
        assert losses[0] != losses[1]
        assert value == pytest.approx(sum(losses) / 2)


def test_seeds_of_a_search_count_from_the_rows_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(tmp_path)
    assert config.sweep is not None
    config.sweep.rows = {"linear": ROWS["linear"] | {"seed": 3}}
    config.sweep.search_seeds, config.sweep.seeds = 3, 1
    sweep(config, dry_run=True)
    names = [Path(each).name for each in capsys.readouterr().out.splitlines()[:3]]
    assert [name.rpartition("epochs=2")[2] for name in names] == ["", ",seed-4", ",seed-5"]

    # A point with a seed that diverges is not chosen; the least loss is.
    losses = iter([None, {"loss": 1.0}, {"loss": 0.1}, {"loss": 1e308}, {"loss": 1e308}, {"loss": 2.0}])

    def run(config: RunConfig, *args: Any, **options: Any) -> Any:
        measured = next(losses)
        if measured is None:
            raise Diverged(1, 2, "the loss is nan", [], None)
        return {"validation": measured}

    monkeypatch.setattr(module, "run", run)
    with pytest.raises(NoChoice, match="at every point a run diverged, or measured no finite loss"):
        module.choose(config, module.make_row("linear", config.sweep.rows["linear"], config.sweep))


@pytest.mark.parametrize("grid", [{"epochs": []}, {"epochs": 3}, ["epochs"], None])
def test_a_grid_without_values_is_refused(grid: Any) -> None:
    with pytest.raises(ValueError, match=r"rows\.a\.grid: needs lists of values by dotted name.*got "):
        SweepConfig(rows={"a": {"grid": grid}})


def test_a_dry_run_lists_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = _config(tmp_path)
    sweep(config, dry_run=True)
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 2 + 4
    assert [Path(each).name for each in listed[-2:]] == [f"learning_rate=0.01,seed-{seed}" for seed in (0, 1)]
    assert not config.folder.exists()


def test_without_a_search_no_validation_split_is_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _config(tmp_path)
    assert config.sweep is not None
    config.sweep.rows = {"toast": ROWS["toast"]}
    sweep(config.model_copy(update={"data": vision(tmp_path).data}), dry_run=True)
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_faults_are_said_before_the_first_run(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures")
    with pytest.raises(ValueError, match="needs a section with rows"):
        sweep(vision(tmp_path))
    with pytest.raises(ValueError, match="needs a validation split"):
        sweep(_config(tmp_path).model_copy(update={"data": vision(tmp_path).data}))
    config = _config(tmp_path)
    assert config.sweep is not None
    config.sweep.pretune = None
    with pytest.raises(
        ValueError, match=r"sweep\.rows\.toast: method\.start is pretune, but sweep\.pretune names"
    ):
        sweep(config)
    for grid in ({"optimizer.learning_rat": [1e-3]}, {"optimizer.learning_rate": [-1]}):  # one point each
        config.sweep.rows = {"odd": {"method": "linear", "grid": grid}}
        with pytest.raises(ValueError, match=r"sweep\.rows\.odd:\s+optimizer\.learning_rat"):
            sweep(config)
    config.sweep.rows = {"odd": {"method": "odd"}}
    with pytest.raises(ValueError, match=r"sweep\.rows\.odd:\s+method\.name: .*got 'odd'"):
        sweep(config)
    assert not config.folder.exists()
