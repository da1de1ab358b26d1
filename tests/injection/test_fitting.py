"""What is refused beside a damaged file: heads, vocabularies, pre-tuned adapters, settings, and memory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import toast
from tests.adapters import (
    EMBEDDING,
    FAULTS,
    FILE,
    SETTINGS,
    base,
    by_peft,
    by_transformers,
    change,
    lose,
    output,
    saved,
)
from tests.models import awaken, images, vit
from tests.snapshots import refused
from toast.config import ToastConfig


def resized(folder: Path) -> Any:
    """Saves base and adapter with a larger vocabulary; returns how to load the base as it was."""
    from transformers import AutoModelForCausalLM

    base(dtype=torch.float32).save_pretrained(folder / "base")

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder / "base")

    model = load()
    model.resize_token_embeddings(40)
    nn.init.normal_(model.get_input_embeddings().weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that it saves the embeddings
        saved(folder / "adapter", model)
    return load


def test_a_resized_vocabulary_is_asked_for_before_the_base_is_changed(tmp_path) -> None:
    load = resized(tmp_path)
    model = load()
    message = r"embed_tokens.weight is \(40, 24\), needs \(37, 24\).*resize_token_embeddings"
    with refused(model, message):
        by_peft(model, tmp_path / "adapter")
    model.resize_token_embeddings(40)
    table = load_file(tmp_path / "adapter" / FILE)["base_model.model.model.embed_tokens.weight"]
    loaded = by_peft(model, tmp_path / "adapter")
    assert torch.equal(loaded.get_input_embeddings().weight, table)


def test_embeddings_that_peft_saved_are_covered_by_the_checksums(tmp_path) -> None:
    load = resized(tmp_path)
    path = tmp_path / "adapter" / FILE
    held = load_file(path)
    held["base_model.model.model.embed_tokens.weight"][2, 2] += 1
    save_file(held, path)
    model = load()
    model.resize_token_embeddings(40)
    with refused(model, "the values of .*embed_tokens.weight are not those"):
        by_peft(model, tmp_path / "adapter")


@pytest.mark.parametrize("what", ["head.weight", "head.bias"])
def test_a_head_with_a_flipped_bit_is_found(what: str, tmp_path) -> None:
    torch.manual_seed(1)
    awaken(toast.wrap(vit(), modules_to_save=["head"])).save_pretrained(tmp_path)
    held = load_file(tmp_path / FILE)
    held[f"base_model.model.{what}"].view(-1)[0] += 1e-9
    save_file(held, tmp_path / FILE)
    torch.manual_seed(1)
    with refused(model := vit(), f"the values of base_model.model.{what} are not those"):
        by_peft(model, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), None])
def test_a_head_of_no_numbers_is_refused(value: float | None, tmp_path) -> None:
    torch.manual_seed(1)
    awaken(toast.wrap(vit(), modules_to_save=["head"])).save_pretrained(tmp_path)
    name = "base_model.model.head.weight"
    if value is None:
        change(tmp_path, lambda tensors: tensors.update({name: tensors[name].long()}))
    else:
        change(tmp_path, lambda tensors: tensors[name][0, :1].fill_(value))
    torch.manual_seed(1)
    with refused(model := vit(), f"{name} (is of type torch.int64|holds values that are not finite)"):
        by_peft(model, tmp_path)


def test_a_head_may_count(tmp_path) -> None:
    def made() -> nn.Module:
        torch.manual_seed(1)
        model = vit()
        model.head = nn.Sequential(nn.BatchNorm1d(24), nn.Linear(24, 5)).double()
        return model.eval()

    model = toast.wrap(made(), modules_to_save=["head"])
    model.base_model.model.head.modules_to_save["default"][0].num_batches_tracked += 3
    model.save_pretrained(tmp_path)
    loaded = by_peft(made(), tmp_path)
    assert loaded.base_model.model.head.modules_to_save["default"][0].num_batches_tracked == 3
    peft.set_peft_model_state_dict(loaded, peft.get_peft_model_state_dict(model))


PRETUNED: dict[str, tuple[Callable[[Path], None], str]] = {
    name: FAULTS[name] for name in FAULTS if name not in ("lost", "renamed", "base")
} | {"lost": (lose, f"pretrained: .*{FILE} does not exist")}


@pytest.mark.parametrize("fault", PRETUNED)
def test_a_spoilt_pretuned_adapter_is_refused(fault: str, tmp_path) -> None:
    spoil, message = PRETUNED[fault]
    spoil(saved(tmp_path))
    with refused(model := base(), message.removesuffix(".*'checksums' from")):
        toast.wrap(model, lora_rank=2, pretrained=tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", f"{SETTINGS} is damaged or not JSON"),
        ("[]", f"{SETTINGS} needs a JSON object"),
        ('{"steer_from": "x"}', f"{SETTINGS}: steer_from is 'x'"),
        ('{"backbone": 3}', f"{SETTINGS}: backbone is 3"),
    ],
)
def test_damaged_settings_of_a_pretuned_adapter_name_their_file(text: str, message: str, tmp_path) -> None:
    (saved(tmp_path) / SETTINGS).write_text(text)
    with refused(model := base(), message):
        toast.wrap(model, lora_rank=2, pretrained=tmp_path)


def test_tensors_in_memory_are_checked_too() -> None:
    model = awaken(toast.wrap(base()))
    held = peft.get_peft_model_state_dict(model)
    extra = held | {"base_model.model.model.norm.weight": torch.ones(24)}
    with refused(model, "1 unexpected: model.norm.weight"):
        peft.set_peft_model_state_dict(model, extra)
    with refused(model, f"{EMBEDDING} holds values that are not finite"):
        peft.set_peft_model_state_dict(model, held | {EMBEDDING: torch.full((24,), float("nan"))})


def test_transformers_checks_tensors_in_memory(tmp_path) -> None:
    model = awaken(toast.wrap(base(), lora_rank=2))
    held = peft.get_peft_model_state_dict(model)
    config = copy.deepcopy(model.peft_config["default"])
    plain = base()
    with refused(plain, "1 missing: model.norm.toast_task_embedding"):
        plain.load_adapter(
            peft_config=config, adapter_state_dict={n: t for n, t in held.items() if n != EMBEDDING}
        )
    plain.load_adapter(peft_config=config, adapter_state_dict=held)
    assert torch.equal(output(plain), output(model))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", f"{SETTINGS} is damaged or not JSON"),
        ("[]", f"{SETTINGS} needs a JSON object of settings; it holds a list"),
        ("{}", f"{SETTINGS} names no method of PEFT: needs text at 'peft_type'; got None"),
        ('{"peft_type": "TOAST", "lora_rank": "4"}', f"{SETTINGS}: lora_rank: needs"),
        (
            '{"peft_type": "TOAST", "backbone": {"width": [3]}}',
            f"{SETTINGS}: backbone: needs names and sizes|names",
        ),
        (
            '{"peft_type": "TOAST", "backbone": {"weights": "x"}}',
            f"{SETTINGS}: backbone: needs a list of numbers",
        ),
        ('{"peft_type": "TOAST", "checksums": ["x"]}', f"{SETTINGS}: checksums: needs None or a dictionary"),
        ('{"peft_type": "TOAST", "pretrained": 3, "lora_rank": 2}', f"{SETTINGS}: pretrained: needs"),
    ],
)
@pytest.mark.parametrize("route", [by_peft, by_transformers])
def test_damaged_settings_name_their_file(text: str, message: str, route, tmp_path) -> None:
    (saved(tmp_path) / SETTINGS).write_text(text)
    with refused(model := base(), message):
        route(model, tmp_path)


def test_settings_alone_name_their_file(tmp_path) -> None:
    (tmp_path / SETTINGS).write_text('{"peft_type": "TOAST", "init": "random"}')
    with pytest.raises(ValueError, match=f"{SETTINGS}: init: needs one of"):
        ToastConfig.from_pretrained(tmp_path)


def test_a_head_of_another_size_may_be_left_out(tmp_path) -> None:
    torch.manual_seed(1)
    awaken(toast.wrap(vit(), modules_to_save=["head"])).save_pretrained(tmp_path)
    torch.manual_seed(1)
    model = vit()
    model.head = nn.Linear(24, 7).double()
    with refused(model, r"head.weight is \(5, 24\), needs \(7, 24\)"):
        by_peft(model, tmp_path)
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
        loaded = peft.PeftModel.from_pretrained(model, tmp_path, ignore_mismatched_sizes=True)
    assert loaded(images()).shape == (4, 7)
