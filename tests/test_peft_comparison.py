"""The experiments for PEFT's method comparison pass its runner's steps, here on a tiny model.

The steps are those of `method_comparison/MetaMathQA` (`run.py`, `utils.py`) in PEFT's repository, which needs
an accelerator.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, get_peft_model
from transformers import GenerationConfig, get_cosine_schedule_with_warmup

from tests.models import decoder, tokens

EXPERIMENTS = Path(__file__).parents[1] / "configs" / "peft-comparison" / "MetaMathQA" / "experiments"


@pytest.mark.parametrize("place", sorted(EXPERIMENTS.glob("*/*")), ids=lambda place: place.name)
def test_an_experiment_runs(tmp_path: Path, place: Path) -> None:
    torch.manual_seed(0)
    config = PeftConfig.from_pretrained(str(place))
    model = get_peft_model(decoder(dtype=torch.bfloat16), config, autocast_adapter_dtype=True)
    trained, _ = model.get_nb_trainable_parameters()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=3)
    model.train()
    batch = tokens()
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]
    model.eval()
    said = model.generate(
        input_ids=batch, generation_config=GenerationConfig(max_new_tokens=3, pad_token_id=0)
    )
    assert said.shape[1] == batch.shape[1] + 3
    model.save_pretrained(tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert size < 4 * trained + 100_000  # float32, and names
    logged = config.to_dict()
    json.dumps({name: list(held) if isinstance(held, set) else held for name, held in logged.items()})
