"""A study as a user runs it: killed in the middle, gone on with, measured again, and laid out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fresh import ROOT
from tests.study.studies import study
from toast.study.lines import read_lines, read_pictures
from toast.study.running import run_study
from toast.study.tables import page
from toast.training.config_files import to_yaml


@pytest.mark.timeout(900)  # two processes import everything, which a busy machine takes minutes for
def test_a_killed_study_goes_on(tmp_path: Path) -> None:
    config = study(tmp_path, {"evaluations": {"half": {"data.limit": 4}}})
    (tmp_path / "small.yaml").write_text(to_yaml(config))
    results = tmp_path / "results"
    process = subprocess.Popen(
        [sys.executable, "scripts/study.py", "run", str(tmp_path / "small.yaml"), "--only", "linear",
         "--threads", "1", "--results", str(results)],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    path = results / "small.jsonl"
    while process.poll() is None and not path.is_file():
        time.sleep(0.002)
    process.kill()
    _, error = process.communicate()
    assert process.returncode == -signal.SIGKILL, error.decode()
    before = len(read_lines(path))
    assert before + run_study(config, ["linear"], results) == 4
    lines = read_lines(path)
    assert len(path.read_text().splitlines()) == len(lines)
    assert sorted((line["seed"], line["evaluation"] or "") for line in lines) == [
        (0, ""), (0, "half"), (1, ""), (1, "half"),
    ]  # fmt: skip
    for line in lines:
        pictures = read_pictures(results / line["pictures"])
        assert len(pictures.index) == (4 if line["evaluation"] else 8)
        assert line["test"]["accuracy"] == pytest.approx(pictures.correct.mean())
    found = list(tmp_path.glob("runs/small/small/all/final/linear/*/result.json"))
    wanted = {json.loads(each.read_text())["test"]["accuracy"] for each in found}
    assert {line["test"]["accuracy"] for line in lines if not line["evaluation"]} == wanted
    assert "measured at half" in page(config, results)
