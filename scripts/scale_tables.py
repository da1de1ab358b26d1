"""Writes the tables of docs/scale.md: what the configurations under configs/scale need, by `toast plan`.

    python scripts/scale_tables.py [NAME]...

With names, such as `vit-l16`, only their sections are made anew. All take some minutes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toast.commands.errors import run_script
from toast.planning.estimating import plan
from toast.planning.printing import Sheet, generation_line, process_sheets, step_sheet
from toast.training.config_files import load_config

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scale.md"
#: Title of each section, by the name of the configuration.
SECTIONS = {
    "vit-l16": "ViT-L/16, 224 pixels, 256 pictures a step",
    "llama-7b": "Llama 7B, rows of 2,048 tokens, 8 a step, activations checkpointed",
    "llama-13b": "Llama 13B, the same",
    "llama-70b": "Llama 70B, the same",
}
PROCESSES, MEMORY, CLASSES = 8, 80e9, 1000


def section(name: str) -> str:
    """Returns the section of a configuration."""
    return "\n".join([f"## {SECTIONS[name]}", "", part(name, "toast"), "", part(name, "toast-lite")]) + "\n"


def part(name: str, method: str) -> str:
    """Returns what a section says of a method: of Lite no quantised bases, and nothing of generation."""
    path, full = f"configs/scale/{name}.yaml", method == "toast"
    config = load_config(ROOT / path, [f"method={method}"])
    found = plan(config, processes=PROCESSES, memory=MEMORY, classes=CLASSES)
    trained, frozen = sum(found.groups.values()) / 1e6, found.frozen / 1e6
    title = "TOAST" if full else "TOAST-Lite, rank 4"
    lines = [f"{title}: {trained:,.1f} million trained, {frozen:,.1f} million frozen."]
    sheets = [step_sheet(found), *process_sheets(found)][: None if full else 2]
    lines += [text for sheet in sheets for text in ("", _markdown(sheet))]
    generation = generation_line(found)
    if full and generation:
        lines += ["", f"{generation[0].upper()}{generation[1:]}."]
    return "\n".join(lines)


def _markdown(sheet: Sheet) -> str:
    head = [sheet.title, *sheet.columns[1:]]
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *sheet.rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def sections(page: str) -> dict[str, str]:
    """Returns the sections of a page by the names of their configurations."""
    found = {}
    for part in page.split("\n## ")[1:]:
        title, _, _ = part.partition("\n")
        name = next((name for name, known in SECTIONS.items() if known == title), None)
        if name is not None:
            found[name] = f"## {part.rstrip()}\n"
    return found


def main(names: Annotated[list[str] | None, typer.Argument(help="Sections; all, if none.")] = None) -> None:
    """Make sections of docs/scale.md anew, and keep the others."""
    unknown = [name for name in names or () if name not in SECTIONS]
    if unknown:
        raise ValueError(f"needs names of {', '.join(SECTIONS)}; got {', '.join(unknown)}.")
    page = PAGE.read_text()
    starts = [page.find(f"\n## {title}\n") for title in SECTIONS.values()]
    head = page[: min((start for start in starts if start >= 0), default=len(page))].rstrip()
    made = sections(page)
    for name in names or SECTIONS:
        print(name, flush=True)
        made[name] = section(name)
    PAGE.write_text("\n".join([f"{head}\n", *(made[name] for name in SECTIONS if name in made)]))


if __name__ == "__main__":
    run_script(main)
