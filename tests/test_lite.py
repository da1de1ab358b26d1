"""TOAST-Lite on a pre-tuned adapter: where it starts, what it trains, what is saved, what it needs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import toast
from tests.models import awaken, decoder, images, tokens, vit
from tests.snapshots import refused
from toast.config import ToastConfig
from toast.steering import find_steering

MAKERS = pytest.mark.parametrize("make", [vit, decoder])


def output(model: nn.Module) -> Tensor:
    torch.manual_seed(3)
    dtype = next(model.parameters()).dtype
    is_vit = any(name.endswith("patch_embed") for name, _ in model.named_modules())
    with torch.no_grad():
        found = model(images().to(dtype) if is_vit else tokens())
    return found if isinstance(found, Tensor) else found.logits


def pretuned(folder: Path, base: nn.Module) -> Tensor:
    """Saves a full adapter of a copy of the base; returns what the wrapped model gives."""
    model = awaken(toast.wrap(copy.deepcopy(base)))
    model.save_pretrained(folder)
    return output(model)


def train(model: nn.Module) -> None:
    """Changes whatever is trainable."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


@MAKERS
def test_it_starts_at_the_pretuned_adapter(make, tmp_path) -> None:
    base = make()
    expected = pretuned(tmp_path, base)
    model = toast.wrap(base, lora_rank=4, pretrained=tmp_path)
    assert torch.equal(output(model), expected)
    flags = {
        name.split(".toast_")[1]: p.requires_grad for name, p in model.named_parameters() if ".toast_" in name
    }
    assert flags == {
        "task_embedding.default": True, "channel_transform.default": True,
        **{f"{kind}.default.{factor}.low_rank.weight": True
           for kind in ("to_state", "to_signal") for factor in ("lora_A", "lora_B")},
        **{f"{kind}.default.base_layer.weight": False for kind in ("to_state", "to_signal")},
    }  # fmt: skip
    train(model)
    assert not torch.allclose(output(model), expected)


def test_a_full_adapter_can_start_there_too(tmp_path) -> None:
    base = vit()
    expected = pretuned(tmp_path, base)
    model = toast.wrap(base, pretrained=tmp_path, train="all")
    assert torch.equal(output(model), expected)
    assert all(p.requires_grad for name, p in model.named_parameters() if ".toast_" in name)


@MAKERS
@pytest.mark.parametrize("save_frozen", [True, False])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_it_is_loaded_whole(make, save_frozen: bool, low_cpu_mem_usage: bool, tmp_path) -> None:
    base = make()
    twin = copy.deepcopy(base)
    pretuned(tmp_path / "full", base)
    model = toast.wrap(base, lora_rank=2, pretrained=tmp_path / "full", save_frozen=save_frozen)
    train(model)
    expected = output(model)
    model.save_pretrained(tmp_path / "lite")
    names = load_file(tmp_path / "lite" / "adapter_model.safetensors").keys()
    assert any("base_layer" in name for name in names) == save_frozen
    assert len(names) == 2 + 3 * 2 * (2 + save_frozen)
    if save_frozen:
        (tmp_path / "full").rename(tmp_path / "elsewhere")
    loaded = peft.PeftModel.from_pretrained(twin, tmp_path / "lite", low_cpu_mem_usage=low_cpu_mem_usage)
    torch.testing.assert_close(output(loaded), expected, rtol=0, atol=1e-12)
    assert not any(parameter.is_meta for parameter in loaded.parameters())


@pytest.mark.parametrize("save_frozen", [True, False])
def test_transformers_loads_it_whole(save_frozen: bool, tmp_path) -> None:
    base = decoder()
    twin = copy.deepcopy(base)
    pretuned(tmp_path / "full", base)
    model = toast.wrap(base, lora_rank=2, pretrained=tmp_path / "full", save_frozen=save_frozen)
    train(model)
    model.save_pretrained(tmp_path / "lite")
    twin.load_adapter(tmp_path / "lite")
    assert torch.equal(output(twin), output(model))


def lite(folder: Path, base: nn.Module, **options: Any) -> Tensor:
    """Saves a Lite adapter without its frozen feedback in `folder/lite`, which stands on `folder/full`."""
    pretuned(folder / "full", base)
    model = toast.wrap(
        copy.deepcopy(base), lora_rank=2, pretrained=folder / "full", save_frozen=False, **options
    )
    train(model)
    model.save_pretrained(folder / "lite")
    return output(model)


@pytest.mark.parametrize("what", ["missing", "another", "lite", "text"])
def test_a_wrong_pretuned_adapter_is_refused(what: str, tmp_path) -> None:
    base = vit()
    lite(tmp_path, base)
    path = tmp_path / "full" / "adapter_model.safetensors"
    message = {
        "missing": f"pretrained: {path} does not exist.*ToastConfig.from_pretrained",
        "another": f"pretrained: {path} is not the adapter .* its feedback has checksum .*, expected is",
        "lite": "needs the full feedback of 3 blocks",
        "text": "is damaged or not a safetensors file",
    }[what]
    if what == "missing":
        path.unlink()
    elif what == "text":
        path.write_text("no weights")
    else:
        awaken(toast.wrap(copy.deepcopy(base), lora_rank=2 * (what == "lite"))).save_pretrained(
            tmp_path / "full"
        )
    with refused(base, message):
        peft.PeftModel.from_pretrained(base, tmp_path / "lite")


def test_a_pretuned_adapter_of_another_model_is_refused(tmp_path) -> None:
    pretuned(tmp_path / "gpt2", decoder("gpt2"))
    with refused(model := vit(), "another backbone: its family is gpt2, this model's timm-vit"):
        toast.wrap(model, lora_rank=2, pretrained=tmp_path / "gpt2")
    pretuned(tmp_path / "other", vit())
    with refused(model, "pretrained: .* made for a backbone with other weights"):
        toast.wrap(model, lora_rank=2, pretrained=tmp_path / "other")


def test_a_moved_pretuned_adapter_is_named_again(tmp_path) -> None:
    base = vit()
    expected = lite(tmp_path, base)
    (tmp_path / "full").rename(tmp_path / "moved")
    config = ToastConfig.from_pretrained(tmp_path / "lite")
    config.pretrained = str(tmp_path / "moved")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "lite", config=config)
    assert torch.equal(output(model), expected)


def test_the_checksum_does_not_depend_on_the_precision_of_the_base(tmp_path) -> None:
    base = vit().float()
    twin = copy.deepcopy(base).bfloat16()
    expected = lite(tmp_path, base)
    loaded = peft.PeftModel.from_pretrained(twin, tmp_path / "lite")
    found = output(loaded).float()
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    again = toast.wrap(copy.deepcopy(base).bfloat16(), lora_rank=2, pretrained=tmp_path / "full")
    checksums = {model.peft_config["default"].feedback_checksum for model in (loaded, again)}
    assert checksums == {ToastConfig.from_pretrained(tmp_path / "lite").feedback_checksum}
    layer = again.base_model.model.blocks[0].attn.qkv.toast_to_state["default"]
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float32}
    full = load_file(tmp_path / "full" / "adapter_model.safetensors")
    stored = full["base_model.model.blocks.0.attn.qkv.toast_to_state.weight"]
    assert torch.equal(layer.base_layer.weight, stored)


def test_it_follows_how_the_pretuned_adapter_was_used(tmp_path) -> None:
    base = vit()
    toast.save_adapter(toast.wrap(copy.deepcopy(base), select_from=1, select_features="mixed"), tmp_path)
    config = find_steering(toast.wrap(copy.deepcopy(base), pretrained=tmp_path)).selector.configs["default"]
    assert (config.select_from, config.select_features) == (1, "mixed")
    for option in ({"select_from": 0}, {"select_features": "normed"}, {"value_bias": "twice"}):
        with pytest.raises(
            ValueError, match=f"{next(iter(option))}: the pre-tuned adapter in .* was made with"
        ):
            toast.wrap(copy.deepcopy(base), pretrained=tmp_path, **option)
