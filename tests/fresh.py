"""Code in fresh processes that take a tenth of a second each, not the seconds of importing PyTorch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent

# One process imports all that PEFT and the package build on, and PEFT's modules but for `peft` itself; its
# children do the rest. To them PEFT is not imported: its `__init__` still has to run.
PARENT = """
import gc, importlib, json, os, sys, tempfile, traceback
gc.disable()  # what is imported stays
import torch
import accelerate, peft, timm, transformers.trainer
for name in ("datasets", "matplotlib.pyplot", "pydantic", "rich.table", "torchmetrics", "typer", "yaml"):
    importlib.import_module(name)
torch.set_num_threads(1)
assert not [name for name in sys.modules if name.split(".")[0] == "toast"]
del sys.modules["peft"]
gc.freeze()  # else each child's collector would copy all of it
gc.enable()
compiled = tempfile.TemporaryDirectory()
sys.pycache_prefix, sys.dont_write_bytecode = compiled.name, False  # the package is compiled only once
failed = {}
for name, code in json.load(sys.stdin).items():
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        status = 1
        try:
            exec(compile(code, name, "exec"), {"__name__": "__main__"})
            status = 0
        except SystemExit as ended:
            status = ended.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    os.close(writer)
    with open(reader, errors="replace") as file:
        said = file.read()
    if os.waitpid(child, 0)[1]:
        failed[name] = said
compiled.cleanup()
print("RESULT" + json.dumps(failed))
"""


def failures(codes: Mapping[str, str]) -> dict[str, str]:
    """Runs each code in a process of its own, without `toast` and `peft`; returns what the failed said."""
    done = subprocess.run(
        [sys.executable, "-c", PARENT],
        input=json.dumps(dict(codes)),
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TOAST_HOOK": "0"},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.rpartition("RESULT")[2])
    return found
