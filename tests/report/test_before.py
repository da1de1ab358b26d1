"""The report shows figures before and after training, and whose step the adapter is."""

from __future__ import annotations

import json
from pathlib import Path

from tests.training.settings import vision
from toast.report.run_data import read_run, remarks
from toast.report.writing import write_report
from toast.training.run import run


def test_before_and_after_and_the_best_step_are_said(tmp_path: Path) -> None:
    config = vision(
        tmp_path, data__validation_share=0.25, evaluation__before=True, checkpoint__best="accuracy"
    )
    result = run(config, "tune")
    before, after = (held["test"]["accuracy"] for held in (result["before"], result))
    files = read_run(config.folder)
    assert files.from_before("accuracy") == f"{before:.3f} → {after:.3f}"
    assert any(f"The adapter is that of step {result['best']['step']}" in line for line in remarks(files))
    text = write_report(config.folder, tmp_path / "report.html", pictures=0).read_text(encoding="utf-8")
    assert files.from_before("accuracy") in text
    assert f"before training it was {before:.1%}" in text
    held = json.loads((config.folder / "result.json").read_text())
    del held["before"], held["best"]
    (config.folder / "result.json").write_text(json.dumps(held))
    files = read_run(config.folder)
    assert files.from_before("accuracy") == f"{after:.3f}"
    assert not any("The adapter is that of step" in line for line in remarks(files))
