"""What `accelerator_check.sh` found, as one file: `python scripts/accelerator_results.py OUT DEVICE PART...`.

A part is `NAME=STATUS:SECONDS`. What a part did not write, as it failed or its time was over, is null.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from toast.commands.errors import run_script
from toast.files.atomic import strict_json
from toast.training.run_folder import environment

_ENDED = {0: "passed", 124: "time over", 137: "killed"}


def tests(path: Path) -> dict[str, Any] | None:
    """Returns how many tests ended in which way, and which did not pass, with the reason."""
    if not path.is_file():
        return None
    found: dict[str, Any] = {"passed": 0, "failed": {}, "skipped": {}}
    for case in ET.parse(path).getroot().iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        for kind, outcome in (("failed", "failure"), ("failed", "error"), ("skipped", "skipped")):
            if (element := case.find(outcome)) is not None:
                found[kind][name] = (element.get("message") or "").split("\n")[0]
                break
        else:
            found["passed"] += 1
    return found


def _json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def main(
    out: Annotated[Path, typer.Argument(help="Folder of what the parts wrote.")],
    device: Annotated[str, typer.Argument(help="Device that they ran on.")],
    parts: Annotated[list[str], typer.Argument(metavar="NAME=STATUS:SECONDS...")],
) -> None:
    """Write OUT/results.json; the status is 0 if every part ended well."""
    from toast.benchmark.suite import card

    ended = {}
    for each in parts:
        name, _, figures = each.partition("=")
        status, seconds = map(int, figures.split(":"))
        ended[name] = {"ended": _ENDED.get(status, f"failed ({status})"), "seconds": seconds}
    results = {
        "card": card(torch.device(device)),
        "environment": environment(),
        "parts": ended,
        "tests": tests(out / "tests.xml"),
        "benchmark": _json(out / "benchmark" / "benchmark.json"),
        "demo": _json(out / "demo" / "result.json"),
    }
    path = out / "results.json"
    path.write_text(strict_json(results, indent=1) + "\n")
    said = ", ".join(f"{name} {part['ended']}" for name, part in ended.items())
    print(f"{results['card']}: {said}\nwritten: {path}")
    raise typer.Exit(int(any(part["ended"] != "passed" for part in ended.values())))


if __name__ == "__main__":
    run_script(main)
