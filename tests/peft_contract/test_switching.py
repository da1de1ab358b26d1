"""Adapters are added, chosen, disabled, deleted and taken off."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from peft.helpers import rescale_adapter_scale
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from tests.models import awaken
from tests.peft_contract.cases import Case, layers, of_adapter, output, trainable
from tests.snapshots import refused
from toast.config import ToastConfig


def test_the_interface_of_a_wrapped_model(each: Case) -> None:
    model = each.wrap("some-name")
    assert all(
        callable(getattr(model, name)) for name in ("save_pretrained", "from_pretrained", "push_to_hub")
    )
    assert {name.split(".toast_")[1].split(".")[1] for name in model.state_dict() if ".toast_" in name} == {
        "some-name"
    }
    for layer in layers(model):
        assert layer.in_features > 0
        assert layer.out_features > 0
        base = layer.get_base_layer()
        for name in ("in_features", "out_features"):
            assert getattr(layer, name) == getattr(base, name, getattr(layer, name))
        for name in ("weight", "bias"):
            assert getattr(layer, name, None) is getattr(base, name, None)
        assert (layer.active_adapters, layer.merged, layer.disable_adapters) == (["some-name"], False, False)


def test_a_fresh_adapter_is_the_frozen_model_and_a_disabled_one_too(case: Case) -> None:
    frozen = output(case.base(), case.inputs())
    model = case.wrap()
    torch.testing.assert_close(output(model, case.inputs()), frozen)
    model = case.steered()
    steered = output(model, case.inputs())
    assert steered.isfinite().all()
    assert not torch.allclose(steered, frozen)
    with model.disable_adapter():
        assert torch.equal(output(model, case.inputs()), frozen)
    assert torch.equal(output(model, case.inputs()), steered)


def test_disabling_in_place(case: Case) -> None:
    frozen, model = output(case.base(), case.inputs()), case.steered()
    steered = output(model, case.inputs())
    model.base_model.disable_adapter_layers()
    assert torch.equal(output(model, case.inputs()), frozen)
    assert model.get_model_status().enabled is False
    with model.disable_adapter():
        assert torch.equal(output(model, case.inputs()), frozen)
    assert torch.equal(output(model, case.inputs()), frozen)  # what was disabled before stays so
    model.base_model.enable_adapter_layers()
    assert torch.equal(output(model, case.inputs()), steered)
    assert model.get_model_status().enabled is True


def test_the_status_is_regular(case: Case) -> None:
    model = case.wrap()
    model.add_adapter("other", case.config())
    for active in ("default", "other"):
        model.set_adapter(active)
        status = model.get_model_status()
        assert status.enabled is True
        assert status.active_adapters == [active]
        assert status.available_adapters == ["default", "other"]
        assert status.merged_adapters == []
        trained = "irregular" if case.variant == "lite" else True  # the feedback below the factors is frozen
        assert status.requires_grad == {name: name == active and trained for name in ("default", "other")}
        assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
        wrappers = [m for m in model.modules() if isinstance(m, peft.utils.ModulesToSaveWrapper)]
        assert status.num_adapter_layers == len(layers(model)) + len(wrappers)
    assert {layer.module_type for layer in model.get_layer_status()} <= {
        "ToastValue", "ToastSelector", "ModulesToSaveWrapper",
    }  # fmt: skip


def test_an_irregular_state_is_told_and_mended(few: Case) -> None:
    model = few.wrap()
    layers(model)[0].enable_adapters(False)
    with pytest.warns(UserWarning, match="some adapter layers that are enabled and others"):  # noqa: SIM117
        with model.disable_adapter():
            pass
    assert not any(layer.disable_adapters for layer in layers(model))


def test_the_scale_of_an_adapter_is_refused_as_of_other_methods(few: Case) -> None:
    model = few.steered()
    steered = output(model, few.inputs())
    with pytest.raises(ValueError, match="only supported for models with `LoraLayer`s"):  # noqa: SIM117
        with rescale_adapter_scale(model, 0.0):
            pass
    assert torch.equal(output(model, few.inputs()), steered)


def test_one_adapter_is_active(each: Case) -> None:
    model = each.steered()
    first = output(model, each.inputs())
    model.add_adapter("other", each.config(init="official"))
    assert model.active_adapters == ["default"]
    assert model.active_adapter == "default"
    assert trainable(model) == of_adapter(model)
    assert torch.equal(output(model, each.inputs()), first)
    model.set_adapter("other")
    assert model.active_adapters == ["other"]
    assert model.active_adapter == "other"
    assert trainable(model) == of_adapter(model, "other")
    assert not torch.equal(output(model, each.inputs()), first)
    with refused(model, "one TOAST adapter can be active at a time"):
        model.base_model.set_adapter(["default", "other"])
    model.set_adapter("default")
    assert torch.equal(output(model, each.inputs()), first)


def test_an_adapter_of_other_blocks_beside_one(few: Case) -> None:
    model = few.steered(steer_from=0)
    lower = output(model, few.inputs())
    model.add_adapter("upper", few.config(steer_from=2))
    model.set_adapter("upper")
    assert {tuple(layer.active_adapters) for layer in layers(model)} == {("upper",)}
    torch.testing.assert_close(output(model, few.inputs()), output(few.base(), few.inputs()))
    model.set_adapter("default")
    assert torch.equal(output(model, few.inputs()), lower)


def dictionaries(model: nn.Module) -> Iterator[Any]:
    """Whatever is keyed by adapters on a tuner layer or on the model."""
    for module in (model, model.base_model, *(m for m in model.modules() if isinstance(m, BaseTunerLayer))):
        for name in dir(module):
            held = getattr(module, name, None) if not name.startswith("_") else None
            if hasattr(held, "keys") and hasattr(held, "__contains__") and hasattr(held, "__getitem__"):
                yield held


def test_deleting_leaves_nothing_behind(each: Case) -> None:
    model = each.wrap("first")
    model.add_adapter("second", each.config())
    model.set_adapter("second")
    holding = [held for held in dictionaries(model) if "second" in held]
    assert holding
    with pytest.warns(UserWarning, match="Setting active adapter to first"):
        model.delete_adapter("second")
    assert not [held for held in holding if "second" in held]
    assert not [name for name in model.state_dict() if "second" in name]
    assert model.active_adapters == ["first"]
    assert set(model.peft_config) == {"first"}
    assert trainable(model) == of_adapter(model, "first")
    output(model, each.inputs())
    model.add_adapter("second", each.config())
    model.delete_adapter("second")  # an inactive one
    assert model.active_adapters == ["first"]
    assert not [name for name in model.state_dict() if "second" in name]
    with refused(model, "Adapter unknown does not exist"):
        model.delete_adapter("unknown")
    model.delete_adapter("first")
    assert model.active_adapters == []
    assert torch.equal(output(model.base_model, each.inputs()), output(each.base(), each.inputs()))


def test_unloading_gives_the_base_back(case: Case) -> None:
    base, plain = case.base(), case.base()
    names = base.state_dict().keys()
    model = awaken(peft.get_peft_model(base, case.config())).eval()
    output(model, case.inputs())
    back = model.unload()
    assert back is base
    assert back.state_dict().keys() == names
    assert not any(isinstance(module, BaseTunerLayer) for module in back.modules())
    assert not hasattr(back, "peft_config")
    assert torch.equal(output(back, case.inputs()), output(plain, case.inputs()))


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("options", [{}, {"safe_merge": True}, {"adapter_names": ["default"]}])
def test_merging_is_refused(few: Case, merge: str, options) -> None:
    with refused(model := few.steered(), "its signal depends on a first pass over each input"):
        getattr(model, merge)(**options)


def test_samples_of_a_batch_name_their_adapters(each: Case) -> None:
    model = each.steered().double()
    model.add_adapter("other", each.config())
    inputs = each.inputs(dtype=torch.float64)
    awaken(model)
    expected = []
    for name in ("default", "other"):
        model.set_adapter(name)
        expected.append(output(model, inputs))
    found = output(model, inputs | {"adapter_names": ["default", "other"]})
    torch.testing.assert_close(found, torch.stack([expected[0][0], expected[1][1]]), rtol=1e-9, atol=1e-9)


def test_what_is_made_for_low_rank_adapters_is_refused(tmp_path) -> None:
    model = Case("timm-vit", "lite").wrap()
    model.save_pretrained(tmp_path)
    assert not model.supports_lora_conversion()
    with refused(model, "do not support LoRA conversion", TypeError):
        peft.convert_to_lora(model, rank=2)
    with refused(model, "Hotswapping only supports LORA but TOAST was passed"):
        hotswap_adapter(model, tmp_path, "default")
    with refused(base := Case("timm-vit").base(), "'TOAST' is not compatible with the `PeftMixedModel`"):
        peft.get_peft_model(base, ToastConfig(), mixed=True)


def test_modules_to_save_of_one_adapter_only() -> None:
    case = Case("timm-vit")
    for first, second in ((["head"], None), (None, ["head"])):
        model = case.wrap(modules_to_save=first)
        model.add_adapter("other", case.config(modules_to_save=second))
        assert list(model.base_model.head.modules_to_save) == ["default" if first else "other"]
        for name in ("other", "default"):
            model.set_adapter(name)
            output(model, case.inputs())
            assert trainable(model) == of_adapter(model, name)


def test_the_head_of_a_classifier_belongs_to_every_adapter() -> None:
    case = Case("llama-classifier")
    model = case.wrap()
    assert {"classifier", "score"} <= model.modules_to_save
    model.add_adapter("other", case.config())
    assert list(model.base_model.model.score.modules_to_save) == ["default", "other"]
