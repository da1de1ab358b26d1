"""Learning rates by group and width, in the forms that a model has when an optimiser is made for it."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import timm
import torch
from torch import nn

import toast
from tests.models import WIDTH, decoder, images, vit
from toast.steering import find_steering

RATE = 1e-2


def by_name(model: nn.Module, **options: Any) -> dict[str, set[tuple[float, float]]]:
    """Returns rate and decay of each group."""
    found: dict[str, set[tuple[float, float]]] = {}
    for part in toast.parameter_groups(model, RATE, **options):
        found.setdefault(part["name"], set()).add((part["lr"], part["weight_decay"]))
    return found


def rates(model: nn.Module, **options: Any) -> dict[str, float]:
    return {part["name"]: part["lr"] for part in toast.parameter_groups(model, RATE, **options)}


def embedding(model: nn.Module) -> nn.Parameter:
    return find_steering(model).selector.toast_task_embedding["default"]  # type: ignore[no-any-return]


def test_every_trained_parameter_is_in_one_group_at_its_rate() -> None:
    model = toast.wrap(vit(), modules_to_save=["head"])
    parts = toast.parameter_groups(model, RATE, weight_decay=0.1)
    held = [id(parameter) for part in parts for parameter in part["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    found = {(part["name"], round(part["lr"] / RATE, 9), part["weight_decay"]) for part in parts}
    assert found == {
        ("task_embedding", round(10 / math.sqrt(WIDTH), 9), 0.0),
        ("channel_transform", round(19.2 / WIDTH, 9), 0.0),  # towards zero would be away from the identity
        ("to_state", round(6.4 / WIDTH, 9), 0.0),
        ("to_signal", 192 / WIDTH, 0.1),  # towards the frozen model
        ("head", 1.0, 0.1),
        ("head", 1.0, 0.0),  # its bias
    }


def test_lite_has_the_rate_of_lora_but_in_the_row_of_states_and_official_starts_decay() -> None:
    model = toast.wrap(vit(), lora_rank=2)
    assert "to_state" not in rates(model)
    rate = {id(p): part["lr"] for part in toast.parameter_groups(model, RATE) for p in part["params"]}
    for layer in find_steering(model).values:
        for maps, share in ((layer.toast_to_signal, 1), (layer.toast_to_state, 1 / 30)):
            factors = [p for name, p in maps["default"].named_parameters() if "lora_" in name]
            assert [rate[id(p)] for p in factors] == pytest.approx([share * RATE] * 2)
    assert rates(model, rates={"lora": 1e-4})["lora"] == 1e-4  # as it is, in all of them
    official = toast.wrap(vit(), init="official")
    decays = {part["name"]: part["weight_decay"] for part in toast.parameter_groups(official, RATE)}
    assert decays["to_state"] == decays["channel_transform"] == 0.01


def test_maps_between_unlike_blocks_go_by_their_own_fan_in() -> None:
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", pretrained=False, img_size=64, embed_dim=24, depths=(1, 1, 1),
        num_heads=(2, 2, 2), window_size=4,
    )  # fmt: skip
    parts = [part for part in toast.parameter_groups(toast.wrap(swin), RATE) if part["name"] == "to_state"]
    assert len(parts) == 2
    for part in parts:
        for parameter in part["params"]:
            assert part["lr"] == pytest.approx(6.4 * RATE / parameter.shape[1])


@pytest.mark.parametrize("length", [1.0, math.sqrt(WIDTH), 100.0])
def test_a_task_embedding_turns_as_fast_whatever_its_length(length: float) -> None:
    model = toast.wrap(vit())
    with torch.no_grad():
        embedding(model).mul_(length)
    before = embedding(model).detach().clone()
    optimizer = torch.optim.AdamW(toast.parameter_groups(model, 3e-3))
    model(images()).sum().backward()
    embedding(model).grad = torch.randn(WIDTH, dtype=torch.float64)
    embedding(model).grad -= before * (embedding(model).grad @ before) / (before @ before)
    optimizer.step()
    turned = torch.arccos(torch.nn.functional.cosine_similarity(before, embedding(model), dim=0))
    assert 0.015 < turned.item() < 0.045


def test_new_and_calibrated_embeddings_have_unit_length() -> None:
    model = toast.wrap(vit())
    torch.testing.assert_close(embedding(model).norm().item(), 1.0)
    toast.calibrate(model, images())
    torch.testing.assert_close(embedding(model).norm().item(), 1.0)
    official = toast.wrap(vit(), init="official")
    assert embedding(official).norm() > 2  # as the official code draws it: about the root of the width


def test_loaded_embeddings_keep_their_length(tmp_path: Path) -> None:
    base = vit()
    model = toast.wrap(base)
    with torch.no_grad():
        embedding(model).mul_(7)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(model.unload(), str(tmp_path), is_trainable=True)
    assert embedding(loaded).norm().item() == pytest.approx(7)
    assert rates(loaded)["task_embedding"] == pytest.approx(7 * 10 * RATE / math.sqrt(WIDTH))


def test_models_that_are_wrapped_again_have_the_same_groups() -> None:
    model = toast.wrap(vit(), modules_to_save=["head"])
    expected = by_name(model)
    assert by_name(torch.compile(model)) == expected  # type: ignore[arg-type]
    assert by_name(nn.Sequential(model)) == expected
    assert by_name(model.base_model.model) == expected


def test_only_the_active_adapters_parameters_are_trained() -> None:
    model = toast.wrap(vit(), adapter_name="first")
    model.add_adapter("second", toast.ToastConfig(lora_rank=2))
    assert "lora" not in rates(model)
    model.set_adapter("second")
    assert set(rates(model)) == {"task_embedding", "channel_transform", "lora"}


def test_other_methods_and_plain_models_get_the_rate_itself() -> None:
    lora = peft.get_peft_model(decoder(), peft.LoraConfig(target_modules=["q_proj"]))
    assert rates(lora) == {"adapter": RATE}
    assert by_name(nn.Linear(3, 2)) == {"adapter": {(RATE, 0.01), (RATE, 0.0)}}


def test_rates_that_are_given_are_absolute_and_all_may_be_alike() -> None:
    model = toast.wrap(vit())
    assert rates(model, rates={"to_state": 1e-5})["to_state"] == 1e-5
    assert set(rates(model, scaled=False).values()) == {RATE}


def test_what_makes_no_sense_is_refused() -> None:
    model = toast.wrap(vit())
    for given, message in (
        ({"rates": {"head": 1.0}}, "rates: no parameters are trained in head; the trained groups are "),
        ({"rates": {"to_state": 0}}, r"rates\['to_state'\]: needs a number above 0, such as 1e-3; got 0"),
        ({"weight_decay": -1}, "weight_decay: needs 0 or a positive number; got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            toast.parameter_groups(model, RATE, **given)
    for rate in (0, -1e-3, float("nan"), float("inf"), "1e-3", None, True):
        with pytest.raises(ValueError, match="learning_rate: needs a number above 0, such as 1e-3; got "):
            toast.parameter_groups(model, rate)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model: needs a torch module; got dict"):
        toast.parameter_groups({}, RATE)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs a model with trained parameters"):
        toast.parameter_groups(vit().requires_grad_(False), RATE)
    with pytest.raises(ValueError, match=r"needs the values of the task embedding.*got a meta tensor"):
        toast.parameter_groups(model.to("meta"), RATE)
    assert rates(model, rates={"task_embedding": 1e-3})["task_embedding"] == 1e-3


@pytest.fixture(scope="module")
def coordinate_check() -> ModuleType:
    """The coordinate check, for widths that take a second; scripts/coordinate_check.py has wider ones."""
    path = Path(__file__).parents[1] / "scripts" / "coordinate_check.py"
    spec = importlib.util.spec_from_file_location("coordinate_check", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules["coordinate_check"] = script  # its dataclass looks there
    spec.loader.exec_module(script)
    return script


def test_steps_move_a_model_alike_at_every_width(coordinate_check: ModuleType) -> None:
    moved = [coordinate_check.move(width, 3e-3, True, depth=3) for width in (48, 96, 192)]
    for name in ("chain", "signals", "turn"):
        found = [getattr(each, name) for each in moved]
        assert max(found) < 4 * min(found), (name, found)
    assert max(each.chain for each in moved) < 0.5
    assert coordinate_check.move(192, 3e-3, False, depth=3).chain > 1


def test_low_rank_factors_move_the_row_of_states_as_little_as_full_maps(coordinate_check: ModuleType) -> None:
    for width in (48, 192):
        assert coordinate_check.move(width, 9e-3, True, depth=3, lora_rank=4).chain < 0.5
        assert coordinate_check.move(width, 9e-3, False, depth=3, lora_rank=4).chain > 1
