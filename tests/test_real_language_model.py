"""SmolLM2-135M, tuned on recipes: perplexity falls, and a fresh process continues with the same tokens."""

from __future__ import annotations

import json
import logging
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import toast

LOG = logging.getLogger(__name__)  # shown with --log-cli-level=info
LENGTH, BATCH, STEPS, RATE = 64, 4, 200, 1e-4
PROMPT = "Recipe: Tomato soup\nIngredients:\n"

GENERATE = """
import sys, torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
import toast
base, adapter, prompt = sys.argv[1:]
model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.bfloat16).eval()
inputs = AutoTokenizer.from_pretrained(base)(prompt, return_tensors="pt")
print("tokens:", *model.generate(**inputs, max_new_tokens=24, do_sample=False)[0].tolist())
"""


def recipe_text(recipe: dict) -> str:
    ingredients = "\n".join(f"- {line}" for line in recipe["ingredients"])
    steps = "\n".join(f"{i}. {line}" for i, line in enumerate(recipe["steps"], 1))
    return f"Recipe: {recipe['title']}\nIngredients:\n{ingredients}\nSteps:\n{steps}"


@torch.no_grad()
def perplexity(model, rows: Tensor) -> float:
    model.eval()
    losses = [model(batch, labels=batch, use_cache=False).loss.item() for batch in rows.split(16)]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_tuning_on_recipes_lowers_perplexity_and_survives_a_fresh_process(
    assets: Path, tmp_path: Path
) -> None:
    base, recipes = assets / "smollm2", assets / "text" / "recipes.json"
    for place in (base, recipes):
        if not place.exists():
            pytest.skip(f"{place} does not exist")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(base)
    stored = json.loads(recipes.read_text())
    texts = [recipe_text(stored[name]) for name in sorted(stored)]
    random.Random(0).shuffle(texts)

    def packed(some: list[str]) -> Tensor:
        ids = [token for text in some for token in tokenizer(text + tokenizer.eos_token)["input_ids"]]
        return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)

    held_out, rows = packed(texts[:40])[:64], packed(texts[100:900])
    model = toast.wrap(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16),
        train=["task_embedding", "to_signal"],
    )
    before = perplexity(model, held_out)
    with model.disable_adapter():
        assert perplexity(model, held_out) == before  # the start is exactly the frozen model

    toast.calibrate(model, rows[:8])
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, RATE, weight_decay=0.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    for _ in range(STEPS):
        batch = rows[torch.randint(len(rows), (BATCH,))]
        model(batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        cycle.step()
        optimizer.zero_grad()
    after = perplexity(model, held_out)
    LOG.info("held-out perplexity %.1f before, %.1f after %d steps", before, after, STEPS)
    assert after < 0.8 * before

    model.eval()
    toast.save_adapter(model, tmp_path / "adapter")
    inputs = tokenizer(PROMPT, return_tensors="pt")
    here = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0].tolist()
    command = [sys.executable, "-c", GENERATE, str(base), str(tmp_path / "adapter"), PROMPT]
    fresh = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [int(t) for t in fresh.partition("tokens:")[2].split()] == here
