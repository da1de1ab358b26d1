"""`scripts/accelerator_results.py` says what every part of a check found, also of one that did not end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

from scripts.accelerator_results import main

TESTS = """<testsuites><testsuite>
<testcase classname="a" name="passes"/>
<testcase classname="a" name="fails"><failure message="1 is not 2&#10;more">trace</failure></testcase>
<testcase classname="a" name="skips"><skipped message="no bitsandbytes"/></testcase>
</testsuite></testsuites>"""


def status(out: Path, *parts: str) -> int:
    with pytest.raises(typer.Exit) as ended:
        main(out, "cpu", list(parts))
    return ended.value.exit_code


def test_what_was_found_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tests.xml").write_text(TESTS)
    (tmp_path / "benchmark").mkdir()
    (tmp_path / "benchmark" / "benchmark.json").write_text('{"ratios": {}}')
    assert status(tmp_path, "tests=1:9", "benchmark=124:240", "demo=0:3") == 1
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["tests"] == {
        "passed": 1,
        "failed": {"a::fails": "1 is not 2"},
        "skipped": {"a::skips": "no bitsandbytes"},
    }
    assert found["parts"]["benchmark"] == {"ended": "time over", "seconds": 240}
    assert (found["card"], found["benchmark"], found["demo"]) == ("cpu", {"ratios": {}}, None)
    assert "cpu: tests failed (1), benchmark time over, demo passed" in capsys.readouterr().out
    assert status(tmp_path, "tests=0:9") == 0
