"""The shipped configurations are found from any folder, in a checkout and in an installed wheel."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from toast.cli import app
from toast.training import shipped
from toast.training.config_files import load_config
from toast.training.sweeping import pretunings

ROOT = Path(__file__).parents[2]
SWEEP = Path("configs/offline/demo-sweep.yaml")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    place = tmp_path / "elsewhere"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


def test_a_shipped_file_is_found_with_what_it_names() -> None:
    config = load_config(SWEEP)
    assert config.name == "demo-sweep"
    assert config.sweep is not None
    assert pretunings(config.sweep)[""][0] == ROOT / "configs/offline/demo-pretune.yaml"


def test_a_file_of_the_same_path_goes_first(elsewhere: Path) -> None:
    own = elsewhere / SWEEP
    own.parent.mkdir(parents=True)
    own.write_text("name: mine\nmodel: {library: demo}\ndata: {source: demo}\n")
    assert load_config(SWEEP).name == "mine"
    assert load_config(own).name == "mine"


@pytest.mark.parametrize("path", ["configs/offline/none.yaml", "configs", "other/offline/demo-sweep.yaml"])
def test_what_is_not_shipped_is_refused_with_where_to_look(path: str) -> None:
    with pytest.raises(ValueError, match=rf"^{path} does not exist; .*`toast configs` lists"):
        load_config(Path(path))


def test_the_folder_inside_the_package_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a wheel, where `configs` beside the package would be another distribution's."""
    package = tmp_path / "site-packages" / "toast"
    for place in (package, package.parent):
        (place / "configs").mkdir(parents=True)
    monkeypatch.setattr(shipped, "_PACKAGE", package)
    assert shipped.shipped_folder() == package / "configs"
    (package / "configs").rmdir()
    assert shipped.shipped_folder() == package.parent / "configs"


def test_the_command_lists_every_file() -> None:
    done = CliRunner().invoke(app, ["configs"])
    assert done.exit_code == 0
    first, *commands = done.stdout.splitlines()
    assert first == f"configs/ is {ROOT / 'configs'}"
    files = sorted((ROOT / "configs").rglob("*.yaml"))
    assert len(commands) == len(files)
    for command, file in zip(commands, files, strict=True):
        assert str(file.relative_to(ROOT)) in command
