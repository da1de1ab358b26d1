"""A missing file or a wrong option is said at once: before PyTorch is imported, which takes seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from toast.benchmark.names import NAMES
from toast.benchmark.suite import MEASURES
from toast.cli import app

#: Arguments and what is said of them, in a folder with `empty/` and `run.yaml`.
MISTAKES = (
    (["tune", "no.yaml"], "no.yaml does not exist"),
    (["pretune", "run.yaml", "optimzer.x=1"], "did you mean optimizer?"),
    (["tune", "run.yaml", "method.start=gone"], "method.start: gone does not exist"),
    (["sweep", "run.yaml"], "sweep: needs a section with rows"),
    (["evaluate", "run.yaml", "--split", "no"], "split: needs one of validation, test"),
    (["plan", "run.yaml", "--memory", "much"], "memory: needs a size"),
    (["report", "empty"], "empty is not a run"),
    (["visualize", "empty"], "empty is neither a run's folder"),
    (["visualize", "empty", "--format", "bmp"], "formats: needs some of png"),
    (["compare", "empty", "no"], "empty is neither a run's folder"),
    (["export", "empty", "--out", "a.pt"], "needs a file that ends in .onnx or .pt2"),
    (["generate", "empty", "hello"], "empty has no config.json"),
    (["import-official", "no.pth", "out"], "no.pth does not exist"),
    (["benchmark", "--only", "no"], "only: needs some of forward"),
    (["demo", "--out", "run.yaml"], "out: run.yaml is a file"),
)
CODE = """
import json, sys
from typer.testing import CliRunner
from toast.cli import app
said = [CliRunner().invoke(app, given).stderr for given in json.load(sys.stdin)]
print(json.dumps([said, sorted({"accelerate", "peft", "torch"} & set(sys.modules))]))
"""


def test_mistakes_are_said_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "run.yaml").write_text("model: {library: demo}\ndata: {source: demo, test: test}\n")
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        input=json.dumps([given for given, _ in MISTAKES]),
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    said, heavy = json.loads(done.stdout)
    for (given, message), text in zip(MISTAKES, said, strict=True):
        assert message in " ".join(text.replace("│", " ").split()), (given, text)
    assert not heavy


def test_the_benchmark_has_the_measures_that_it_names() -> None:
    assert tuple(MEASURES) == NAMES


def test_shells_complete_commands_and_values() -> None:
    for typed, completed in (("toast pre", "pretune"), ("toast visualize --method gr", "grad-cam")):
        words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
        done = CliRunner().invoke(
            app, [], prog_name="toast", env={"_TOAST_COMPLETE": "complete_bash", **words}
        )
        assert done.stdout.split() == [completed]
