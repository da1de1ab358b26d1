"""The code on the pages of the site runs, in an empty folder; that of older pages is checked."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer

import toast
from scripts.build_site import ROOT, adapt, pages, place
from scripts.site_tables import errors, meanings, settings
from tests.training.settings import write_language_model
from toast.cli import app

PAGES = ROOT / "docs"
#: Pages whose blocks run as they stand; the others have names for what a reader puts in.
RUN = (
    "from-lora", "own-pictures", "own-text", "quick-start-language", "quick-start-vision", "seeing",
)  # fmt: skip
#: What a page tells a reader to have before: run here in another way, or not at all.
PREPARED = ("pip install", "python3 -m venv", "hf download")
#: By command, what makes it short.
SMALL = {"tune": ["epochs=1", "data.limit=12"], "compare": ["--limit=4"], "report": ["--pictures=1"]}
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
COMMANDS = typer.main.get_command(app)


def lines(text: str) -> list[str]:
    """The commands of a shell block, without comments."""
    joined = text.replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("name", RUN)
def test_blocks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (PAGES / f"{name}.md").read_text()
    if "smollm2" in text:
        write_language_model(tmp_path / "smollm2", max_position_embeddings=256)
    space: dict[str, object] = {"__name__": "__main__"}
    ran = 0
    for language, title, code in BLOCK.findall(text):
        if title:
            (tmp_path / title).write_text(code)
        elif language == "python":
            exec(compile(code, f"{name}.md", "exec"), space)
        elif language == "bash":
            for line in lines(code):
                if not line.startswith(PREPARED):
                    program, *arguments = shlex.split(line, comments=True)
                    assert program == "toast"
                    arguments += SMALL.get(arguments[0], [])
                    assert not COMMANDS.main(arguments, standalone_mode=False), line
        ran += language in ("python", "bash")
    assert ran


@pytest.mark.parametrize("page", sorted(path.name for path in PAGES.glob("*.md")))
def test_blocks_name_commands_and_functions_that_there_are(page: str) -> None:
    for language, _, code in BLOCK.findall((PAGES / page).read_text()):
        if language == "python":
            ast.parse(code)
            for public in re.findall(r"\btoast\.(\w+)", code):
                assert hasattr(toast, public), public
        elif language == "bash":
            for line in lines(code):
                if line.startswith("toast "):
                    check_command(
                        line.replace("|", " ").replace("[", " ").replace("]...", " ").replace("]", " ")
                    )


def check_command(line: str) -> None:
    """Checks that there is the command, and each of its options."""
    _, *words = shlex.split(line, comments=True)
    commands = COMMANDS.commands  # type: ignore[attr-defined]
    named = next((word for word in words if not word.startswith("-")), None)
    options = {option for parameter in COMMANDS.params for option in parameter.opts} | {"--help", "--version"}
    if named is not None and named in commands:
        options |= {o for p in commands[named].params for o in (*p.opts, *p.secondary_opts)}
    elif named is not None:
        assert named.isupper(), line
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options | {
        "--install-completion"
    }, line


def test_links_lead_to_pages() -> None:
    texts = pages()
    sources = set(texts)
    assert {place(source) for source in sources} >= {"contributing.md", "notebooks/01_wrap_a_vit.md"}
    adapted = adapt(
        "[a](../notebooks/01_wrap_a_vit.ipynb) [b](../toast/cli.py) [c](rates.md#x)", "docs/a.md", sources
    )
    assert adapted == "[a](notebooks/01_wrap_a_vit.md) b (`toast/cli.py`) [c](rates.md#x)"
    assert adapt("[d](design.md)", "notebooks/README.md", sources) == "[d](design.md)"  # Sphinx complains


def test_the_toctree_has_every_page() -> None:
    named = re.findall(r"^([\w-]+)$", (PAGES / "index.md").read_text(), re.MULTILINE)
    there = {place(source) for source in pages()} - {"index.md"}
    assert {f"{name}.md" for name in named} == {page for page in there if not page.startswith("notebooks/")}


def test_tables_are_made_from_the_code() -> None:
    assert "| `data.validation_share` | `0.0` | Share of the training split" in settings()
    assert "| `workers` | `0` | Processes that load data. | no: a sample is a function of" in settings()
    assert set(meanings(toast.ToastConfig)) >= {"lora_rank", "select_from"}
    assert "Call toast.fuse(model) again, or toast.unfuse(model)." in errors()
