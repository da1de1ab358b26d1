"""The notebooks run, and both files of each hold the same cells without outputs."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.py"))
WRITE = "jupytext --to ipynb --update notebooks/*.py"


def cells(script: Path) -> list[tuple[str, str]]:
    """Kind and text of the cells of a script in percent format."""
    _, *parts = re.split(r"^# %%(.*)\n", script.read_text(), flags=re.MULTILINE)
    found = []
    for marker, text in zip(parts[::2], parts[1::2], strict=True):
        is_text = "[markdown]" in marker
        lines = text.strip("\n").splitlines()
        shown = [line.removeprefix("#").removeprefix(" ") for line in lines] if is_text else lines
        found.append(("markdown" if is_text else "code", "\n".join(shown)))
    return found


def test_they_are_there() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]


@pytest.mark.parametrize("script", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_pair_holds_the_same_cells_without_outputs(script: Path) -> None:
    notebook = json.loads(script.with_suffix(".ipynb").read_text())
    held = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    assert held == cells(script), f"write the notebooks again with: {WRITE}"
    for cell in notebook["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"


@pytest.mark.parametrize("script", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_lead_to_notebooks(script: Path) -> None:
    for kind, text in cells(script):
        if kind == "markdown":
            for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
                assert (script.parent / target).is_file(), target


@pytest.mark.parametrize("script", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_at_a_small_size(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script runs as it stands; what a notebook would display is kept instead."""
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    displayed: list[Any] = []
    ipython = SimpleNamespace(Image=lambda file, **_: Path(file), display=displayed.append)
    monkeypatch.setitem(sys.modules, "IPython.display", ipython)
    monkeypatch.setattr(plt, "show", lambda: displayed.append(plt.gcf()))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TOAST_NOTEBOOK_SCALE", "0.01")
    monkeypatch.delenv("TOAST_ASSETS", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    try:
        runpy.run_path(str(script))
    finally:
        plt.close("all")
    assert displayed
    for shown in displayed:
        assert shown.axes if hasattr(shown, "axes") else shown.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out
    assert not list((tmp_path / "here").iterdir())  # what it writes goes to a temporary folder
