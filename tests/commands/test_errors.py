"""Every command says what went wrong, before the work where it can; real faults keep their traceback."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from tests.training.settings import vision
from toast.cli import app
from toast.commands import errors
from toast.files.atomic import try_file, try_folder
from toast.training.config_files import to_yaml
from toast.training.interrupts import Interrupted
from toast.training.run import run


def _call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a run, its configuration, and a file where a folder is needed."""
    place = tmp_path_factory.mktemp("errors")
    config = vision(place, steps=1, epochs=None)
    run(config, "tune")
    (place / "tune.yaml").write_text(to_yaml(config))
    (place / "file").write_text("")
    return place


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tune", "tune.yaml", "out={}/file"), "out: {}/file is a file"),
        (("tune", "tune.yaml", "out={}/file/below"), "out: {}/file is a file"),
        (
            ("tune", "tune.yaml", "name=x", "first_pass={{mode: cached, folder: {}/file}}"),
            "first_pass.folder",
        ),
        (
            ("sweep", "tune.yaml", "sweep.rows={{a: {{}}}}", "data.validation_share=0.5", "out={}/file"),
            "out: ",
        ),
        (("evaluate", "runs/run", "--predictions", "{}/file/x"), "predictions: {}/file is a file"),
        (("evaluate", "runs/run", "--predictions", "{}"), "is a folder; needs the name of a file"),
        (("report", "runs/run", "--out", "{}/runs"), "is a folder; needs the name of a file"),
        (("visualize", "runs/run", "--out", "{}/file"), "--out: {}/file is a file"),
        (("compare", "runs/run", "--out", "{}/file"), "--out: {}/file is a file"),
        (("demo", "--out", "{}/file"), "out: {}/file is a file"),
        (("benchmark", "--out", "{}/file"), "out: {}/file is a file"),
        (("benchmark", "--only", "nope"), "only: needs some of forward"),
        (("import-official", "tune.yaml", "{}/file/x"), "{}/file"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_paths_are_tried_before_the_work(
    trained: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(trained)
    monkeypatch.setattr("torch.nn.Module.__call__", lambda *_, **__: pytest.fail("worked"))
    before = sorted(trained.rglob("*"))
    done = _call(*(argument.format(trained) for argument in arguments))
    assert done.exit_code == 2, (done.stdout, done.stderr, done.exception)
    assert message.format(trained) in done.stderr.replace("\n", "")
    assert sorted(trained.rglob("*")) == before


def test_a_place_where_nothing_can_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try_folder(tmp_path / "a" / "b", "out")
    try_file(tmp_path / "a" / "b.json", "out")
    assert not list(tmp_path.iterdir())

    def full(**_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(ValueError, match=f"out: nothing can be written in {tmp_path}: Permission denied"):
        try_folder(tmp_path / "a", "out")
    (tmp_path / "nowhere").symlink_to(tmp_path / "not-there")
    with pytest.raises(ValueError, match="nowhere is a file or leads nowhere"):
        try_folder(tmp_path / "nowhere" / "a", "out")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("a setting"), 2, "toast: a setting"),
        (PermissionError(13, "Permission denied", "x"), 2, "Permission denied: 'x'"),
        (ImportError("pip install it"), 2, "pip install it"),
        (EOFError(), 2, "toast: EOFError"),
        (MemoryError(), 2, "toast: MemoryError"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), 2, "CUDA out of memory"),
        (Interrupted(signal.SIGTERM, "after 3 steps"), 143, "toast: after 3 steps"),
        (KeyboardInterrupt(), 130, "toast: stopped"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_user_can_mend_is_a_message(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
) -> None:
    def table() -> str:
        raise error

    monkeypatch.setattr("toast.families.listing.table", table)
    done = _call("families")
    assert (done.exit_code, said in done.stderr) == (code, True), done.stderr
    assert "--debug" in done.stderr or code > 2  # raised outside of the package
    if code == 2:
        raised = _call("--debug", "families").exception
        assert error in (raised, raised.__cause__)


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), RuntimeError("x"), AssertionError("x")])
def test_faults_of_the_program_keep_their_traceback(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def table() -> str:
        raise error

    monkeypatch.setattr("toast.families.listing.table", table)
    assert _call("families").exception is error


def test_an_error_of_the_package_says_no_more_than_its_message(trained: Path) -> None:
    done = _call("tune", trained / "no.yaml")
    assert done.stderr.startswith("toast: ") and "--debug" not in done.stderr


def test_a_script_reports_likewise(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @alone.command(cls=errors.Command)
    def fail() -> None:
        raise ValueError("a setting")

    assert CliRunner().invoke(alone, []).exit_code == 2
    monkeypatch.setenv(errors.DEBUG, "1")
    assert isinstance(CliRunner().invoke(alone, []).exception, ValueError)
