"""Adapters are saved and loaded, whatever else the model holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from peft.utils import get_base_model_state_dict, set_base_model_state_dict
from torch import nn

from tests.models import awaken
from tests.peft_contract.cases import Case, layers, output
from tests.snapshots import refused
from toast.config import ToastConfig
from toast.files.adapter_folder import WEIGHTS


def assert_equal(model: nn.Module, other: nn.Module) -> None:
    one, two = model.state_dict(), other.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def test_what_is_saved_is_what_is_loaded(case: Case, tmp_path) -> None:
    model = case.steered()
    model.save_pretrained(tmp_path)
    assert files(tmp_path) == {WEIGHTS, "adapter_config.json", "README.md"}
    card = (tmp_path / "README.md").read_text()
    assert "library_name: peft" in card
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["inference_mode"]
    assert not model.peft_config["default"].inference_mode
    loaded = PeftModel.from_pretrained(case.base(), tmp_path)  # a warning of missing keys would be an error
    assert type(loaded) is type(model)
    assert_equal(loaded, model)
    assert torch.equal(output(loaded, case.inputs()), output(model, case.inputs()))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training


def test_a_pickled_file_is_loaded_too(few: Case, tmp_path) -> None:
    model = few.steered()
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert files(tmp_path) == {"adapter_model.bin", "adapter_config.json", "README.md"}
    assert_equal(PeftModel.from_pretrained(few.base(), tmp_path), model)


def test_selected_adapters_are_saved(few: Case, tmp_path) -> None:
    model = few.wrap()
    model.add_adapter("other", few.config())
    awaken(model)
    model.save_pretrained(tmp_path / "both")
    assert files(tmp_path / "both" / "other") == {WEIGHTS, "adapter_config.json"}
    loaded = PeftModel.from_pretrained(few.base(), tmp_path / "both")
    loaded.load_adapter(tmp_path / "both" / "other", "other")
    assert_equal(loaded, model)
    model.save_pretrained(tmp_path / "one", selected_adapters=["default"])
    assert not (tmp_path / "one" / "other").exists()
    assert set(PeftModel.from_pretrained(few.base(), tmp_path / "one").peft_config) == {"default"}
    with pytest.raises(ValueError, match="invalid `selected_adapters`"):
        model.save_pretrained(tmp_path, selected_adapters=["absent"])


def test_a_loaded_adapter_is_loaded_again_under_other_names(each: Case, tmp_path) -> None:
    model = each.steered()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(each.base(), tmp_path, low_cpu_mem_usage=True)
    for name in ("other", "yet-another"):
        result = loaded.load_adapter(tmp_path, name, low_cpu_mem_usage=name == "other")
        assert result.missing_keys == []
        assert result.unexpected_keys == []
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    loaded.set_adapter("yet-another")
    assert torch.equal(output(loaded, each.inputs()), output(model, each.inputs()))


def test_an_empty_adapter_is_injected_without_memory(few: Case) -> None:
    model = peft.inject_adapter_in_model(few.config(), few.base(), low_cpu_mem_usage=True)
    for layer in layers(model):
        assert all(parameter.is_meta for _, parameter in layer.groups("default"))


def test_the_given_configuration_is_used(each: Case, tmp_path) -> None:
    config = each.config()
    peft.get_peft_model(each.base(), config).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(each.base(), tmp_path, config=config)
    assert loaded.peft_config["default"] is config
    assert config.inference_mode


def test_the_weights_of_the_base_are_read_and_set(each: Case) -> None:
    plain = {name: tensor.clone() for name, tensor in each.base().state_dict().items()}
    model = each.steered()
    found = get_base_model_state_dict(model)
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    before = output(model, each.inputs())
    with torch.no_grad():
        for name, parameter in model.get_base_model().named_parameters():
            if ".toast_" not in name and "modules_to_save" not in name:
                parameter.add_(0.1)
    assert not torch.equal(output(model, each.inputs()), before)
    result = set_base_model_state_dict(model, plain, strict=False)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(output(model, each.inputs()), before)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", [Case("llama", "lite"), Case("timm-vit")], ids=str)
def test_the_dtype_of_an_adapter(
    case: Case, dtype: torch.dtype, autocast: bool, low_cpu_mem_usage: bool, tmp_path
) -> None:
    def kinds(model: nn.Module) -> set[torch.dtype]:
        return {p.dtype for layer in layers(model) for name in layer.configs for _, p in layer.groups(name)}

    expected = {torch.float32 if autocast else dtype}
    model = peft.get_peft_model(case.base(dtype), case.config(), autocast_adapter_dtype=autocast)
    model.add_adapter("other", case.config(), autocast_adapter_dtype=autocast)
    assert kinds(model) == expected
    found = output(awaken(model), case.inputs(dtype=dtype))
    assert found.dtype == dtype
    model.save_pretrained(tmp_path)
    options: Any = {"autocast_adapter_dtype": autocast, "low_cpu_mem_usage": low_cpu_mem_usage}
    loaded = PeftModel.from_pretrained(case.base(dtype), tmp_path, **options)
    loaded.load_adapter(tmp_path / "other", "other", **options)
    assert kinds(loaded) == expected
    assert torch.equal(
        output(loaded, case.inputs(dtype=dtype)), output(model.eval(), case.inputs(dtype=dtype))
    )


def seven_classes() -> nn.Module:
    model = Case("timm-vit").base()
    model.head = nn.Linear(24, 7)
    return model


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}])
def test_a_head_of_another_size_is_left_out_where_peft_is_told_so(options, tmp_path) -> None:
    case = Case("timm-vit")
    model = case.steered(**options)
    model.save_pretrained(tmp_path)
    with refused(other := seven_classes(), "head.weight is .*, needs|size mismatch"):
        PeftModel.from_pretrained(other, tmp_path)
    with pytest.warns(UserWarning, match="head.modules_to_save.default.weight: found shape"):
        loaded = PeftModel.from_pretrained(other, tmp_path, ignore_mismatched_sizes=True)
    assert output(loaded, case.inputs()).shape == (2, 7)
    for layer, source in zip(layers(loaded), layers(model), strict=True):
        for (_, found), (_, expected) in zip(layer.groups("default"), source.groups("default"), strict=True):
            assert torch.equal(found, expected)


def test_feedback_of_another_size_is_never_left_out(tmp_path) -> None:
    case = Case("timm-vit")
    case.steered(lora_rank=2).save_pretrained(tmp_path)
    config = ToastConfig.from_pretrained(tmp_path)
    config.lora_rank = 3
    with refused(base := case.base(), "lora_A.low_rank.weight is .*, needs"):
        PeftModel.from_pretrained(base, tmp_path, config=config, ignore_mismatched_sizes=True)


def test_the_head_of_an_added_adapter_may_differ_too(tmp_path) -> None:
    case = Case("timm-vit")
    case.steered().save_pretrained(tmp_path)
    model = peft.get_peft_model(seven_classes(), case.config())
    with refused(model, "head.weight is .*, needs"):
        model.load_adapter(tmp_path, "other")
    with pytest.warns(UserWarning, match="head.modules_to_save.other.weight: found shape"):
        model.load_adapter(tmp_path, "other", ignore_mismatched_sizes=True)
