"""Writes recipes as instructions, "List the ingredients of …", for `configs/study/recipes.yaml`.

python scripts/recipe_lists.py $TOAST_ASSETS/text/recipes.json $TOAST_ASSETS/study/recipes

writes train.jsonl, val.jsonl and test.jsonl in Alpaca's form. An answer has a line for each ingredient,
`- salt`, without amounts and what is done with it. No title is in two splits. The same file gives the same
lines.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import typer

from toast.commands.errors import run_script
from toast.training.run_folder import write_text

#: Recipes of each split.
COUNTS = {"train": 1200, "val": 60, "test": 100}
#: Ingredients of a recipe that is taken.
FEWEST, MOST = 3, 9
#: Words that say how much, behind a number or in front of a name.
_UNITS = (
    r"(?:cups?|tablespoons?|tbsps?|tbs|teaspoons?|tsps?|ounces?|oz|pounds?|lbs?|grams?|g|kg|ml|l|lit(?:er|re)s?|"
    r"quarts?|pints?|gallons?|cans?|packages?|packets?|packs?|pkg|cloves?|slices?|pinch(?:es)?|dash(?:es)?|"
    r"sticks?|bunch(?:es)?|heads?|stalks?|jars?|bottles?|box(?:es)?|bags?|pieces?|handfuls?|sprigs?|large|medium|"
    r"small)"
)
_NUMBER = r"[\d¼½¾⅐-⅞/.–-]+"
_AMOUNT = re.compile(
    rf"(?:(?:to|or|about|each|an?)\s+)?{_NUMBER}\s+|{_UNITS}\b\.?\s+(?:of\s+)?", re.IGNORECASE
)


def name_of(ingredient: str) -> str:
    """Returns what an ingredient is, without how much, what is done with it, and remarks in brackets."""
    text = re.sub(r"\([^)]*\)", "", ingredient).partition(",")[0].strip()
    while (found := _AMOUNT.match(text)) is not None:
        text = text[found.end() :]
    return " ".join(text.split()).lower()


def main(source: Path, out: Path) -> None:
    """Reads recipes by name (`title`, `ingredients`) and writes the splits."""
    recipes: dict[str, list[str]] = {}
    for recipe in json.loads(source.read_text()).values():
        names = [name for name in map(name_of, recipe["ingredients"]) if name]
        if FEWEST <= len(names) <= MOST and recipe["title"]:
            recipes[recipe["title"]] = names
    titles = random.Random(0).sample(sorted(recipes), len(recipes))
    if len(titles) < sum(COUNTS.values()):
        raise typer.BadParameter(
            f"{source} holds {len(titles)} recipes of {FEWEST} to {MOST} ingredients; needs "
            f"{sum(COUNTS.values())}."
        )
    for split, count in COUNTS.items():
        held, titles = titles[:count], titles[count:]
        rows = [
            {
                "instruction": f"List the ingredients of {title}.",
                "output": "\n".join(f"- {name}" for name in recipes[title]),
            }
            for title in held
        ]
        write_text(out / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        print(f"{len(rows):,} recipes in {out / split}.jsonl")


if __name__ == "__main__":
    run_script(main)
