"""The commands that train, as their user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.training.settings import language, vision
from toast.cli import app
from toast.training.config_files import to_yaml
from toast.training.dry_run import dry_run
from toast.training.run import run


def _call(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exit_code == 1 and done.exception is not None:
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


def test_tune_evaluate_and_resume(tmp_path: Path) -> None:
    config = vision(tmp_path)
    place = tmp_path / "tune.yaml"
    place.write_text(to_yaml(config))
    code, out, _ = _call("tune", place, "method=lora", "name=lora")
    assert code == 0
    assert f"results are in {tmp_path}/runs/lora/" in out.replace("\n", "")
    result = json.loads((tmp_path / "runs/lora/result.json").read_text())
    assert f"test: loss {result['test']['loss']:.4f}" in out

    code, out, _ = _call("evaluate", tmp_path / "runs/lora", "--predictions", tmp_path / "p.jsonl")
    assert code == 0
    assert json.loads(out[out.index("{") :])["accuracy"] == pytest.approx(result["test"]["accuracy"])
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 8

    code, _, error = _call("tune", place, "method=lora", "name=lora")
    assert code == 2 and "holds a run already" in error
    assert _call("tune", place, "method=lora", "name=lora", "--resume")[0] == 0


def test_faults_end_with_a_message(tmp_path: Path) -> None:
    place = tmp_path / "tune.yaml"
    place.write_text(to_yaml(vision(tmp_path)))
    for arguments, message in (
        (("tune", tmp_path / "no.yaml"), "no.yaml does not exist"),
        (("tune", place, "optimizer.lr=1"), "optimizer.lr: there is no such setting"),
        (("tune", place, "data.root=nowhere"), "nowhere"),
        (("evaluate", place, "--split", "train"), "needs one of validation, test; got 'train'"),
        (("evaluate", place, "--split", "validation"), "names no validation split"),
        (("evaluate", place, "--lm-eval", "arc"), "lm-eval measures language models"),
        (("sweep", place), "needs a section with rows"),
    ):
        code, _, error = _call(*arguments)
        assert (code, message in error) == (2, True), error


def test_a_dry_run_shows_what_would_be_done(tmp_path: Path) -> None:
    config = vision(tmp_path, batch_size=6, micro_batches=2)
    place = tmp_path / "tune.yaml"
    place.write_text(to_yaml(config))
    code, out, _ = _call("tune", place, "--dry-run", "method=toast-lite")
    assert code == 0
    for text in (
        "name: toast-lite",
        "task_embedding",
        "lora",
        "steps: 8 (4 per epoch)",
        "pixels (3, 3, 16, 16)",
    ):
        assert text in out
    assert not (tmp_path / "runs").exists()


def test_the_estimate_counts_what_is_held(tmp_path: Path) -> None:
    found = dry_run(vision(tmp_path, method="linear"), "tune")
    head = 24 * 3 + 3
    assert found["groups"] == {"head": head}
    assert found["memory"]["trained weights"] == found["memory"]["gradients"] == 4 * head
    assert found["memory"]["optimizer"] == 8 * head
    assert (
        0
        < found["memory"]["activations"]
        < dry_run(vision(tmp_path, method="full"), "tune")["memory"]["activations"]
    )
    rows = dry_run(language(tmp_path), "pretune")
    assert set(rows["losses"]) == {"loss", "first_task", "task", "reconstruction"}
    assert rows["batch"]["input_ids"][0] == 4


def test_a_run_folder_is_a_configuration(tmp_path: Path) -> None:
    config = vision(tmp_path)
    run(config, "tune")
    code, _, error = _call("tune", config.folder, "name=again", "seed=1")
    assert code == 0, error
    assert (tmp_path / "runs" / "again" / "result.json").is_file()
