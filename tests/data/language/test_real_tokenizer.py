"""SmolLM2's tokenizer and chat template on real recipes and articles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.language.wording import counted_runs, write_lines
from toast.data.language import open_language


@pytest.mark.slow
def test_answers_are_the_recipes_steps(assets: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for place in (assets / "smollm2", assets / "text" / "recipes.json"):
        if not place.exists():
            pytest.skip(f"{place} does not exist")
    words = AutoTokenizer.from_pretrained(assets / "smollm2")
    recipes = json.loads((assets / "text" / "recipes.json").read_text())
    rows = [
        {
            "instruction": recipe["title"],
            "input": "\n".join(recipe["ingredients"]),
            "output": "\n".join(recipe["steps"]),
        }
        for recipe in recipes.values()
    ]
    file = write_lines(tmp_path / "recipes.jsonl", rows)
    for template in ("alpaca", "chat"):
        data = open_language("alpaca", words, path=file, block=2048, template=template)
        assert len(data) == len(rows)
        for number, row in enumerate(rows):
            assert counted_runs(data[number], words) == [row["output"] + "<|im_end|>"]


@pytest.mark.slow
def test_articles_fill_their_rows(assets: Path) -> None:
    from transformers import AutoTokenizer

    for place in (assets / "smollm2", assets / "text" / "wiki.json"):
        if not place.exists():
            pytest.skip(f"{place} does not exist")
    words = AutoTokenizer.from_pretrained(assets / "smollm2")
    sums = []
    for packing in ("blocks", "documents", "none"):
        data = open_language(
            "text",
            words,
            path=assets / "text" / "wiki.json",
            text_field="extract",
            block=512,
            packing=packing,
        )
        sums.append(data.summary["tokens"])
        if packing != "none":
            assert sum(data.lengths) > 0.99 * 512 * len(data)
    assert len(set(sums)) == 1
