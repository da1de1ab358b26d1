"""A run that was stopped goes on as if it had not been."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import load
from safetensors.torch import load_file

from tests.training.settings import language, losses, vision
from toast.training.checkpoints import newest_checkpoint, save_checkpoint
from toast.training.config_files import to_yaml
from toast.training.interrupts import Interrupted, listening
from toast.training.resuming import MAY_CHANGE, flat
from toast.training.run import run
from toast.training.run_config import RunConfig

#: Dropout, augmentation, several micro-batches: all that could differ after a resumption.
SETTINGS = {
    "model.options.drop_rate": 0.2,
    "augment.preset": "crop-flip",
    "micro_batches": 2,
    "epochs": 4,
    "checkpoint.every": 2,
}


def _config(tmp_path: Path, name: str, **settings: object) -> RunConfig:
    return vision(tmp_path, **{**SETTINGS, "name": name, "data.validation_share": 0.25, **settings})


def _weights(config: RunConfig) -> dict[str, torch.Tensor]:
    return load_file(config.folder / "adapter" / "adapter_model.safetensors")


def _assert_same(resumed: RunConfig, whole: RunConfig) -> None:
    assert losses(resumed.folder) == losses(whole.folder)
    assert losses(resumed.folder, "validation") == losses(whole.folder, "validation")
    weights, wanted = _weights(resumed), _weights(whole)
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


def test_a_killed_run_is_resumed_to_the_same_weights(tmp_path: Path) -> None:
    whole, killed = _config(tmp_path, "whole"), _config(tmp_path, "killed")
    run(whole, "tune")
    (tmp_path / "killed.yaml").write_text(to_yaml(killed))
    wanted = int(torch.randint(2, 6, (), generator=torch.Generator().manual_seed(time.time_ns())))
    process = subprocess.Popen(
        [sys.executable, "-m", "toast", "tune", str(tmp_path / "killed.yaml"), "log_every=1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # sums of several threads differ in their last bits
    )
    metrics = killed.folder / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and len(losses(killed.folder)) >= wanted):
        time.sleep(0.002)
    process.kill()
    _, error = process.communicate()
    assert process.returncode == -signal.SIGKILL, error.decode()
    assert not (killed.folder / "adapter").exists()
    result = run(killed, "tune", resume=True)
    assert result["steps"] == len(losses(whole.folder))
    _assert_same(killed, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_writes_a_checkpoint(tmp_path: Path, number: int) -> None:
    whole, stopped = _config(tmp_path, "whole"), _config(tmp_path, "stopped", **{"log_every": 1})
    run(whole, "tune")

    def stop() -> None:
        while not (stopped.folder / "metrics.jsonl").is_file() or len(losses(stopped.folder)) < 3:
            time.sleep(0.001)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop, daemon=True).start()
    handler = signal.getsignal(number)
    with pytest.raises(Interrupted, match=r"interrupted after \d+ of 8 steps; .*--resume") as caught:
        run(stopped, "tune")
    assert caught.value.signal_number == number
    assert signal.getsignal(number) is handler
    assert newest_checkpoint(stopped.folder / "checkpoints") is not None
    assert not (stopped.folder / "result.json").exists()
    run(stopped, "tune", resume=True)
    _assert_same(stopped, whole)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once(first: int, second: int) -> None:
    class Ended(BaseException):
        pass

    def end(number: int, frame: object) -> None:
        raise Ended

    before = {number: signal.signal(number, end) for number in {first, second}}
    try:
        with pytest.raises(Ended), listening(Accelerator()) as request:
            os.kill(os.getpid(), first)
            assert request() == first
            os.kill(os.getpid(), second)
            pytest.fail("went on")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_signal_that_a_launcher_hands_on_is_the_same_one(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = SimpleNamespace(num_processes=2)
    # Shells let what they put into the background ignore it.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    with listening(launch) as request:  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.signal == signal.SIGINT
        monkeypatch.setattr("toast.training.interrupts._HANDED_ON", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, handler)


def test_language_is_resumed_too(tmp_path: Path) -> None:
    whole = language(tmp_path, name="whole", checkpoint__every=2)
    run(whole, "tune")
    again = language(tmp_path, name="again", checkpoint__every=2)
    run(again, "tune")
    for name in ("result.json", "adapter/adapter_model.safetensors"):
        (again.folder / name).unlink()
    run(again, "tune", resume=True)  # from the last checkpoint: nothing is left to train
    _assert_same(again, whole)


def test_a_checkpoint_holds_what_is_trained_alone_and_runs_no_code(tmp_path: Path) -> None:
    config = _config(tmp_path, "run")
    run(config, "tune")
    (checkpoint,) = (config.folder / "checkpoints").iterdir()
    names = load_file(checkpoint / "trained.safetensors").keys()
    assert names and all(".toast_" in name or ".modules_to_save." in name for name in names)
    assert not (checkpoint / "model.safetensors").exists()
    for path in [*checkpoint.glob("*.bin"), *checkpoint.glob("*.pkl")]:
        load(path)  # with weights_only


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    config = _config(tmp_path, "run")
    run(config, "tune")
    with pytest.raises(ValueError, match="holds a run already"):
        run(config, "tune")
    assert run(config, "tune", resume=True) == json.loads((config.folder / "result.json").read_text())
    (config.folder / "result.json").unlink()
    with pytest.raises(
        ValueError, match=r"holds a run of other settings: epochs was 4, now 6\. Continue with"
    ):
        run(_config(tmp_path, "run", epochs=6), "tune", resume=True)


def _files(config: RunConfig) -> dict[str, bytes]:
    return {
        str(path.relative_to(config.folder)): path.read_bytes()
        for path in config.folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    "setting",
    [
        {"method": "toast-lite"}, {"seed": 1}, {"optimizer.learning_rate": 1e-3}, {"data.limit": 16},
        {"method.options": {"select_from": 0}}, {"model.options.num_heads": 2}, {"label_smoothing": 0.1},
        {"method.options": {"value_bias": "twice"}}, {"batch_size": 4}, {"data.test": None},
    ],
    ids=lambda setting: next(iter(setting)),
)  # fmt: skip
@pytest.mark.parametrize("ended", [True, False])
def test_a_refused_resume_changes_nothing(
    finished: Path, tmp_path: Path, setting: dict[str, object], ended: bool
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    pictures = {"data.root": str(finished / "pictures")}
    config = _config(tmp_path, "run", **pictures)
    if not ended:
        (config.folder / "result.json").unlink()
    before = _files(config)
    with pytest.raises(ValueError, match=f"holds a run of other settings: .*{next(iter(setting))}"):
        run(_config(tmp_path, "run", **{**pictures, **setting}), "tune", resume=True)
    assert _files(config) == before
    run(config, "tune", resume=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("finished")
    run(_config(place, "run"), "tune")
    return place


def test_what_changes_no_result_may_change(tmp_path: Path) -> None:
    config = _config(tmp_path, "run")
    run(config, "tune")
    wanted = losses(config.folder)
    (config.folder / "result.json").unlink()
    free = {
        "workers": 1, "log_every": 3, "trackers": ["tensorboard"], "checkpoint.every": 3,
        "evaluation.every": 2, "first_pass.limit": 1.0, "data.bad_share": 0.5, "checkpointing": True,
        "evaluation.batch_size": 3,
    }  # fmt: skip
    moved = config.model_copy(update={"name": "moved"})
    config.folder.rename(moved.folder)
    run(_config(tmp_path, "moved", **free), "tune", resume=True)
    assert losses(moved.folder) == wanted


def test_every_setting_that_may_change_is_one(tmp_path: Path) -> None:
    names = set(flat(_config(tmp_path, "x").model_dump(mode="json")))
    assert [name for name in MAY_CHANGE if not any(f"{each}.".startswith(f"{name}.") for each in names)] == []


def test_what_no_setting_says_is_compared_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(tmp_path, "run", epochs=1)
    run(config, "tune")
    with pytest.raises(ValueError, match="is of another run: stage was tune, now pretune"):
        run(config, "pretune", resume=True)
    (config.folder / "result.json").unlink()
    before = _files(config)
    with pytest.raises(ValueError, match="is of another run: stage was tune, now pretune"):
        run(config, "pretune", resume=True)
    with monkeypatch.context() as changed:
        changed.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        AcceleratorState._reset_state()  # as in a new process
        with pytest.raises(ValueError, match="precision was no, now bf16"):
            run(config, "tune", resume=True)
    AcceleratorState._reset_state()
    for split in ("train", "test"):
        (tmp_path / "pictures" / split / "class0").rename(tmp_path / "pictures" / split / "first")
    with pytest.raises(ValueError, match="names other classes than the data, first 'class0', now 'class1'"):
        run(config, "tune", resume=True)
    assert _files(config) == before


def test_a_half_written_checkpoint_is_not_taken(tmp_path: Path) -> None:
    config = _config(tmp_path, "run", **{"checkpoint.keep": 2})
    run(config, "tune")
    held = sorted((config.folder / "checkpoints").iterdir())
    assert [path.name for path in held] == ["step-00000006", "step-00000008"]
    (held[1] / "progress.json").unlink()  # written last
    assert newest_checkpoint(config.folder / "checkpoints") == held[0]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of four steps that has its last two checkpoints, as if it had not ended."""
    config = _config(tmp_path_factory.mktemp("ended"), "run", **{"epochs": 2, "checkpoint.keep": 2})
    run(config, "tune")
    (config.folder / "result.json").unlink()
    return config


#: What is done to a checkpoint, and what is said of it.
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights": (
        lambda at: _flip(at / "trained.safetensors"),
        "trained.safetensors is damaged: it is not what was written",
    ),
    "optimiser": (lambda at: _flip(at / "optimizer.bin"), "optimizer.bin is damaged"),
    "removed": (lambda at: (at / "optimizer.bin").unlink(), "optimizer.bin does not exist"),
    "cut off": (lambda at: os.truncate(at / "progress.json", 100), "progress.json is damaged or not JSON"),
    "empty": (lambda at: os.truncate(at / "progress.json", 0), "progress.json is damaged or not JSON: it is"),
    "list": (lambda at: (at / "progress.json").write_text("[]"), "progress.json needs a JSON object"),
    "utf-16": (
        lambda at: (at / "progress.json").write_text("{}", encoding="utf-16"),
        "progress.json is damaged or not JSON: line 1 is not in UTF-8",
    ),
    "negative": (lambda at: _changed(at, step=-5), "progress.json is damaged: it is not what was written"),
    "other step": (lambda at: _changed(at, step=1, checksum=None), "step needs to be that of the folder"),
    "no total": (lambda at: _changed(at, total=None), "progress.json is damaged: total needs a number"),
    "seconds": (lambda at: _changed(at, step_seconds=9.5), "progress.json is damaged: it is not what was"),
    "files": (lambda at: _changed(at, files=[], checksum=None), "progress.json is damaged: files needs an"),
}


def _changed(checkpoint: Path, **values: object) -> None:
    path = checkpoint / "progress.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, ended: RunConfig, name: str
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(ended.folder / "checkpoints", folder)
    before, newest = sorted(folder.iterdir())
    said: list[str] = []
    assert newest_checkpoint(folder, said.append) == newest and not said
    damage, message = DAMAGES[name]
    damage(newest)
    assert newest_checkpoint(folder, said.append) == before
    (line,) = said
    assert message in line and f"Continuing from the checkpoint before, {before.name}" in line
    damage(before)
    with pytest.raises(ValueError, match=r"(?s)no checkpoint to continue from.*To start from the beginning"):
        newest_checkpoint(folder)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    tmp_path: Path, ended: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    again = ended.model_copy(update={"out": tmp_path})
    shutil.copytree(ended.folder, again.folder)
    before, newest = sorted((again.folder / "checkpoints").iterdir())
    _flip(newest / "optimizer.bin")
    run(again, "tune", resume=True)
    assert f"resumed from {before}" in capsys.readouterr().out
    _assert_same(again, ended)
    assert newest_checkpoint(again.folder / "checkpoints") == newest  # written anew


def test_a_damaged_checkpoint_does_not_outlive_those_of_the_run_that_passed_it_over(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    progress = {"total": 9, "validated": -1, "validation": None, "bad": {}, "step_seconds": 0.0}
    save_checkpoint(accelerator, tmp_path, 4, progress, keep=2)
    damaged = save_checkpoint(accelerator, tmp_path, 8, progress, keep=2)
    (damaged / "progress.json").write_text("{}")
    save_checkpoint(accelerator, tmp_path, 6, progress, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000006"]


@pytest.mark.parametrize("at", ["unlink", "rmtree", "rename"])
def test_a_kill_while_a_checkpoint_takes_the_place_of_its_only_one_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """Of one step: an interruption at the end of an epoch writes it again."""
    accelerator = Accelerator(cpu=True)
    progress = {"total": 9, "validated": -1, "validation": None, "bad": {}, "step_seconds": 0.0}
    first = save_checkpoint(accelerator, tmp_path, 8, progress)
    places = {"unlink": Path, "rmtree": shutil, "rename": Path}
    original = getattr(places[at], at)

    def killed(path: Path, *rest: object, **options: object) -> object:
        if first in (path, path.parent, *rest):
            raise KeyboardInterrupt
        return original(path, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(places[at], at, killed)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(accelerator, tmp_path, 8, progress | {"step_seconds": 1.0})
    held = newest_checkpoint(tmp_path)
    assert held is not None and held.name.lstrip(".") == "step-00000008"
    again = save_checkpoint(accelerator, tmp_path, 8, progress | {"step_seconds": 2.0})
    assert list(tmp_path.iterdir()) == [again] and newest_checkpoint(tmp_path) == again


def test_a_checkpoint_without_checksums_is_resumed(tmp_path: Path) -> None:
    config = _config(tmp_path, "run", epochs=1)
    run(config, "tune")
    (config.folder / "result.json").unlink()
    (checkpoint,) = (config.folder / "checkpoints").iterdir()
    progress = json.loads((checkpoint / "progress.json").read_text())
    assert progress.pop("files").keys() >= {"trained.safetensors", "optimizer.bin"}
    del progress["checksum"]
    (checkpoint / "progress.json").write_text(json.dumps(progress))
    run(config, "tune", resume=True)
