"""Wrong models, adapters, files and settings: each is refused with its reason, and nothing has changed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import peft
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import toast
from tests.models import awaken, decoder, images, tokens, vit
from tests.snapshots import refused
from toast.config import ToastConfig
from toast.value import ToastValue

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3}


def saved(folder: Path, model: nn.Module | None = None, **options) -> Path:
    """Saves an adapter of a tiny ViT, or of `model`."""
    torch.manual_seed(1)
    awaken(toast.wrap(vit() if model is None else model, **options)).save_pretrained(folder)
    return folder


def same_vit(**options) -> nn.Module:
    """The ViT that `saved` was made for."""
    torch.manual_seed(1)
    return vit(**options)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize("route", [toast.wrap, lambda m: peft.get_peft_model(m, ToastConfig())])
def test_a_wrapped_model_is_not_wrapped_again(route) -> None:
    with refused(model := toast.wrap(vit()), "wrapped (by PEFT )?already"):
        route(model)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_an_adapter_is_not_overwritten_through_the_inner_model() -> None:
    model = awaken(toast.wrap(vit()))
    config = model.peft_config["default"]
    with refused(model, "an adapter 'default' already"):
        peft.get_peft_model(model.get_base_model(), ToastConfig(select_from=1))
    assert model.peft_config["default"] == config


def shared_projection() -> nn.Module:
    model = vit()
    model.blocks[2].attn.qkv = model.blocks[0].attn.qkv
    return model


def shared_block() -> nn.Module:
    model = vit()
    model.blocks[2] = model.blocks[0]
    return model


def without_projection() -> nn.Module:
    model = vit()
    del model.blocks[1].attn.qkv
    return model


def renamed_projection() -> nn.Module:
    model = decoder()
    attention = model.model.layers[1].self_attn
    attention.values = attention.v_proj
    del attention.v_proj
    return model


def two_trunks() -> nn.Module:
    return nn.ModuleDict({"a": vit(), "b": vit()})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: timm.create_model("resnet10t", num_classes=3),
            "ResNet contains no trunk .*toast families.*Not found: blocks.*anatomy",
        ),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)), "Sequential contains no trunk"),
        (without_projection, "Attention has no|Block has no value projection of block 1 at 'attn.qkv'"),
        (renamed_projection, "no value projection of block 1 at 'self_attn.v_proj'"),
        (shared_projection, "shares one value projection"),
        (shared_block, "shares one value projection"),
        (two_trunks, r"several trunks: a \(timm-vit\), b \(timm-vit\)"),
        (lambda: vit(depth=0), "is not a list of blocks"),
    ],
)
def test_models_that_cannot_be_steered(make, message: str) -> None:
    model = make()
    with refused(model, message):
        toast.wrap(model)


def test_one_of_several_trunks_can_be_named() -> None:
    model = toast.wrap(two_trunks(), anatomy={"trunk": "b"})
    named = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert named
    assert all(".b." in name for name in named)


@pytest.mark.parametrize(
    ("anatomy", "message"),
    [
        ({"blocks": "blocks"}, "anatomy: needs blocks, norm, value"),
        ({"blocks": "layers", "value": "attn.qkv", "norm": "norm"}, "no list of blocks at 'layers'"),
        (
            {"blocks": "blocks", "value": "attn.v", "norm": "norm"},
            "no value projection of block 0 at 'attn.v'",
        ),
        ({"blocks": "blocks", "value": "attn.qkv", "norm": "ln"}, "no final norm at 'ln'"),
        (
            {"blocks": "blocks", "value": "attn.norm", "norm": "norm"},
            "no weight; needs a linear map|Identity",
        ),
        ({"blocks": "patch_embed", "value": "attn", "norm": "norm"}, "is not a list of blocks"),
        (
            {"blocks": "blocks", "value": "attn.qkv", "norm": "norm", "layout": "first"},
            "layout: needs one of separate, last_third.*; got 'first'",
        ),
        (
            {"blocks": "blocks", "value": "attn.qkv", "norm": "norm", "select_features": "all"},
            "select_features: needs one of normed, unnormed, mixed",
        ),
        ({"blocks": 3, "value": "attn.qkv", "norm": "norm"}, "names as text.*blocks=3"),
        (
            {"blocks": "blocks", "value": "attn.qkv", "norm": "norm", "methods": ["run"]},
            "has no method 'run' to steer",
        ),
        ({"trunk": "body"}, "no trunk that TOAST knows at 'body'"),
    ],
)
def test_a_wrong_anatomy_is_refused(anatomy, message: str) -> None:
    model = vit()
    with refused(model, message):
        toast.wrap(model, anatomy=anatomy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rnk": 4}, r"unknown option lora_rnk. Did you mean lora_rank\? The options"),
        ({"init": "random"}, "init: needs one of 'identity', 'official'; got 'random'"),
        ({"value_bias": 2}, "value_bias: needs one of 'once', 'twice'; got 2"),
        ({"select_features": "last"}, "select_features: needs one of 'normed', 'unnormed', 'mixed', None"),
        ({"select_from": -1}, "select_from: needs None, a block counted from 0, or a share of the depth"),
        ({"select_from": 1.0}, "select_from: needs None, a block counted from 0, or .*; got 1.0"),
        ({"select_from": 3}, "select_from: needs a block from 0 to 2; got 3"),
        ({"lora_rank": -1}, r"lora_rank: needs 0 \(full TOAST\) or a positive rank; got -1"),
        ({"lora_rank": "4"}, "lora_rank: needs .*; got '4'"),
        ({"lora_rank": True}, "lora_rank: needs .*; got True"),
        ({"lora_rank": 4, "lora_alpha": 0}, "lora_alpha: needs None or a number above 0; got 0"),
        ({"lora_rank": 4, "lora_alpha": float("nan")}, "lora_alpha: needs None or a number above 0; got nan"),
        (
            {"lora_rank": 4, "lora_dropout": 1.0},
            "lora_dropout: needs a probability from 0 to below 1; got 1.0",
        ),
        ({"lora_alpha": 8.0}, "lora_alpha and lora_dropout need TOAST-Lite; set lora_rank"),
        ({"reconstruction_weight": -0.1}, "reconstruction_weight: needs 0 or a positive number; got -0.1"),
        ({"reconstruction_scale": 0}, "reconstruction_scale: needs a number above 0; got 0"),
        ({"feedback_form": "fused"}, "feedback_form: needs one of .*; got 'fused'"),
        ({"train": "head"}, "train: needs 'all' or a list of task_embedding"),
        ({"train": ["prompt"]}, "train: needs one of 'task_embedding', .*; got 'prompt'"),
        ({"train": ["lora"]}, "train: 'lora' needs TOAST-Lite"),
        ({"train": 3}, "train: needs None, 'all' or a list of groups; got 3"),
        ({"modules_to_save": "head"}, "modules_to_save: needs None or a list of module names; got 'head'"),
        (
            {"modules_to_save": ["haed"]},
            "modules_to_save: VisionTransformer has no module 'haed'; its children are .*head",
        ),
        ({"save_frozen": 0}, "save_frozen: needs True or False; got 0"),
        ({"save_frozen": False}, "save_frozen=False needs TOAST-Lite"),
        ({"save_frozen": False, "lora_rank": 4}, "save_frozen=False needs the folder"),
        (
            {"save_frozen": False, "lora_rank": 4, "pretrained": "x", "train": "all"},
            "save_frozen=False leaves the feedback out",
        ),
        ({"anatomy": "blocks"}, "anatomy: needs None or a dictionary of names; got 'blocks'"),
        ({"backbone": 3}, "backbone: needs None or a dictionary; got 3"),
        ({"feedback_checksum": 3}, "feedback_checksum: needs None or text; got 3"),
        ({"pretrained": "/nowhere"}, "pretrained: /nowhere/adapter_model.safetensors does not exist"),
    ],
)
def test_a_wrong_setting_is_refused(options, message: str) -> None:
    model = vit()
    with refused(model, message):
        toast.wrap(model, **options)


def test_a_config_and_options_are_not_mixed() -> None:
    with refused(model := vit(), "pass a config or options, not both; got config and lora_rank"):
        toast.wrap(model, ToastConfig(), lora_rank=4)


def test_an_official_variant_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match=r"variant: needs one of 'vision', .*; got 'audio'"):
        ToastConfig.official("audio")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: same_vit(depth=2), "another backbone: its blocks is 3, this model's 2"),
        (lambda: same_vit(embed_dim=12), "another backbone: its width is 24, this model's 12"),
        (lambda: decoder("gpt2"), "another backbone: its family is timm-vit, this model's gpt2"),
        (vit, "backbone with other weights"),
    ],
)
def test_an_adapter_of_another_backbone(make, message: str, tmp_path) -> None:
    folder = saved(tmp_path / "adapter")
    torch.manual_seed(7)
    model = make()
    with refused(model, message):
        peft.PeftModel.from_pretrained(model, folder)


def test_the_check_of_the_backbone_can_be_waived(tmp_path) -> None:
    config = ToastConfig.from_pretrained(saved(tmp_path / "adapter"))
    config.backbone = None
    model = peft.PeftModel.from_pretrained(vit(), tmp_path / "adapter", config=config)
    assert model.peft_config["default"].backbone["blocks"] == 3


def change(folder: Path, edit) -> None:
    path = folder / "adapter_model.safetensors"
    held = load_file(path)
    edit(held)
    save_file(held, path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda t: t.pop("base_model.model.blocks.1.attn.qkv.toast_to_state.weight"),
            "1 missing: blocks.1.attn.qkv.toast_to_state.weight",
        ),
        (
            lambda t: t.update(
                {"base_model.model.blocks.7.attn.qkv.toast_to_state.weight": torch.zeros(24, 24)}
            ),
            "1 unexpected: blocks.7.attn.qkv",
        ),
        (
            lambda t: t.update({"base_model.model.norm.toast_task_embedding": torch.zeros(12)}),
            r"of another shape: norm.toast_task_embedding is \(12,\), needs \(24,\)",
        ),
        (
            lambda t: t.clear() or t.update({"x.lora_A.weight": torch.zeros(2, 2)}),
            "10 missing: .* and 4 more",
        ),
        (lambda t: t.pop("base_model.model.head.weight"), "1 missing: head.weight"),
        (
            lambda t: t.update({"base_model.model.head.weight": torch.zeros(9, 24)}),
            r"head.weight is \(9, 24\), needs \(5, 24\)",
        ),
    ],
)
@pytest.mark.parametrize("route", ["from_pretrained", "load_adapter"])
def test_missing_unexpected_and_misshapen_tensors(edit, message: str, route: str, tmp_path) -> None:
    folder = saved(tmp_path / "adapter", modules_to_save=["head"])
    change(folder, edit)
    model = same_vit()
    if route == "load_adapter":
        model = toast.wrap(model, modules_to_save=["head"])
    with refused(model, message):
        if route == "load_adapter":
            model.load_adapter(folder, "second")
        else:
            peft.PeftModel.from_pretrained(model, folder)


@pytest.mark.parametrize("content", ["truncated", "text"])
@pytest.mark.parametrize("route", ["from_pretrained", "load_adapter"])
def test_a_damaged_file(content: str, route: str, tmp_path) -> None:
    folder = saved(tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if content == "truncated" else b"These are no weights at all.")
    model = same_vit() if route == "from_pretrained" else toast.wrap(same_vit())
    with refused(model, "adapter_model.safetensors is damaged or not a safetensors file"):
        if route == "load_adapter":
            model.load_adapter(folder, "second")
        else:
            peft.PeftModel.from_pretrained(model, folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text[: len(text) // 2], r"Expecting|Unterminated|delimiter"),
        (lambda text: text.replace('"identity"', '"random"'), "init: needs one of"),
        (lambda text: json.dumps({"peft_type": "TOAST", "lora_rank": -2}), "lora_rank: needs"),
    ],
)
def test_a_corrupt_configuration(edit, message: str, tmp_path) -> None:
    path = saved(tmp_path / "adapter") / "adapter_config.json"
    path.write_text(edit(path.read_text()))
    with refused(model := same_vit(), message):
        peft.PeftModel.from_pretrained(model, path.parent)


def test_an_adapter_of_another_method_beside_toast(tmp_path) -> None:
    lora = peft.get_peft_model(same_vit(), peft.LoraConfig(r=2, target_modules=["qkv"]))
    lora.save_pretrained(tmp_path / "lora")
    model = toast.wrap(same_vit())
    with refused(model, "Cannot combine adapters with different peft types"):
        model.load_adapter(tmp_path / "lora", "second")
    with refused(fresh := same_vit(), "pretrained: .* needs the full feedback of 3 blocks"):
        toast.wrap(fresh, lora_rank=2, pretrained=tmp_path / "lora")


@pytest.mark.parametrize("fails_at", [1, 2, 3])
@pytest.mark.parametrize("others", [0, 1])
@pytest.mark.parametrize("make", [vit, decoder])
def test_a_failure_in_the_middle_undoes_everything(fails_at: int, others: int, make, monkeypatch) -> None:
    model = make()
    config = ToastConfig(modules_to_save=["head" if make is vit else "lm_head"])
    if others:
        model = awaken(peft.get_peft_model(model, config, "first"))
    original, calls = ToastValue.update_layer, []

    def fail(self, *args) -> None:
        calls.append(self)
        if len(calls) == fails_at:
            raise RuntimeError("injected")
        original(self, *args)

    monkeypatch.setattr(ToastValue, "update_layer", fail)
    with refused(model, "injected", RuntimeError):
        model.add_adapter("second", config) if others else peft.get_peft_model(model, config)


def test_a_failure_at_the_very_end_undoes_everything(monkeypatch) -> None:
    model = vit()
    monkeypatch.setattr("toast.model._attach", lambda *_: 1 / 0)
    with refused(model, "division", ZeroDivisionError):
        toast.wrap(model, modules_to_save=["head"])


@pytest.mark.usefixtures("adapters_of_transformers")
def test_transformers_can_try_again_after_a_refusal() -> None:
    with refused(model := decoder(), "select_from: needs a block from 0 to 2; got 7"):
        model.add_adapter(ToastConfig(select_from=7))
    model.add_adapter(ToastConfig(select_from=1))
    assert model.active_adapters() == ["default"]


def test_inputs_that_do_not_fit_say_what_fits() -> None:
    model = toast.wrap(vit())
    with refused(model, r"Input height \(20\) doesn't match model \(16\)", AssertionError):
        model(images(size=20))
    with refused(model, "Target 5 is out of bounds", IndexError):
        F.cross_entropy(model(images(2)), torch.tensor([0, 5]))
    language = toast.wrap(decoder())
    with refused(language, "index out of range", IndexError):
        language(tokens() + 100)


def test_an_unknown_public_name() -> None:
    with pytest.raises(AttributeError, match=re.escape("module 'toast' has no attribute 'warp'")):
        _ = toast.warp
