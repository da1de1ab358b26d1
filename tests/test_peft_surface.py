"""What PEFT offers, each with TOAST: wrapping, saving, loading, switching, taking off."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

import toast
from tests.models import awaken, decoder, images, tokens, vit
from tests.snapshots import refused, structure, tensors
from toast.config import ToastConfig
from toast.layer import ToastLayer


def output(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        found = model(inputs)
    return found if isinstance(found, Tensor) else found.logits


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(("make", "inputs"), [(vit, images), (decoder, tokens)])
def test_three_states(make, inputs) -> None:
    model, x = make(), inputs()
    frozen = output(model, x)
    wrapped = awaken(peft.get_peft_model(model, ToastConfig()))
    steered = output(wrapped, x)
    assert (steered - frozen).abs().max() > 1e-3
    with wrapped.disable_adapter():
        assert torch.equal(output(wrapped, x), frozen)
    assert torch.equal(output(wrapped, x), steered)


def test_what_is_saved(tmp_path) -> None:
    model = awaken(toast.wrap(vit(), modules_to_save=["head"], select_from=1))
    model.save_pretrained(tmp_path / "adapter")
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "README.md",
    }  # fmt: skip
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
        embedding = file.get_tensor("base_model.model.norm.toast_task_embedding")
    maps = {
        f"blocks.{i}.attn.qkv.toast_{kind}.weight" for i in range(3) for kind in ("to_state", "to_signal")
    }
    own = {"norm.toast_task_embedding", "norm.toast_channel_transform", "head.weight", "head.bias"}
    assert names == {f"base_model.model.{name}" for name in maps | own}
    assert torch.equal(embedding, model.base_model.model.norm.toast_task_embedding["default"])
    text = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (text["peft_type"], text["family"], text["select_from"]) == ("TOAST", "timm-vit", 1)
    read = ToastConfig.from_pretrained(tmp_path / "adapter")
    assert read.inference_mode
    read.inference_mode = False
    read.auto_mapping = None
    assert read == model.peft_config["default"]


@pytest.mark.parametrize("name", ["weight", "lora_A", "base_layer", "0"])
def test_an_adapter_may_be_named_like_a_part_of_it(name: str, tmp_path) -> None:
    base, x = vit(), images()
    twin = copy.deepcopy(base)
    model = awaken(toast.wrap(base, lora_rank=2, adapter_name=name))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(twin, tmp_path / name)
    assert torch.equal(output(loaded, x), output(model, x))


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}, {"modules_to_save": ["head"]}])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_gives_the_same_outputs(options, low_cpu_mem_usage: bool, tmp_path) -> None:
    base, x = vit(), images()
    twin = copy.deepcopy(base)
    model = awaken(toast.wrap(base, **options))
    if "modules_to_save" in options:
        nn.init.normal_(model.base_model.model.head.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(twin, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(output(loaded, x), output(model, x))
    assert not trainable(loaded)
    assert not any(parameter.is_meta for parameter in loaded.parameters())


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}, {"train": ["task_embedding", "to_signal"]}])
def test_loading_to_train_on(options, tmp_path) -> None:
    base = vit()
    twin = copy.deepcopy(base)
    model = toast.wrap(base, **options)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(twin, tmp_path, is_trainable=True)
    assert trainable(loaded) == trainable(model)
    loaded(images()).sum().backward()


def test_the_automatic_class_finds_the_base_model(tmp_path) -> None:
    decoder(dtype=torch.float32).save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    model = awaken(toast.wrap(AutoModelForCausalLM.from_pretrained(tmp_path / "base")))
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert isinstance(loaded, peft.PeftModelForCausalLM)
    x = tokens()
    assert torch.equal(output(loaded, x), output(model.eval(), x))


def test_several_adapters(tmp_path) -> None:
    model, x = vit(), images()
    frozen = output(model, x)
    model = awaken(toast.wrap(model, adapter_name="one"))
    a = output(model, x)
    model.add_adapter("two", ToastConfig(lora_rank=2, init="official"))
    assert torch.equal(output(model, x), a)
    model.set_adapter("two")
    awaken(model)  # changes "one" as well
    b = output(model, x)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"one", "two"}
    model.set_adapter("one")
    a = output(model, x)
    assert not torch.allclose(a, b)
    model.load_adapter(tmp_path / "two", "three")
    model.set_adapter("three")
    assert torch.equal(output(model, x), b)
    with pytest.warns(UserWarning, match="Setting active adapter to one"):
        model.delete_adapter("three")
    assert torch.equal(output(model, x), a)
    model.delete_adapter("two")
    assert torch.equal(output(model, x), a)
    model.delete_adapter("one")
    assert torch.equal(output(model.base_model.model, x), frozen)
    assert not [name for name in model.state_dict() if ".toast_" in name]
    model.add_adapter("again", ToastConfig())
    model.set_adapter("again")
    assert torch.equal(output(awaken(model), x), output(model, x))


def test_two_adapters_at_a_time_are_refused() -> None:
    model = toast.wrap(vit(), adapter_name="one", modules_to_save=["head"])
    model.add_adapter("two", ToastConfig(modules_to_save=["head"]))
    with refused(model, "one TOAST adapter can be active at a time, .*; got one, two"):
        model.base_model.set_adapter(["one", "two"])
    assert model.active_adapters == ["one"]
    with refused(model, "unhashable type: 'list'", TypeError):  # PEFT's own signature takes one name
        model.set_adapter(["one", "two"])


def test_an_inactive_lite_adapter_stays_frozen() -> None:
    model = toast.wrap(vit(), adapter_name="full", train=["task_embedding", "to_signal"])
    model.add_adapter("lite", ToastConfig(lora_rank=2))
    before = trainable(model)
    assert before == {name for name in before if "full" in name}
    with model.disable_adapter():
        assert not trainable(model)
    assert trainable(model) == before
    model.set_adapter("lite")
    lite = trainable(model)
    assert lite == {
        name for name in lite if "lite" in name and "base_layer.weight" not in name.split("toast_")[1]
    }
    with model.disable_adapter():
        pass
    assert trainable(model) == lite
    model.set_adapter("full")
    assert trainable(model) == before


@pytest.mark.parametrize(("make", "inputs"), [(vit, images), (decoder, tokens)])
@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}])
def test_unload_leaves_nothing_behind(make, inputs, options) -> None:
    model, x = make(), inputs()
    frozen, parts, values = output(model, x), structure(model), tensors(model)
    wrapped = awaken(toast.wrap(model, **options))
    wrapped(x)
    back = wrapped.unload()
    assert back is model
    after = structure(model)
    changed = {key for key in parts.keys() | after.keys() if parts.get(key) != after.get(key)}
    assert {attribute for _, attribute in changed} == {"requires_grad"}  # what PEFT froze stays frozen
    assert model.state_dict().keys() == values.keys()
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(output(model, x), frozen)
    assert torch.equal(output(copy.deepcopy(model), x), frozen)
    assert torch.equal(output(pickle.loads(pickle.dumps(model)), x), frozen)
    assert not torch.equal(output(awaken(toast.wrap(model)), x), frozen)


def test_unload_keeps_the_trained_head_as_peft_does() -> None:
    model = toast.wrap(vit(), modules_to_save=["head"])
    trained = nn.init.normal_(model.base_model.model.head.modules_to_save["default"].weight)
    assert model.unload().head.weight is trained


def test_a_wrapped_model_is_copied_and_pickled_whole() -> None:
    model, x = awaken(toast.wrap(vit())), images()
    steered = output(model, x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin, x), steered)
        awaken(twin, scale=0.1)
        assert not torch.equal(output(twin, x), steered)
    assert torch.equal(output(model, x), steered)


def test_a_bfloat16_base(tmp_path) -> None:
    base = vit().bfloat16()
    twin, wide, x = copy.deepcopy(base), copy.deepcopy(base).float(), images().bfloat16()
    model = toast.wrap(base, train=["task_embedding", "to_signal"], init="official")
    layers = [module for module in model.modules() if isinstance(module, ToastLayer)]
    kinds = {p.dtype for layer in layers for _, p in layer.groups("default")}
    assert kinds == {torch.float32}
    assert {name.split("toast_")[1].split(".")[0] for name in trainable(model)} == {
        "task_embedding",
        "to_signal",
    }
    awaken(model)
    found = model(x)
    assert found.dtype == torch.bfloat16
    F.cross_entropy(found, torch.tensor([0, 1, 2, 3])).backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(twin, tmp_path)
    assert torch.equal(output(loaded, x), output(model, x))
    # The base in another precision is still the base that the adapter was made for.
    exact = output(peft.PeftModel.from_pretrained(wide, tmp_path), x.float())
    assert (exact - output(model, x)).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize(
    "merge",
    [
        lambda m: m.merge_and_unload(),
        lambda m: m.merge_adapter(),
        lambda m: m.base_model.merge_adapter(safe_merge=True),
    ],
)
def test_merging_is_refused_with_its_reason(merge) -> None:
    with refused(model := toast.wrap(vit()), "its signal depends on a first pass over each input"):
        merge(model)


def test_adapters_cannot_be_added_up() -> None:
    model = toast.wrap(vit())
    with refused(model, "no attribute 'add_weighted_adapter'", AttributeError):
        model.add_weighted_adapter(["default"], [1.0], "sum")


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_a_base_with_unmerged_lora_is_refused_and_a_merged_one_works() -> None:
    base, x = vit(), images()
    lora = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["fc1"], init_lora_weights=False))
    expected = output(lora, x)
    with refused(lora, "wrapped already"):
        toast.wrap(lora)
    inner = lora.get_base_model()
    with refused(inner, r"an adapter of another method \(Linear at 'blocks.0.mlp.fc1'\).*merge_and_unload"):
        toast.wrap(inner)
    model = toast.wrap(lora.merge_and_unload())
    torch.testing.assert_close(output(model, x), expected)


def test_the_status_of_layers_and_model() -> None:
    model = toast.wrap(vit())
    model.add_adapter("other", ToastConfig())
    status = model.get_model_status()
    assert (status.peft_types, status.enabled) == ({"default": "TOAST", "other": "TOAST"}, True)
    assert status.active_adapters == ["default"]
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers = {layer.name: layer for layer in model.get_layer_status()}
    assert layers["model.norm"].available_adapters == ["default", "other"]
    assert layers["model.norm"].requires_grad == {"default": True, "other": False}
    assert layers["model.blocks.0.attn.qkv"].module_type == "ToastValue"


def test_saving_replaces_a_folder_only_when_complete(tmp_path, monkeypatch) -> None:
    model = toast.wrap(vit())
    folder = toast.save_adapter(model, tmp_path / "adapter")
    before = (folder / "adapter_model.safetensors").read_bytes()
    awaken(model)

    def fail(fresh: str) -> None:
        Path(fresh).mkdir(exist_ok=True)
        Path(fresh, "adapter_model.safetensors").write_bytes(b"half of")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(model, "save_pretrained", fail)
        with pytest.raises(OSError, match="no space left"):
            toast.save_adapter(model, folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    toast.save_adapter(model, folder)
    assert (folder / "adapter_model.safetensors").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_saving_leaves_other_files_alone_and_other_processes_write_nothing(tmp_path) -> None:
    model = toast.wrap(vit())
    toast.save_adapter(model, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    awaken(model)
    toast.save_adapter(model, tmp_path, is_main_process=False)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    toast.save_adapter(model, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() != before
    assert (tmp_path / "notes.txt").read_text() == "mine"
