"""Writes structured recipes as text, a JSON line each, for `configs/offline/recipes.yaml`.

python scripts/recipes_text.py $TOAST_ASSETS/text/recipes.json $TOAST_ASSETS/recipes.jsonl
"""

from __future__ import annotations

import json
from pathlib import Path

from toast.commands.errors import run_script
from toast.training.run_folder import write_text


def main(source: Path, out: Path) -> None:
    """Reads recipes by name (`title`, `ingredients`, `steps`) and writes their texts."""
    lines = []
    for recipe in json.loads(source.read_text()).values():
        ingredients = "\n".join(f"- {ingredient}" for ingredient in recipe["ingredients"])
        text = f"{recipe['title']}\n\nIngredients:\n{ingredients}\n\n{' '.join(recipe['steps'])}"
        lines.append(json.dumps({"text": text}) + "\n")
    write_text(out, "".join(lines))
    print(f"{len(lines):,} recipes in {out}")


if __name__ == "__main__":
    run_script(main)
