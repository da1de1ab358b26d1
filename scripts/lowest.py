"""The lowest versions that pyproject.toml declares, installed together, and the core of the tests on them.

    python scripts/lowest.py [PYTEST ARGUMENT]...

Each requirement of the package and of its extras is installed at its lower bound, what these need in turn as
pip chooses it. Then every command prints its help, a program that never imports `toast` finds the method, and
the tests run: those named on the command line, else those of `CORE`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXTRAS = ("train", "visual", "demo", "dev")
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


def commands() -> list[str]:
    """Returns the names of the commands: a file each, of those that `toast/cli.py` imports."""
    found = re.findall(r"from toast\.commands\.\w+ import (.+)", (ROOT / "toast" / "cli.py").read_text())
    names = [name.strip().replace("_", "-") for line in found for name in line.split(",")]
    return [name for name in names if name.islower()]


def main() -> None:
    """Makes the environment in a temporary folder, checks it, and takes it away again."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], usage="%(prog)s [PYTEST ARGUMENT]..."
    )
    tests = parser.parse_known_args()[1] or [f"tests/{name}" for name in CORE]
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
        toast = python.with_name("toast")
        run(toast, "--help", quiet=True)
        for command in commands():
            run(toast, command, "--help", quiet=True)
        run(python, "-m", "pytest", *tests)


if __name__ == "__main__":
    main()
