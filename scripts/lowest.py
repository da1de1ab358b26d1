"""The lowest versions that pyproject.toml declares, installed together, and the core of the tests on them.

    python scripts/lowest.py [PYTEST ARGUMENT]...

Each requirement of the package and of its extras is installed at its lower bound, what these need in turn as
pip chooses it. Then every command prints its help, a program that never imports `toast` finds the method, and
the tests run: those named on the command line, else those of `CORE`.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXTRAS = ("train", "visual", "demo", "dev")
COMMANDS = [
    "", "benchmark", "compare", "configs", "demo", "evaluate", "families", "generate", "import-official",
    "plan", "pretune", "report", "sweep", "tune", "visualize",
]  # fmt: skip
CORE = [
    "test_registration.py", "test_starting.py", "test_cli.py", "test_steering.py", "test_peft_surface.py",
    "generation/test_generate.py", "official/test_importing.py", "test_compile.py",
    "visual/test_visualizing.py",
]  # fmt: skip


def lowest() -> dict[str, str]:
    """Returns the highest of the lower bounds that each requirement has.

    Raises:
        ValueError: If a requirement is not of the form `name>=version`.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: dict[str, str] = {}
    for text in [*project["dependencies"], *(t for e in EXTRAS for t in project["optional-dependencies"][e])]:
        if text.startswith(project["name"] + "["):
            continue  # another extra of this list
        match = re.fullmatch(r"([\w-]+)>=([\d.]+)", text)
        if match is None:
            raise ValueError(f"requirement: needs name>=version; got {text!r}.")
        name, version = match.groups()
        found[name] = max(found.get(name, version), version, key=lambda v: [*map(int, v.split("."))])
    return found


def main() -> None:
    """Makes the environment in a temporary folder, checks it, and takes it away again."""
    tests = sys.argv[1:] or [f"tests/{name}" for name in CORE]
    with tempfile.TemporaryDirectory(prefix="toast-lowest-") as folder:
        python = Path(folder, "bin", "python")

        def run(*command: str | Path, quiet: bool = False) -> None:
            print("+", *command, flush=True)
            subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL if quiet else None)

        run(sys.executable, "-m", "venv", folder)
        pins = [f"{name}=={version}" for name, version in lowest().items()]
        run(python, "-m", "pip", "install", "--quiet", *pins)
        run(python, "-m", "pip", "install", "--quiet", ".")
        run(python, "-I", "-c", "import peft; peft.PeftType.TOAST")
        for command in COMMANDS:
            run(python.with_name("toast"), *command.split(), "--help", quiet=True)
        run(python, "-m", "pytest", *tests)


if __name__ == "__main__":
    main()
