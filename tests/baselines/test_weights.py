"""Trained tensors come back bit for bit, and a misfit leaves the model alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.models import images, vit
from toast.baselines.adaptformer import find_adapters
from toast.baselines.applying import METHODS, apply_method
from toast.baselines.attentive import find_probe
from toast.baselines.vpt import find_prompts
from toast.baselines.weights import load_trained, read_method, save_trained

OPTIONS: dict[str, dict[str, Any]] = {
    "partial": {"freeze": 2},
    "vpt-deep": {"prompts": 3},
    "adapter": {"bottleneck": 5, "scale": 0.3},
    "attentive": {"queries": 3},
}


def backbone() -> nn.Module:
    torch.manual_seed(1)
    return vit()


def trained(method: str) -> nn.Module:
    """A model whose trained parameters are others than at the start."""
    model, _ = apply_method(backbone(), method, **OPTIONS.get(method, {}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("method", METHODS)
def test_a_fresh_base_becomes_the_trained_model(method: str, tmp_path: Path) -> None:
    model, x = trained(method), images(2)
    folder = save_trained(model, tmp_path / "run", {"method": method, "note": "kept"})
    assert {path.name for path in folder.iterdir()} == {"trained.safetensors", "method.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    other = backbone()
    assert not torch.equal(other(x), model(x))
    said = load_trained(other, folder)
    assert torch.equal(other(x), model(x))
    assert (said["method"], said["note"]) == (method, "kept")
    assert list(said["parameters"]) == [n for n, p in model.named_parameters() if p.requires_grad]
    assert (find_prompts(other) is not None) == method.startswith("vpt")
    assert bool(find_adapters(other)) == (method == "adapter")
    assert (find_probe(other) is not None) == (method == "attentive")
    load_trained(other, folder)  # into a model that has the parts already
    assert torch.equal(other(x), model(x))


def refused(model: nn.Module, folder: Path, match: str) -> None:
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        load_trained(model, folder)
    after = snapshot(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("method", ["linear", "vpt-deep", "adapter"])
def test_another_base_is_refused(method: str, tmp_path: Path) -> None:
    folder = save_trained(trained(method), tmp_path / "run", {"method": method})
    torch.manual_seed(2)
    refused(vit(), folder, r"a base with other weights \(a few values of pos_embed differ\)|few values of")
    refused(vit(classes=7), folder, r"head.weight is \(5, 24\), needs \(7, 24\).*reset_head")
    refused(vit("no-value-bias", depth=2), folder, "does not fit|other weights|which this model lacks")


def test_the_same_base_in_another_precision_fits(tmp_path: Path) -> None:
    folder = save_trained(trained("linear"), tmp_path / "run", {"method": "linear"})
    model = backbone().bfloat16()
    load_trained(model, folder)
    assert model.head.weight.dtype == torch.bfloat16


def test_names_tell_what_does_not_fit(tmp_path: Path) -> None:
    folder = save_trained(trained("bias"), tmp_path / "run", {"method": "bias"})
    refused(vit("no-value-bias"), folder, r"unexpected: blocks\.0\.attn\.qkv\.bias")


def test_running_statistics_are_kept(tmp_path: Path) -> None:
    def made() -> nn.Sequential:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    model, other = made(), made()
    model.requires_grad_(False)[2].requires_grad_(True)
    model.train()(torch.randn(8, 4) + 3)
    load_trained(other, save_trained(model, tmp_path / "run", {"method": "linear"}))
    x = torch.randn(3, 4)
    assert torch.equal(other.eval()(x), model.eval()(x))


def test_tensors_of_peft_are_left_to_it(tmp_path: Path) -> None:
    model = peft.get_peft_model(backbone(), peft.LoraConfig(target_modules=["qkv"], modules_to_save=["head"]))
    with pytest.raises(ValueError, match="no trained tensors beside PEFT's"):
        save_trained(model, tmp_path / "run", {"method": "lora"})
    model.get_base_model().norm.requires_grad_(True)
    said = read_method(save_trained(model, tmp_path / "run", {"method": "lora"}))
    assert list(said["parameters"]) == ["norm.weight", "norm.bias"]


def test_an_earlier_save_is_replaced_and_other_files_stay(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    save_trained(trained("linear"), folder, {"method": "linear"})
    (folder / "notes.txt").write_text("mine")
    model = trained("bias")
    save_trained(model, folder, {"method": "bias"})
    other = backbone()
    assert load_trained(other, folder)["method"] == "bias"
    assert torch.equal(other(images(1).zero_()), model(images(1).zero_()))
    assert (folder / "notes.txt").read_text() == "mine"


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    folder = save_trained(trained("linear"), tmp_path / "run", {"method": "linear"})
    method, weights = folder / "method.json", folder / "trained.safetensors"
    text = method.read_text()
    method.write_text(text[:-20])
    refused(backbone(), folder, "method.json is damaged or not JSON")
    method.write_text(json.dumps({"format": 99}))
    refused(backbone(), folder, "needs format 1; got 99")
    method.write_text(text)
    weights.write_bytes(weights.read_bytes()[:-8])
    refused(backbone(), folder, r"trained.safetensors is damaged")
    weights.unlink()
    refused(backbone(), folder, r"trained.safetensors does not exist")
    method.unlink()
    refused(backbone(), folder, "needs a folder that save_trained wrote")
    with pytest.raises(ValueError, match="meta: needs the method's name at 'method'; got None"):
        save_trained(trained("linear"), folder, {})


def spoil(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any], whole: bool = False) -> None:
    """Changes the saved tensors; the checksums are taken out unless `whole`."""
    held = load_file(folder / "trained.safetensors")
    edit(held)
    save_file(held, folder / "trained.safetensors")
    if not whole:
        method = json.loads((folder / "method.json").read_text())
        del method["checksums"]
        (folder / "method.json").write_text(json.dumps(method))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda t: t.update({"patch_embed.proj.weight": torch.ones(24, 3, 4, 4)}),
            "its method.json; of its tensors are 1 unexpected: patch_embed",
        ),
        (
            lambda t: t["head.weight"][2, 2:3].fill_(float("nan")),
            "head.weight holds values that are not finite",
        ),
        (lambda t: t["head.bias"][2:3].fill_(float("inf")), "head.bias holds values that are not finite"),
        (lambda t: t.update({"head.bias": t["head.bias"].long()}), "head.bias is of type torch.int64"),
    ],
)
@pytest.mark.parametrize("method", ["linear", "vpt-deep"])
def test_what_was_not_trained_or_is_no_number_is_refused(
    edit, message: str, method: str, tmp_path: Path
) -> None:
    save_trained(trained(method), tmp_path, {"method": method})
    spoil(tmp_path, edit)
    refused(backbone(), tmp_path, message)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    save_trained(trained("linear"), tmp_path, {"method": "linear"})
    spoil(tmp_path, lambda tensors: tensors["head.bias"][1:2].add_(1e-9), whole=True)
    refused(backbone(), tmp_path, r"trained.safetensors is damaged: the values of head.bias are not those")
    spoil(tmp_path, lambda _: None)  # folders without checksums load
    load_trained(backbone(), tmp_path)


@pytest.mark.parametrize("entry", ["parameters", "base", "prompts", "adapters"])
def test_damaged_settings_name_their_file(entry: str, tmp_path: Path) -> None:
    save_trained(trained("linear"), tmp_path, {"method": "linear"})
    method = json.loads((tmp_path / "method.json").read_text())
    (tmp_path / "method.json").write_text(json.dumps(method | {entry: 3}))
    refused(backbone(), tmp_path, f"method.json is damaged: {entry} is 3")
