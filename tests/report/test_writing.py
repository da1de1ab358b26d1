"""A report says what the run measured, shows where the model looks, and acts on nothing that it was given."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from tests.report.reports import Page, run_on_pictures
from tests.training.settings import instructions, language, vision
from toast.commands.errors import Commands
from toast.commands.report import report
from toast.evaluation.intervals import wilson
from toast.report.writing import write_report
from toast.training.run import run

Copy = Callable[[str], Path]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on pictures: TOAST, with predictions and validation, LoRA, VPT and both probes."""
    tmp = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    run_on_pictures(
        tmp, name="toast", method="toast", steps=None, epochs=2, data__validation_share=0.25,
        evaluation__predictions=True,
    )  # fmt: skip
    for method in ("lora", "vpt-deep", "linear", "attentive"):
        run_on_pictures(tmp, name=method, method=method)
    return tmp / "runs"


@pytest.fixture
def copy(runs: Path, tmp_path: Path) -> Copy:
    """Copies a run, to be damaged."""
    return lambda name: Path(shutil.copytree(runs / name, tmp_path / "copied" / name))


def page(place: Path, **options: int) -> Page:
    out = write_report(place, place.parent / f"{place.name}.html", **options)
    assert out.stat().st_size < 3e6
    return Page(out.read_text(encoding="utf-8"))


def test_a_report_says_what_the_run_measured(runs: Path) -> None:
    result = json.loads((runs / "toast" / "result.json").read_text())
    read = page(runs / "toast")
    test = result["test"]
    low, high = wilson(test["accuracy"], test["samples"])
    assert f"Accuracy{test['accuracy']:.3f}{low:.3f} to {high:.3f}, 95%" in read.text
    for name in ("loss", "mean_class_accuracy", "calibration_error"):
        assert f"{test[name]:.3f}" in read.text
    for group, count in result["trained"].items():
        assert any(row[0] == group and row[-1] == f"{count:,}" for row in read.rows)
    share = result["trainable_parameters"] / result["parameters"]
    assert (
        f"{result['trainable_parameters']:,} of {result['parameters']:,} parameters, {share:.1%}" in read.text
    )
    confusion = [row[1:] for row in read.rows if re.fullmatch(r"class\d \d", row[0])]
    assert [[int(cell or 0) for cell in row] for row in confusion] == test["confusion"]
    assert "18 train, 6 validation, 8 test, 3 classes" in read.text
    # 2 epochs are validated: loss and accuracy; the calibration has a dot for each bin that is not empty
    assert read.circles == 4 + len({int(c * 15) for c in confidences(runs / "toast")}) + 8
    assert "all 8 pictures of the test split" in read.text


def confidences(place: Path) -> list[float]:
    lines = (place / "predictions.jsonl").read_text().splitlines()
    return [max(json.loads(line)["probabilities"].values()) for line in lines]


def test_the_attention_of_the_report_is_that_of_the_measurement(runs: Path) -> None:
    """All 8 test pictures are looked at, so both are means of the same; the frozen model's is the probe's."""
    read = page(runs / "toast")
    (all_, *parts) = [row for row in read.rows if row[0] in ("all", "classified correctly", "misclassified")]
    held = {
        name: json.loads((runs / name / "result.json").read_text())["test"]["attention_on_target"]
        for name in ("toast", "linear")
    }
    assert all_[1] == "8"
    assert all_[2].startswith(f"{held['linear']:.3f} ± ")
    assert all_[3].startswith(f"{held['toast']:.3f} ± ")
    assert sum(int(row[1]) for row in parts) == 8


@pytest.mark.parametrize(
    ("name", "panels"),
    [
        ("toast", ["frozen", "selection", "refocused"]),
        ("lora", ["frozen", "tuned"]),
        ("vpt-deep", ["frozen", "tuned"]),
        ("linear", ["frozen"]),
        ("attentive", ["frozen", "pooling"]),
    ],
)
def test_every_method_shows_where_it_looks(
    runs: Path, monkeypatch: pytest.MonkeyPatch, name: str, panels: list[str]
) -> None:
    monkeypatch.setattr("toast.visual.looks.MOVED", 0.0)  # in so few steps, attention hardly moves
    read = page(runs / name, pictures=4)
    seen = [description.split()[0] for description, _ in read.images]
    assert seen == ["the", *panels] * 4
    assert all(max(image.size) == 240 for _, image in read.images)
    assert len(read.codes) == 2
    assert "cannot be shown" not in read.text


def test_a_run_that_has_not_ended_shows_what_is_there(copy: Copy) -> None:
    place = copy("toast")
    (place / "result.json").unlink()
    shutil.rmtree(place / "adapter")
    lines = (place / "metrics.jsonl").read_text().splitlines()
    (place / "metrics.jsonl").write_text("\n".join(lines[:4]) + '\n{"step": 4, "sp')
    read = page(place)
    assert "This run is not finished: 3 of 4 steps" in read.text
    assert f"toast tune {place.resolve()} --resume" in read.text
    assert "Training" in read.text
    assert not read.images
    assert not read.codes


def test_a_run_without_its_data_shows_its_figures(copy: Copy) -> None:
    place = copy("toast")
    config = place / "config.yaml"
    config.write_text(re.sub(r"root: .*pictures", "root: /gone", config.read_text()))
    read = page(place)
    assert "The data cannot be shown: " in read.text
    assert "Confusion" in read.text
    assert not read.images
    assert len(read.codes) == 2


def test_nothing_is_opened_if_no_pictures_are_wanted(copy: Copy) -> None:
    place = copy("toast")
    (place / "adapter" / "adapter_model.safetensors").write_bytes(b"damaged")
    assert "The model cannot be shown" not in page(place, pictures=0).text
    assert "The model cannot be shown" in page(place).text


def test_names_are_text_and_nothing_else(tmp_path: Path) -> None:
    """Classes, samples and rows that would be elements of the page, or leave an attribute."""
    evil = '"><img src=x onerror=alert(1)>&amp;'
    vision(tmp_path)
    for split in ("train", "test"):
        (tmp_path / "pictures" / split / "class1").rename(tmp_path / "pictures" / split / evil)
    place = tmp_path / "sweep" / "final" / evil / "seed-0"
    config = vision(
        tmp_path, out=str(place.parent), name="seed-0", method={"name": "toast"}, epochs=None, steps=1
    )
    result = run(config, "tune")
    result["bad_samples"] = {f"{evil}/0.png": evil}
    (place / "result.json").write_text(json.dumps(result))
    figures = {"mean": 0.5, "deviation": 0.25}
    line = {"test": {"accuracy": figures}, "trainable_parameters": 7, "step_seconds": 1.0}
    rows = {evil: line, "other": {**line, "test": {"accuracy": {**figures, "mean": 0.75}}}}
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"name": evil, "seeds": 3, "rows": rows}))
    read = page(place)
    assert read.text.count(evil) > 8
    assert read.marked == [evil]
    assert [row[1] for row in read.rows if row[0] in rows and "±" in row[1]] == [
        "0.500 ± 0.250",
        "0.750 ± 0.250",
    ]
    assert f"{evil}/0.png: {evil}" in read.text


def test_a_language_run_shows_its_tokens(tmp_path: Path) -> None:
    config = language(tmp_path, epochs=None, steps=1, data__block=64)
    run(config, "tune")
    read = page(config.folder)
    test = json.loads((config.folder / "result.json").read_text())["test"]
    assert f"Perplexity{test['perplexity']:.3f}" in read.text
    assert read.text.count("Selection weights") == 3
    assert len(read.codes) == 2


def test_generated_answers_have_figures(tmp_path: Path) -> None:
    settings = {"pattern": "x*", "max_new_tokens": 4, "limit": 2}
    config = instructions(tmp_path, method="full", epochs=None, steps=1, evaluation__format=settings)
    run(config, "tune")
    text = page(config.folder).text
    test = json.loads((config.folder / "result.json").read_text())["test"]
    assert f"Exact format{test['exact_format']:.3f}" in text
    assert f"F1 of lines{test['line_f1']:.3f}" in text


def test_what_is_no_run_is_refused(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a run: it has no config\.yaml"):
        write_report(tmp_path, tmp_path / "out.html")
    (tmp_path / "final").mkdir()
    with pytest.raises(ValueError, match="is a sweep; needs one of its runs"):
        write_report(tmp_path, tmp_path / "out.html")
    with pytest.raises(ValueError, match="pictures: needs 0 or more; got -1"):
        write_report(runs / "toast", tmp_path / "out.html", pictures=-1)
    assert not (tmp_path / "out.html").exists()


def test_the_command_writes_the_page_or_says_why_not(runs: Path, tmp_path: Path) -> None:
    app = typer.Typer(cls=Commands)
    app.command()(report)
    app.callback()(lambda: None)
    done = CliRunner().invoke(
        app, ["report", str(runs / "lora"), "--out", str(tmp_path / "x.html"), "--pictures", "1"]
    )
    assert done.exit_code == 0
    assert f"{tmp_path / 'x.html'}, 0." in done.stdout
    assert len(Page((tmp_path / "x.html").read_text()).images) == 3
    failed = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert failed.exit_code == 2
    assert "is not a run" in failed.stderr
