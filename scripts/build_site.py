"""Builds the documentation: `pip install -e ".[docs]"`, then `python scripts/build_site.py [FOLDER]`.

The pages are docs/*.md, the notebooks, CONTRIBUTING.md and CHANGELOG.md. This script writes a copy of them
under build/, with the tables of `scripts/site_tables.py`, and with links that lead to pages. Sphinx then
builds that; a warning is an error. The site opens from a folder, without a network.
"""

from __future__ import annotations

import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from toast.commands.errors import run_script

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:  # started as a script
    sys.path.insert(0, str(ROOT))

from scripts.site_tables import TABLES  # noqa: E402

#: Where the site has what stands outside of docs/.
ELSEWHERE = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "notebooks/README.md": "notebooks/index.md",
}
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def pages() -> dict[str, str]:
    """Returns the pages' texts by their place in the site, not yet adapted to it."""
    import jupytext

    texts = {source: (ROOT / source).read_text() for source in ELSEWHERE}
    texts |= {f"docs/{path.name}": path.read_text() for path in (ROOT / "docs").glob("*.md")}
    for script in (ROOT / "notebooks").glob("*.py"):
        notebook = jupytext.read(script)
        text = jupytext.writes(notebook, "md:markdown")
        texts[f"notebooks/{script.stem}.ipynb"] = text.partition("\n---\n")[2].lstrip()
    return texts


def place(source: str) -> str:
    """Returns where the site has a file of the repository, if it is a page."""
    return ELSEWHERE.get(source, source.removeprefix("docs/").replace(".ipynb", ".md"))


def adapt(text: str, source: str, sources: set[str]) -> str:
    """Fills in the tables, and leads links to pages; what is no page is named and not linked.

    Args:
        text: The page.
        source: Its path in the repository.
        sources: Those of all pages.
    """
    text = re.sub(r"^<!-- site: (\w+) -->$", lambda found: TABLES[found[1]](), text, flags=re.MULTILINE)

    def led(link: re.Match[str]) -> str:
        shown, target, anchor = link[1], link[2], link[3] or ""
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if target in sources:
            away = posixpath.relpath(place(target), posixpath.dirname(place(source)) or ".")
            return f"[{shown}]({away}{anchor})"
        if not (ROOT / target).exists():
            return link[0]  # for Sphinx to complain of
        return shown if target in shown else f"{shown} (`{target}`)"

    return _LINK.sub(led, text)


def write(folder: Path) -> None:
    """Writes what Sphinx reads."""
    texts = pages()
    shutil.rmtree(folder, ignore_errors=True)
    for source, text in texts.items():
        page = folder / place(source)
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(adapt(text, source, set(texts)))
    for pattern in ("*.png", "*.svg", "conf.py", "site.css"):
        for path in (ROOT / "docs").glob(pattern):
            shutil.copy(path, folder)


def main(
    out: Annotated[Path, typer.Argument(help="Folder of the site.")] = ROOT / "build" / "site",
) -> None:
    """Write the pages and build them."""
    import sphinx  # noqa: F401 - before anything is written

    source = ROOT / "build" / "pages"
    write(source)
    options = ["-W", "--keep-going", "-q", "-j", "auto"]
    command = [sys.executable, "-m", "sphinx", *options, str(source), str(out)]
    code = subprocess.run(command, check=False).returncode
    if not code:
        print(f"{out / 'index.html'}, {len(list(source.rglob('*.md')))} pages")
    raise typer.Exit(code)


if __name__ == "__main__":
    run_script(main)
