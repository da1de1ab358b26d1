"""The table of methods says what is true of the models that they make."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from tests.training.settings import language, vision
from toast.baselines import applying as baselines
from toast.steering import find_steering
from toast.training.frozen_features import why_not
from toast.training.method_config import MethodConfig
from toast.training.method_table import METHODS, names_of
from toast.training.preparing import Prepared, prepare

OPTIONS: dict[str, dict[str, Any]] = {"attentive": {"method.options": {"queries": 2}}}


def _on_pictures(tmp_path: Path, name: str) -> Prepared:
    return prepare(vision(tmp_path, method=name, **OPTIONS.get(name, {})), "tune")


def test_all_baselines_have_a_row() -> None:
    assert set(baselines.METHODS) == set(METHODS) - {"lora", "toast", "toast-lite"}


@pytest.mark.parametrize("name", METHODS)
def test_rows_say_what_the_models_are(tmp_path: Path, name: str) -> None:
    row, prepared = METHODS[name], _on_pictures(tmp_path, name)
    model: Any = prepared.method.model
    assert (find_steering(model) is not None) == row.steers
    assert (not why_not(model, prepared.head, augmented=False, views=None)) == ("vision" in row.stores)
    pixels = torch.stack([prepared.splits.train[0, index]["pixels"] for index in range(3)])
    frozen: Any = prepare(vision(tmp_path, method="linear"), "tune").method.model.eval()
    model.eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter.data, std=0.5)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.no_grad(), model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():
        is_same = torch.equal(base.forward_features(pixels), frozen.forward_features(pixels))
    # The probe leaves the features alone, too, but attends in a way of its own.
    assert is_same == (row.keeps_backbone or row.attention == "pooling")


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("bias", "attentive")])
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # PEFT's prefix tuning
def test_rows_say_what_becomes_of_language_models(tmp_path: Path, name: str) -> None:
    prepared = prepare(language(tmp_path, method=name), "tune")
    assert ("head" in prepared.method.groups) == METHODS[name].trains_head_on_text
    model: Any = prepared.method.model
    refused = pytest.raises(ValueError, match="generate: PEFT")
    with nullcontext() if METHODS[name].generates else refused:
        model.generate(input_ids=torch.tensor([[1, 5, 6]]), max_new_tokens=1)


def test_what_a_row_excludes_is_refused() -> None:
    for name, row in METHODS.items():
        for settings, allowed in (({"start": "x"}, row.starts), ({"train": "all"}, row.steers)):
            with nullcontext() if allowed else pytest.raises(ValueError, match=f"the method is {name}"):
                MethodConfig.model_validate({"name": name, **settings})


def test_names_are_listed_for_messages() -> None:
    assert names_of(lambda row: row.steers) == "toast and toast-lite"
    assert names_of(lambda row: row.pretunes) == "toast"
    assert names_of(lambda row: row.stores) == "linear, attentive, toast and toast-lite"
