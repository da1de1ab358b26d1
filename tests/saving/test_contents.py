"""What a saved adapter holds: what was trained, and of the rest only what `init` does not make again."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import toast
from tests.models import decoder, images, tokens, vit
from tests.snapshots import refused
from toast.config import ToastConfig

FILE, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


def train(model: nn.Module) -> nn.Module:
    """Changes whatever is trainable."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def output(model: Any) -> Tensor:
    torch.manual_seed(3)
    is_vit = any(name.endswith("patch_embed") for name, _ in model.named_modules())
    with torch.no_grad():
        found = model(images() if is_vit else tokens())
    return found if isinstance(found, Tensor) else found.logits


def left_out(folder: Path) -> set[str]:
    """Groups of the tensors that a file leaves out."""
    held = load_file(folder / FILE)
    return {n.rpartition(".toast_")[2].split(".")[0] for n, t in held.items() if n.endswith(".initial")}


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: timm.create_model("vit_tiny_patch16_224"), {"lora_rank": 4}),
        (lambda: decoder(hidden_size=192, num_hidden_layers=6), {"lora_rank": 4}),
        (lambda: timm.create_model("vit_tiny_patch16_224"), {"train": ["task_embedding", "to_signal"]}),
    ],
)
def test_the_file_is_as_large_as_what_was_trained(make, options, tmp_path) -> None:
    model = train(toast.wrap(make(), **options))
    trained = sum(p.numel() * p.itemsize for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    assert (tmp_path / FILE).stat().st_size <= 1.1 * trained


@pytest.mark.parametrize("make", [vit, decoder])
@pytest.mark.parametrize(
    ("options", "groups"),
    [
        ({"lora_rank": 2}, {"to_state", "to_signal"}),
        (
            {"lora_rank": 2, "train": ["task_embedding", "lora"]},
            {"to_state", "to_signal", "channel_transform"},
        ),
        ({"train": ["task_embedding", "to_signal"]}, {"to_state", "channel_transform"}),
        ({"lora_rank": 2, "train": "all"}, set()),
        ({"lora_rank": 2, "init": "official"}, set()),
        ({}, set()),
    ],
)
def test_it_is_loaded_whole_by_every_way(make, options, groups, tmp_path) -> None:
    base = make()
    twins = [copy.deepcopy(base) for _ in range(5)]
    model = train(toast.wrap(base, **options))
    expected = output(model)
    toast.save_adapter(model, tmp_path / "one")
    assert left_out(tmp_path / "one") == groups
    loaded = peft.PeftModel.from_pretrained(twins[0], tmp_path / "one")
    assert torch.equal(output(loaded), expected)
    assert not any(parameter.is_meta for parameter in loaded.parameters())

    sparing = peft.PeftModel.from_pretrained(twins[1], tmp_path / "one", low_cpu_mem_usage=True)
    assert torch.equal(output(sparing), expected)

    second = train(toast.wrap(twins[2], lora_rank=3))
    second.load_adapter(tmp_path / "one", "other")
    second.set_adapter("other")
    assert torch.equal(output(second), expected)
    second.save_pretrained(tmp_path / "several")
    assert (
        load_file(tmp_path / "several" / "other" / FILE).keys() == load_file(tmp_path / "one" / FILE).keys()
    )

    other = toast.wrap(twins[3], **options)
    peft.set_peft_model_state_dict(other, peft.get_peft_model_state_dict(model))
    assert torch.equal(output(other), expected)

    if make is decoder:
        info = twins[4].load_adapter(tmp_path / "one")
        assert torch.equal(output(twins[4]), expected)
        assert not info.missing_keys
        assert not info.unexpected_keys

    loaded.save_pretrained(tmp_path / "again")
    once, again = load_file(tmp_path / "one" / FILE), load_file(tmp_path / "again" / FILE)
    assert once.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in once.items())


@pytest.mark.parametrize("name", ["lora_A", "low_rank", "base_layer", "initial", "toast_x"])
def test_it_is_left_out_whatever_the_adapter_is_called(name: str, tmp_path) -> None:
    base = vit()
    twins = copy.deepcopy(base), copy.deepcopy(base)
    model = train(toast.wrap(base, lora_rank=2, adapter_name=name))
    model.save_pretrained(tmp_path)
    assert left_out(tmp_path / name) == {"to_state", "to_signal"}
    for twin, again in zip(twins, ("default", name), strict=True):
        assert torch.equal(
            output(peft.PeftModel.from_pretrained(twin, tmp_path / name, again)), output(model)
        )


def test_what_is_left_out_takes_the_place_of_what_was_pretuned(tmp_path) -> None:
    base = vit()
    train(toast.wrap(copy.deepcopy(base))).save_pretrained(tmp_path)
    untouched = train(toast.wrap(copy.deepcopy(base), lora_rank=2))
    pretuned = toast.wrap(base, lora_rank=2, pretrained=tmp_path)
    peft.set_peft_model_state_dict(pretuned, peft.get_peft_model_state_dict(untouched))
    assert torch.equal(output(pretuned), output(untouched))


def test_feedback_that_was_pretuned_is_kept(tmp_path) -> None:
    base = vit()
    train(toast.wrap(copy.deepcopy(base))).save_pretrained(tmp_path / "full")
    toast.wrap(base, lora_rank=2, pretrained=tmp_path / "full").save_pretrained(tmp_path / "lite")
    assert left_out(tmp_path / "lite") == set()


def test_a_pretuned_adapter_may_leave_out_what_it_did_not_train(tmp_path) -> None:
    base = vit()
    model = train(toast.wrap(copy.deepcopy(base), train=["task_embedding", "to_signal"]))
    model.save_pretrained(tmp_path)
    assert torch.equal(output(toast.wrap(base, lora_rank=2, pretrained=tmp_path)), output(model))


def test_one_changed_number_is_kept(tmp_path) -> None:
    model = toast.wrap(vit(), lora_rank=2)
    changed = "blocks.1.attn.qkv.toast_to_state"
    with torch.no_grad():
        model.base_model.model.get_submodule(changed)["default"].base_layer.weight[3, 4] = 1e-30
    model.save_pretrained(tmp_path)
    names = {n for n in load_file(tmp_path / FILE) if "base_layer" in n and not n.endswith(".initial")}
    assert names == {f"base_model.model.{changed}.base_layer.weight"}


def test_isometries_between_stages_are_kept(tmp_path) -> None:
    sizes = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": (1, 1)}
    base = timm.models.swin_transformer.SwinTransformer(num_heads=(2, 2), num_classes=3, **sizes).eval()
    twin, x = copy.deepcopy(base), torch.randn(2, 3, 32, 32)
    model = train(toast.wrap(base, lora_rank=2))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(twin, tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("what", ["the sign", "the tensor"])
def test_a_file_that_lacks_a_tensor_is_found(what: str, tmp_path) -> None:
    torch.manual_seed(1)
    toast.wrap(vit(), lora_rank=2, train=["task_embedding", "lora"]).save_pretrained(tmp_path)
    held = load_file(tmp_path / FILE)
    name = "blocks.1.attn.qkv.toast_to_signal." + ("base_layer" if what == "the sign" else "lora_A.low_rank")
    del held["base_model.model." + name + (".weight.initial" if what == "the sign" else ".weight")]
    save_file(held, tmp_path / FILE)
    torch.manual_seed(1)
    with refused(model := vit(), f"1 missing: {name}.weight"):
        peft.PeftModel.from_pretrained(model, tmp_path)


def test_adapters_that_were_saved_in_full_are_loaded(tmp_path) -> None:
    base = vit()
    twin = copy.deepcopy(base)
    model = train(toast.wrap(base, lora_rank=2))
    model.save_pretrained(tmp_path)
    full = {}
    for name, tensor in load_file(tmp_path / FILE).items():
        own = name.removesuffix(".initial")
        zero = "to_signal" in own
        full[own] = tensor if own == name else (torch.zeros(24, 24) if zero else torch.eye(24)).double()
    save_file(full, tmp_path / FILE)
    settings = json.loads((tmp_path / SETTINGS).read_text())
    del settings["checksums"]
    (tmp_path / SETTINGS).write_text(json.dumps(settings))
    assert torch.equal(output(peft.PeftModel.from_pretrained(twin, tmp_path)), output(model))


def test_the_checksums_are_those_of_the_file(tmp_path) -> None:
    model = train(toast.wrap(vit(), lora_rank=2, modules_to_save=["head"]))
    for _ in range(2):  # the second time over an older file
        train(model).save_pretrained(tmp_path)
        saved = json.loads((tmp_path / SETTINGS).read_text())["checksums"]
        assert {f"base_model.model.{name}" for name in saved} == load_file(tmp_path / FILE).keys()
        assert model.peft_config["default"].checksums is None
    ToastConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert json.loads((tmp_path / SETTINGS).read_text())["checksums"] == saved


def test_a_configuration_that_is_written_first_has_the_checksums_too(tmp_path) -> None:
    """As transformers does it: over the file of an earlier save, which it replaces afterwards."""
    torch.manual_seed(1)
    model = train(toast.wrap(vit()))
    model.save_pretrained(tmp_path)
    held = peft.get_peft_model_state_dict(train(model))
    model.peft_config["default"].save_pretrained(tmp_path)
    save_file({name: tensor.contiguous() for name, tensor in held.items()}, tmp_path / FILE)
    torch.manual_seed(1)
    assert torch.equal(output(peft.PeftModel.from_pretrained(vit(), tmp_path)), output(model))


def test_what_is_empty_or_in_parts_is_refused(tmp_path) -> None:
    """ZeRO-3 leaves parameters without elements between calls; PEFT would write files of nothing."""
    model = toast.wrap(vit())
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.data = parameter.new_empty(0)
    with pytest.raises(ValueError, match=r"an adapter is saved whole; 8 of its 8 tensors are empty .*ZeRO-3"):
        model.save_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"Gather them in all processes"):
        toast.save_adapter(model, tmp_path / "empty")
    assert not list(tmp_path.rglob("*.safetensors"))
    model.save_pretrained(tmp_path / "whole", state_dict=whole)
    held = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    assert len(held) == 8
    assert all(tensor.numel() for tensor in held.values())
