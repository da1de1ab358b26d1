"""What the build adds to wheels: the configurations, and the hook, which starts fast and breaks nothing."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.fresh import ROOT

HOOK = ROOT / "build_hook"


@pytest.fixture(scope="module", params=["wheel", "editable"])
def site_packages(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the wheel of `pip install .`, or `-e .`, is unpacked."""
    pytest.importorskip("setuptools", minversion="77.0.3")
    source, wheels = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("build_hook", "configs", "toast"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    code = f"import backend; print(backend.build_{request.param}({str(wheels)!r}))"
    environment = os.environ | {"PYTHONPATH": str(source / "build_hook")}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=source, env=environment, capture_output=True)
    (wheel,) = wheels.iterdir()
    with ZipFile(wheel) as file:
        file.extractall(wheels / "site")
    return wheels / "site"


def test_a_wheel_holds_what_is_no_code(site_packages: Path) -> None:
    """Templates, style sheets and configurations; that of `-e` points to the checkout instead."""
    if not (site_packages / "toast").is_dir():
        pytest.skip("an editable wheel")
    kinds = ("*.jinja", "*.css", "*.yaml")
    files = {path.relative_to(ROOT) for kind in kinds for path in (ROOT / "toast").rglob(kind)}
    assert {path.suffix for path in files} == {".jinja", ".css", ".yaml"}
    assert [path for path in files if not (site_packages / path).is_file()] == []


def test_both_kinds_of_wheel_have_the_hook_at_their_root(site_packages: Path) -> None:
    (record,) = site_packages.glob("*.dist-info/RECORD")
    listed = dict(line.split(",", 1) for line in record.read_text().splitlines())
    for name in ("toast-steering.pth", "toast_steering_hook.py"):
        content = (HOOK / name).read_bytes()
        assert (site_packages / name).read_bytes() == content
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        assert listed[name] == f"sha256={digest},{len(content)}"  # so that it goes with `pip uninstall`
    assert {file.as_posix() for file in site_packages.rglob("*") if file.is_file()} >= {
        (site_packages / name).as_posix() for name in listed
    }


def test_wheels_hold_the_shipped_configurations(site_packages: Path) -> None:
    """That of `pip install -e .` points to the checkout, which has them beside the package."""
    shipped = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")}
    inside = site_packages / "toast" / "configs"
    held = {path.relative_to(inside) for path in inside.rglob("*.yaml")}
    is_editable = not (site_packages / "toast" / "__init__.py").exists()
    assert held == (set() if is_editable else shipped)


def started(code: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a Python that has the hook and no other site-packages."""
    code = f"import site; site.addsitedir({str(HOOK)!r})\nimport sys\n{code}"
    return subprocess.run(
        [sys.executable, "-I", "-S", "-X", "importtime", "-c", code],
        env=os.environ | {"TOAST_HOOK": "1"} | environment,
        capture_output=True, text=True, check=True,
    )  # fmt: skip


def test_the_start_of_python_imports_nothing_more() -> None:
    done = started("print(*sorted({type(finder).__name__ for finder in sys.meta_path} - {'type'}))")
    assert done.stdout.split() == ["WaitForPeft"]
    imported = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines()]
    assert imported[imported.index("toast_steering_hook") :] == ["toast_steering_hook"]


def test_a_variable_switches_it_off() -> None:
    assert "toast_steering_hook" not in started(TOAST_HOOK="0").stderr


def test_a_hook_without_its_package_is_silent(tmp_path: Path) -> None:
    """Half uninstalled, or beside a `toast` that is another's: nothing is said, nothing is found."""
    (tmp_path / "toast.py").write_text("colour = 'brown'")
    (tmp_path / "peft.py").write_text("there = True")
    for path in ([], [str(tmp_path)]):
        done = started(f"sys.path += {path}\nimport importlib.util\nprint(importlib.util.find_spec('peft'))")
        assert ("peft.py" in done.stdout) == bool(path)
    assert (
        started(f"sys.path.append({str(tmp_path)!r})\nimport peft, toast\nprint(toast.colour)").stdout
        == "brown\n"
    )
    shutil.copy(HOOK / "toast-steering.pth", tmp_path)
    code = f"import site, sys; site.addsitedir({str(tmp_path)!r}); print(sys.meta_path[0].__name__)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], check=True, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("BuiltinImporter\n", "")
