"""The configuration that PEFT is given is the model's, counts as it is written, and serves other models."""

from __future__ import annotations

import copy
import dataclasses
import gc
import logging
import pickle
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from torch import nn

import toast
from tests import zoo
from tests.models import awaken, decoder, images, vit
from tests.peft_contract.cases import Case, layers, output
from tests.snapshots import refused
from toast.config import ToastConfig

HEADS = {
    "SEQ_CLS": ("AutoModelForSequenceClassification", "score"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "score"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "qa_outputs"),
}


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}, {"steer_from": 1}])
@pytest.mark.parametrize("task", HEADS)
def test_the_head_of_a_task_is_trained_and_saved(task: str, options, tmp_path) -> None:
    auto, head = HEADS[task]
    base = zoo.build("llama", torch.float32, auto)
    twin = copy.deepcopy(base)
    config = ToastConfig(task_type=task, **options)
    model = awaken(peft.get_peft_model(base, config))
    assert head in config.modules_to_save
    trained = model.get_base_model().get_submodule(head).modules_to_save["default"].weight
    assert trained.requires_grad
    nn.init.normal_(trained)
    model.add_adapter("other", ToastConfig(task_type=task, **options))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(twin, tmp_path)
    assert type(loaded) is type(model)
    x = {"input_ids": torch.randint(1, zoo.VOCABULARY, (2, 7))}
    assert torch.equal(output(loaded, x), output(model.eval(), x))
    assert model.unload() is base


@pytest.mark.parametrize("task", HEADS)
def test_a_task_whose_head_is_not_there(task: str) -> None:
    config = ToastConfig(task_type=task)
    with refused(
        base := decoder(), "modules_to_save: LlamaForCausalLM has no module '(classifier|qa_outputs)'"
    ):
        peft.get_peft_model(base, config)


def test_what_is_written_into_the_configuration_is_saved(tmp_path) -> None:
    config = ToastConfig()
    model = peft.get_peft_model(vit(), config)
    assert model.peft_config["default"] is config
    assert {id(layer.configs["default"]) for layer in layers(model)} == {id(config)}
    config.revision = "one"
    config.task_type = "FEATURE_EXTRACTION"
    model.save_pretrained(tmp_path)
    read = ToastConfig.from_pretrained(tmp_path)
    assert (read.revision, read.task_type) == ("one", "FEATURE_EXTRACTION")


def test_wrap_leaves_the_configuration_alone() -> None:
    config = ToastConfig()
    before = copy.deepcopy(config)
    toast.wrap(vit(), config)
    assert config == before


def test_one_configuration_for_several_adapters_of_a_model() -> None:
    config = ToastConfig(modules_to_save=["head"])
    model = peft.get_peft_model(vit(), config)
    for name in ("default2", "other_default", "foodefault_bar", "efaul"):
        model.add_adapter(name, config)
    names = peft.get_peft_model_state_dict(toast.wrap(vit(), modules_to_save=["head"])).keys()
    for name in model.peft_config:
        assert model.peft_config[name] is config
        assert peft.get_peft_model_state_dict(model, adapter_name=name).keys() == names


def test_one_configuration_for_one_model_after_the_other() -> None:
    config = ToastConfig()
    peft.get_peft_model(vit(), config)
    gc.collect()
    first = copy.deepcopy(config)
    model = peft.get_peft_model(decoder(), config)  # another family: nothing of the first may be left
    assert model.peft_config["default"] is config
    assert (first.family, config.family) == ("timm-vit", "decoder") or first.family != config.family
    assert config.backbone["width"] == first.backbone["width"]
    assert config.target_modules != first.target_modules


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
def test_one_configuration_for_two_models_that_live(tmp_path, caplog) -> None:
    one, two, config = vit(), vit(), ToastConfig(init="official")
    first = peft.get_peft_model(copy.deepcopy(one), config)
    filled = copy.deepcopy(config)
    with caplog.at_level(logging.WARNING, "toast"):
        second = peft.get_peft_model(copy.deepcopy(two), config)
    assert "in use on another backbone" in caplog.text
    assert first.peft_config["default"] is config
    assert config == filled
    assert second.peft_config["default"].backbone != config.backbone
    for model, base, name in ((first, one, "first"), (second, two, "second")):
        model.save_pretrained(tmp_path / name)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name)
        x = images()
        assert torch.equal(output(loaded, {"x": x}), output(model.eval(), {"x": x}))
    with refused(base := copy.deepcopy(two), "made for a backbone with other weights"):
        PeftModel.from_pretrained(base, tmp_path / "first")


@pytest.mark.parametrize("first", ["get_peft_model", "inject_adapter_in_model"])
def test_one_configuration_of_a_task_for_two_models_that_live(first: str) -> None:
    one = zoo.build("llama", torch.float32, HEADS["TOKEN_CLS"][0])
    two, config = copy.deepcopy(one), ToastConfig(task_type="TOKEN_CLS")
    nn.init.normal_(two.model.layers[0].self_attn.v_proj.weight)
    first_model = getattr(peft, first)(*((one, config) if first == "get_peft_model" else (config, one)))
    model = peft.get_peft_model(two, config)
    assert "score" in model.peft_config["default"].modules_to_save
    assert model.get_base_model().score.modules_to_save["default"].weight.requires_grad
    x = {"input_ids": torch.randint(1, zoo.VOCABULARY, (2, 7)), "labels": torch.zeros(2, 7, dtype=torch.long)}
    for each in (first_model, model):
        each(**x).loss.backward()


def test_the_copy_of_a_model_uses_its_own_configuration() -> None:
    config = ToastConfig()
    model = peft.get_peft_model(vit(), config)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        own = twin.peft_config["default"]
        assert own is not config
        assert own == config
        other = peft.get_peft_model(vit(), own)
        assert other.peft_config["default"] is not own  # the twin lives and has another backbone


def test_what_the_user_sets_is_not_taken_back() -> None:
    config = ToastConfig()
    base = vit()
    model = peft.get_peft_model(base, config)
    config.select_features = "unnormed"
    model.unload()
    model = peft.get_peft_model(base, config)
    assert model.peft_config["default"] is config
    assert config.select_features == "unnormed"
    assert config.family == "timm-vit"


def test_a_pretuned_module_is_read_for_each_model(tmp_path) -> None:
    base = vit()
    generic = awaken(toast.wrap(copy.deepcopy(base)))
    toast.save_adapter(generic, tmp_path)
    config = ToastConfig(pretrained=str(tmp_path), lora_rank=2)
    expected = generic.get_base_model().blocks[0].attn.qkv.toast_to_signal["default"].weight
    for _ in range(2):
        model = peft.get_peft_model(copy.deepcopy(base), config)
        assert model.peft_config["default"] is config
        assert config.feedback_checksum
        found = model.get_base_model().blocks[0].attn.qkv.toast_to_signal["default"]
        assert torch.equal(found.base_layer.weight, expected)
        del model


@pytest.mark.parametrize("options", [{"steer_from": 7}, {"select_from": 9}, {"modules_to_save": ["absent"]}])
def test_a_failed_injection_leaves_the_configuration_as_it_was(options, tmp_path) -> None:
    config = ToastConfig(**options)
    before = copy.deepcopy(vars(config))
    with refused(base := vit(), "needs a block from|has no module"):
        peft.get_peft_model(base, config)
    assert vars(config) == before
    config.steer_from, config.select_from, config.modules_to_save = 0, None, None
    assert peft.get_peft_model(base, config).peft_config["default"] is config


def test_an_injection_that_fails_late_leaves_the_configuration_as_it_was(monkeypatch) -> None:
    config, base = ToastConfig(), vit()
    before = copy.deepcopy(vars(config))
    with monkeypatch.context() as patch:
        patch.setattr(
            "toast.model.ToastSelector.update_layer", lambda *_: (_ for _ in ()).throw(OSError("full"))
        )
        with refused(base, "full", OSError):
            peft.get_peft_model(base, config)
    assert vars(config) == before
    assert peft.get_peft_model(decoder(), config).peft_config["default"] is config


VALUES = [f"blocks.{i}.attn.qkv" for i in range(3)]


@pytest.mark.parametrize(
    ("make", "options", "targets"),
    [
        (vit, {}, ["norm", *VALUES]),
        (vit, {}, r"norm|blocks\.[0-2]\.attn\.qkv"),
        (vit, {"steer_from": 2}, ["norm", VALUES[2]]),
        (decoder, {}, ["v_proj", "model.norm"]),
        (decoder, {}, {"self_attn.v_proj", "model.norm"}),
    ],
)
def test_the_modules_that_toast_wraps_may_be_named(make, options, targets: Any, tmp_path) -> None:
    base = make()
    model = peft.get_peft_model(copy.deepcopy(base), config := ToastConfig(target_modules=targets, **options))
    assert config.target_modules == targets
    assert len(layers(awaken(model))) == (2 if options else 4)
    model.add_adapter("other", ToastConfig(target_modules=targets, **options))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    for layer, source in zip(layers(loaded), layers(model), strict=True):
        for (_, found), (_, expected) in zip(layer.groups("default"), source.groups("default"), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (["qkv"], "blocks.0.attn.qkv, blocks.1.attn.qkv, blocks.2.attn.qkv"),
        (["norm", VALUES[2]], "blocks.0.attn.norm"),
        (["fc1", "fc2"], "mlp.fc1"),
        ("all-linear", "none of the modules"),
        (["absent"], "none of the modules"),
        ([], "none of the modules"),
        (["norm", "qkv", "fc1"], "mlp.fc1"),
    ],
)
def test_other_modules_are_refused(targets: Any, named: str) -> None:
    config = ToastConfig(target_modules=targets)
    with refused(base := vit(), f"target_modules: needs the final norm and the value .* names .*{named}"):
        peft.get_peft_model(base, config)
    assert config.target_modules == targets
    with pytest.raises(ValueError, match="target_modules: needs None, a regular expression or module names"):
        ToastConfig(target_modules=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("read", [ToastConfig.from_pretrained, peft.PeftConfig.from_pretrained])
def test_a_loaded_configuration_is_filled_for_its_model(read, tmp_path) -> None:
    base = vit()
    toast.save_adapter(toast.wrap(copy.deepcopy(base)), tmp_path)
    config = read(tmp_path)
    config.steer_from = 1  # the saved names are of all blocks
    assert len(layers(toast.wrap(copy.deepcopy(base), config))) == 3
    assert len(layers(toast.wrap(base, dataclasses.replace(config, steer_from=2)))) == 2


@pytest.mark.parametrize("kind", ["timm-vit", "gpt2", "bert"])
def test_a_second_value_bias_is_said_to_start_apart(kind: str, caplog) -> None:
    case = Case(kind)
    frozen = output(case.base(), case.inputs())
    with caplog.at_level(logging.WARNING, "toast"):
        model = case.wrap(value_bias="twice")
    assert "adds the bias of 3 value projections once more" in caplog.text
    assert (output(model, case.inputs()) - frozen).abs().max() > 1e-3
    caplog.clear()
    with caplog.at_level(logging.WARNING, "toast"):
        case.wrap(value_bias="twice", init="official")
        model = case.wrap(value_bias="once")
    assert not caplog.text
    torch.testing.assert_close(output(model, case.inputs()), frozen)


def test_without_a_bias_twice_starts_at_the_frozen_model(caplog) -> None:
    case = Case("llama")
    with caplog.at_level(logging.WARNING, "toast"):
        model = case.wrap(value_bias="twice")
    assert not caplog.text
    torch.testing.assert_close(output(model, case.inputs()), output(case.base(), case.inputs()))


def test_a_loaded_adapter_is_not_said_to_start_anywhere(tmp_path, caplog) -> None:
    case = Case("gpt2")
    case.steered(value_bias="twice").save_pretrained(tmp_path)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "toast"):
        PeftModel.from_pretrained(case.base(), tmp_path)
        case.base().load_adapter(tmp_path)
    assert not caplog.text


NAMES = [
    "toast_to_state", "toast_task_embedding", "toast_x", "low_rank", "lora_A", "base_layer", "weight", "bias",
    "0", "model", "base_model", "norm", "blocks", "modules_to_save", "original_module", "fused_x", "a b",
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in NAMES),
        *(
            (name, {"lora_rank": 2})
            for name in ("toast_to_state", "low_rank", "lora_A", "base_layer", "weight")
        ),
        *(
            (name, {"lora_rank": 2, "save_frozen": False})
            for name in ("toast_to_state", "base_layer", "low_rank")
        ),
    ],
)
def test_an_adapter_may_have_any_name_that_stands_alone(name: str, options, tmp_path) -> None:
    base = vit()
    if "save_frozen" in options:
        toast.save_adapter(awaken(toast.wrap(copy.deepcopy(base))), tmp_path / "generic")
        options = {**options, "pretrained": str(tmp_path / "generic")}
    model = peft.get_peft_model(copy.deepcopy(base), ToastConfig(modules_to_save=["head"], **options), name)
    with torch.no_grad():
        for layer in layers(model):
            for group, parameter in layer.groups(name):
                if group in layer.configs[name].trained_groups:
                    parameter.normal_()
    nn.init.normal_(model.get_base_model().head.modules_to_save[name].weight)
    model.save_pretrained(tmp_path / "saved")
    twin = peft.get_peft_model_state_dict(
        toast.wrap(copy.deepcopy(base), modules_to_save=["head"], **options)
    )
    assert peft.get_peft_model_state_dict(model, adapter_name=name).keys() == twin.keys()
    x = {"x": images()}
    for again in (name, "default"):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "saved" / name, again)
        assert torch.equal(output(loaded, x), output(model.eval(), x))


@pytest.mark.filterwarnings("ignore:Adapter name .* should not be contained in the prefix")
@pytest.mark.parametrize("name", ["toast", "t", "toast_", "as"])
def test_a_name_within_the_prefix(name: str, tmp_path) -> None:
    case = Case("timm-vit")
    model = awaken(case.wrap(name))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path / name, name)
    assert torch.equal(output(loaded, case.inputs()), output(model, case.inputs()))


@pytest.mark.filterwarnings("ignore:Adapter name .* should not be contained in the prefix")
@pytest.mark.parametrize(
    "name", ["default.x", ".", "", "a\\b", "/root", "keys", "forward", "train", "pop", "training", "to"]
)
def test_other_names_are_refused_at_once(name: str) -> None:
    with refused(base := vit(), f"adapter_name: needs text without .*got {re.escape(repr(name))}"):
        peft.get_peft_model(base, ToastConfig(), adapter_name=name)
    model = toast.wrap(base)
    with refused(model, "adapter_name: needs text without"):
        model.add_adapter(name, ToastConfig())
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "name",
    ["weight", "base_model", "model", "blocks", "0", "qkv", "toast_to_state", "toast_task_embedding", "norm"],
)
def test_a_name_that_would_lose_tensors_of_another_adapter_is_refused(name: str, first: bool) -> None:
    one, two = (name, "default") if first else ("default", name)
    model = toast.wrap(vit(), adapter_name=one)
    with refused(model, f"adapter_name: {name!r} is a part of '.*', a tensor of adapter 'default'"):
        model.add_adapter(two, ToastConfig())
    assert list(model.peft_config) == [one]


@pytest.mark.parametrize("name", ["low_rank", "lora_A", "base_layer"])
def test_names_within_lite_adapters_clash_only_there(name: str) -> None:
    model = toast.wrap(vit(), lora_rank=2)
    with refused(model, f"adapter_name: {name!r} is a part of"):
        model.add_adapter(name, ToastConfig())
    full = toast.wrap(vit())
    full.add_adapter(name, ToastConfig())
    assert (
        peft.get_peft_model_state_dict(full).keys()
        == peft.get_peft_model_state_dict(full, adapter_name=name).keys()
    )


def test_names_within_heads_clash_too(tmp_path: Path) -> None:
    with refused(
        base := vit(), "Please ensure that the adapter name, 'head', does not conflict"
    ):  # PEFT's own
        peft.get_peft_model(base, ToastConfig(modules_to_save=["head"]), "head")
    model = toast.wrap(vit(), modules_to_save=["head"])
    with refused(model, "adapter_name: 'head' is a part of 'base_model.model.head.modules_to_save.default"):
        model.add_adapter("head", ToastConfig())
    model.add_adapter("a/b", ToastConfig())
    model.save_pretrained(tmp_path)
    assert (tmp_path / "a" / "b" / "adapter_config.json").is_file()
