"""Recipes as instructions: ingredients without amounts, and no title in two splits."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import typer

SCRIPT = Path(__file__).parents[1] / "scripts" / "recipe_lists.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipe_lists", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("ingredient", "name"),
    [
        ("1 ½ lemons, juiced", "lemons"),
        ("1 cup freshly grated Parmesan cheese", "freshly grated parmesan cheese"),
        ("6½ cups (1.3 kg) white sugar", "white sugar"),
        ("3–5 lb beef", "beef"),
        ("2 cups of brown vinegar", "brown vinegar"),
        ("Salt", "salt"),
        ("1 can large olives", "olives"),
        ("cupcakes", "cupcakes"),
    ],
)
def test_an_ingredient_is_left_without_its_amount(script: ModuleType, ingredient: str, name: str) -> None:
    assert script.name_of(ingredient) == name


def _write(path: Path, count: int) -> Path:
    recipes = {
        f"page {number}": {
            "title": f"Soup {number}",
            "ingredients": [f"{number} cups water", "salt", "1 leek"][: 2 + number % 2],
            "steps": [],
        }
        for number in range(count)
    }
    path.write_text(json.dumps(recipes))
    return path


def test_splits_share_no_title_and_do_not_change(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "COUNTS", {"train": 12, "val": 3, "test": 5})
    source = _write(tmp_path / "recipes.json", 41)
    for out in ("a", "b"):
        script.main(source, tmp_path / out)
    splits = {}
    for split, count in script.COUNTS.items():
        text = (tmp_path / "a" / f"{split}.jsonl").read_text()
        assert text == (tmp_path / "b" / f"{split}.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        assert len(rows) == count
        assert all(re.fullmatch(r"- .+(\n- .+)+", row["output"]) for row in rows)
        splits[split] = {row["instruction"] for row in rows}
    assert len(set.union(*splits.values())) == 20
    assert all(re.fullmatch(r"List the ingredients of Soup \d*[13579]\.", each) for each in splits["train"])
    with pytest.raises(typer.BadParameter, match="holds 2 recipes of 3 to 9 ingredients; needs 20"):
        script.main(_write(tmp_path / "few.json", 5), tmp_path / "few")
