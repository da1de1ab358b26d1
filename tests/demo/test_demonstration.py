"""The demonstration from end to end on a few pictures: runs of the training program, and what they give."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from toast.demo import demonstration as demo
from toast.demo.demonstration import COLUMNS, run
from toast.demo.runs import PRETUNE, Size, runs
from toast.training.interrupts import Interrupted
from toast.training.loaded import load_run
from toast.training.measuring import measure

SIZE = Size(train=32, test=10, generic=32, share=0.01)
ROWS = ["linear", "lora", "toast", "toast-lite", "toast-top-half"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The demonstration's folder and what it printed, after a step of everything."""
    out = tmp_path_factory.mktemp("demo") / "results"
    return out, printed(out)


def printed(out: Path) -> str:
    """Runs it and returns what it prints on a terminal of 80 columns."""
    console = Console(record=True, width=80, file=io.StringIO())
    run(out, SIZE, console=console)
    return console.export_text()


def test_the_folder_holds_what_was_promised(finished: tuple[Path, str]) -> None:
    out, said = finished
    result = json.loads((out / "result.json").read_text())
    assert list(result["methods"]) == ROWS
    for name, row in result["methods"].items():
        steered = name.startswith("toast")
        wanted = {figure for _, figures, _ in COLUMNS for figure in figures}
        selection = {figure for figure in wanted if figure.startswith("selection")}
        assert row.keys() >= (wanted if steered else wanted - selection)
        assert steered == ("selection_inside" in row)
        assert 0 < row["attention_on_target"] < 1
        assert 0 < row["median_step_seconds"] < row["seconds"]
        assert row["title"] in said
    assert 0.12 < result["box_share_of_area"] < 0.16
    assert (out / "attention.png").read_bytes().startswith(b"\x89PNG")
    assert str(out / "attention.png") in said.replace("\n", "")
    assert not list(out.glob(".*"))  # nothing half-written is left
    assert not (out / "first-pass").exists()
    assert "…" not in said  # the table fits


def test_its_runs_are_those_of_the_training_program(finished: tuple[Path, str]) -> None:
    out, _ = finished
    rows = json.loads((out / "result.json").read_text())["methods"]
    for name in ("toast", "toast-top-half"):
        loaded = load_run(out / name)
        assert loaded.config.method.start == out / PRETUNE / "adapter"
        measured = measure(out / name)
        for figure in ("accuracy", "attention_on_target", "selection_inside"):
            assert measured[figure] == pytest.approx(rows[name][figure], abs=1e-6)
    top = load_run(out / "toast-top-half").model.peft_config["default"]
    assert (top.steer_from, top.select_from) == (6, 9)


def test_a_second_call_does_nothing_again(
    finished: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, said = finished
    monkeypatch.setattr("toast.training.run.Run", None)
    assert printed(out) == said
    with pytest.raises(ValueError, match=r"pretune holds a run of other settings: .*seed was 0, now 1"):
        run(out, SIZE, seed=1, console=Console(file=io.StringIO()))


def test_an_interruption_says_that_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*args: object, **options: object) -> None:
        raise Interrupted(2, "interrupted after 3 of 6 steps")

    monkeypatch.setattr(demo, "train", stopped)
    with pytest.raises(Interrupted, match=r"interrupted in .*pretune/; the same command continues") as caught:
        run(tmp_path, SIZE, console=Console(file=io.StringIO()))
    assert caught.value.signal_number == 2


def test_the_runs_follow_size_and_seed(tmp_path: Path) -> None:
    pretune, rows = runs(tmp_path, Size(train=100, test=50, generic=70, share=2.0), seed=3)
    assert list(rows) == ROWS
    for config in (pretune, *(row.config for row in rows.values())):
        assert config.seed == config.data.options["seed"] == 3
        assert config.trackers == []
    assert pretune.folder == tmp_path / "pretune"
    assert (pretune.data.train, pretune.data.options["generic"]) == ("generic", 70)
    assert rows["toast"].config.epochs == 6
    assert rows["linear"].config.optimizer.learning_rate == 1e-2
    assert rows["lora"].config.optimizer.learning_rate == pretune.optimizer.rates["head"] == 3e-3
    assert rows["toast-top-half"].config.first_pass.mode == "cached"
