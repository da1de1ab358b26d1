"""What a browser makes of the page: light and dark, on a phone and on a desktop."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.report.reports import run_on_pictures
from toast.report.writing import write_report
from toast.visual.text.colours import DARK, LIGHT, Theme

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs chromium, to look at the page")

QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of a sweep's run, whose table is wider than a phone."""
    tmp = tmp_path_factory.mktemp("browser")
    around = tmp / "sweep" / "final" / "TOAST"
    place = run_on_pictures(tmp, method="toast", steps=1, out=str(around), name="seed-0")
    names = ("accuracy", "attention_on_target", "calibration_error", "loss")
    row = {
        "test": {name: {"mean": 0.5, "deviation": 0.1} for name in names},
        "trainable_parameters": 123456,
        "step_seconds": 1000.0,
    }
    rows = {"TOAST": row, "another method with a long name": row}
    (tmp / "sweep" / "sweep.json").write_text(json.dumps({"name": "sweep", "seeds": 3, "rows": rows}))
    return write_report(place, tmp / "report.html", pictures=2)


@pytest.mark.parametrize(
    ("width", "theme", "flags"),
    [(390, LIGHT, ()), (1200, DARK, ("--blink-settings=preferredColorScheme=0",))],
    ids=["phone-light", "desktop-dark"],
)
def test_nothing_is_wider_than_the_screen(
    page: Path, tmp_path: Path, width: int, theme: Theme, flags: tuple[str, ...]
) -> None:
    """What would be cut off, or scrolled to, stands in the right margin, which is empty."""
    assert BROWSER is not None
    picture = tmp_path / "seen.png"
    size = (
        f"--window-size={width},2600",
        f"--screenshot={picture}",
        f"--user-data-dir={tmp_path / 'profile'}",
    )
    subprocess.run(
        [BROWSER, *QUIET, *size, *flags, page.as_uri()], capture_output=True, check=True, timeout=60
    )
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    assert pixels.shape == (2600, width, 3)
    paper = (pixels == theme.paper).all(-1)
    assert paper[:, -12:].all()
    assert paper[:, :12].all()
    assert 0.05 < 1 - paper.mean() < 0.9
    columns = (~paper).any(0).nonzero()[0]
    assert columns[0] == pytest.approx(width - 1 - columns[-1], abs=3)  # in the middle
