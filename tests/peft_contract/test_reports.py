"""What users of PEFT have reported of other methods: each does what its reporter did, with TOAST.

The numbers are those of issues and pull requests of `huggingface/peft`.
"""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from torch import nn

import toast
from tests.models import awaken, decoder, tokens
from tests.peft_contract.cases import Case, layers, of_adapter, output, run, trainable
from tests.snapshots import refused
from toast.config import ToastConfig

VIT = Case("timm-vit")


@pytest.fixture
def saved(tmp_path) -> Any:
    """The folder of an adapter of `VIT`."""
    VIT.steered().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_1605_a_head_of_another_size_is_ignored_on_demand(saved) -> None:
    """`from_pretrained` had no `ignore_mismatched_sizes`, so a resized head could not be loaded."""
    base = VIT.base()
    base.head = nn.Linear(24, 9)
    with pytest.warns(UserWarning, match="head.modules_to_save.default.weight"):
        model = PeftModel.from_pretrained(base, saved, ignore_mismatched_sizes=True)
    assert output(model, VIT.inputs()).shape[-1] == 9


def test_1932_the_keys_of_the_base_are_not_missing(tmp_path) -> None:
    """`load_adapter` named every weight of the base as missing, and the base had another vocabulary."""
    base = decoder(dtype=torch.float32)
    model = awaken(peft.get_peft_model(copy.deepcopy(base), ToastConfig(task_type="CAUSAL_LM"))).eval()
    model.save_pretrained(tmp_path)
    x, words = tokens(), base.config.vocab_size
    expected = output(model, {"input_ids": x})
    base.resize_token_embeddings(words + 3, mean_resizing=False)
    model = peft.get_peft_model(base, ToastConfig(task_type="CAUSAL_LM"))
    result = model.load_adapter(tmp_path, "other")
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    model.set_adapter("other")
    torch.testing.assert_close(output(model.eval(), {"input_ids": x})[..., :words], expected)


@pytest.mark.parametrize("variant", ["full", "lite"])
def test_2254_an_adapter_named_like_the_prefix_is_loaded(variant: str, tmp_path) -> None:
    """An adapter whose name is contained in the prefix of its parameters was loaded with random weights."""
    case = Case("timm-vit", variant)
    with pytest.warns(UserWarning, match="Adapter name 'toast' should not be contained in the prefix"):
        model = awaken(case.wrap("toast"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path / "toast", "toast")
    assert torch.equal(output(loaded, case.inputs()), output(model, case.inputs()))


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part")
def test_2777_a_tied_embedding_beside_an_adapter(name: str, tmp_path) -> None:
    """Adapters on tied embeddings were neither tied nor was it said what becomes of them."""
    base = decoder(dtype=torch.float32, tie_word_embeddings=True)
    base.tie_weights()
    twin, x = copy.deepcopy(base), {"input_ids": tokens()}
    frozen = output(base, x)
    model = awaken(peft.get_peft_model(base, ToastConfig(task_type="CAUSAL_LM", modules_to_save=[name])))
    trained = next(p for n, p in model.named_parameters() if f"{name}.modules_to_save.default" in n)
    assert trained.requires_grad
    with torch.no_grad():
        trained.add_(1.0)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(twin, tmp_path)
    assert torch.equal(output(loaded, x), output(model.eval(), x))
    with loaded.disable_adapter():
        torch.testing.assert_close(output(loaded, x), frozen)


def test_2957_a_compiled_model_gets_an_adapter(tmp_path) -> None:
    """The names of a compiled model begin with `_orig_mod.`, so no target was found in it."""
    case = Case("timm-vit")
    model = case.steered()
    state = {
        name.removeprefix("base_model.model."): tensor
        for name, tensor in peft.get_peft_model_state_dict(model).items()
    }
    compiled = torch.compile(case.base(), backend="eager")
    peft.inject_adapter_in_model(case.config(), compiled, state_dict=state)
    peft.set_peft_model_state_dict(compiled._orig_mod, state)
    assert torch.equal(output(compiled._orig_mod.eval(), case.inputs()), output(model, case.inputs()))


def test_3282_names_that_are_part_of_each_other(tmp_path) -> None:
    """Saving `foo` also saved `foobar`, and what was loaded were the wrong weights."""
    model = VIT.steered("foo")
    expected = output(model, VIT.inputs())
    for name in ("foobar", "barfoo", "fo"):
        model.add_adapter(name, VIT.config(init="official"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(VIT.base(), tmp_path / "foo", "foo")
    assert loaded.state_dict().keys() == VIT.wrap("foo").state_dict().keys()
    assert torch.equal(output(loaded, VIT.inputs()), expected)


def test_3409_what_holds_the_parameters_after_wrapping_holds_the_live_ones(saved) -> None:
    """An optimizer or hooks of before the first call held other tensors than those that were trained."""
    model = peft.get_peft_model(VIT.base(), VIT.config(init="official"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    seen: list[str] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda _, name=name: seen.append(name))
    before = copy.deepcopy(dict(model.named_parameters()))
    output(model, VIT.inputs())
    model.set_adapter("default")
    with model.disable_adapter():
        output(model, VIT.inputs())
    run(model.train(), VIT.inputs()).square().sum().backward()
    optimizer.step()
    assert set(seen) == of_adapter(model)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == of_adapter(model)
    model.load_adapter(saved, "default", is_trainable=True)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in model.parameters() if p.requires_grad} == held


@pytest.mark.parametrize("variant", ["full", "lite"])
def test_3455_unloading_while_the_active_adapter_trains_no_head(variant: str) -> None:
    """It ended in `TypeError: unhashable type: 'list'`."""
    case = Case("timm-vit", variant)
    plain = output(case.base(), case.inputs())
    model = case.steered()
    model.add_adapter("other", case.config(modules_to_save=None))
    model.set_adapter("other")
    assert torch.equal(output(model.unload(), case.inputs()), plain)


@pytest.mark.parametrize("error", ["shape", "adapter_names"])
def test_3475_a_call_that_fails_leaves_no_hook_behind(error: str) -> None:
    """Hooks of a call that raised stayed, and every later call failed with their arguments."""
    model = VIT.steered()
    expected = output(model, VIT.inputs())
    hooks = {name: len(m._forward_pre_hooks) + len(m._forward_hooks) for name, m in model.named_modules()}
    wrong = (
        {"x": torch.randn(2, 3, 5, 5)} if error == "shape" else VIT.inputs() | {"adapter_names": ["a", "b"]}
    )
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        model(**wrong)
    assert hooks == {
        name: len(m._forward_pre_hooks) + len(m._forward_hooks) for name, m in model.named_modules()
    }
    assert torch.equal(output(model, VIT.inputs()), expected)


@pytest.mark.parametrize("variant", ["full", "lite"])
def test_3487_an_added_adapter_leaves_the_active_one_as_trainable_as_it_was(variant: str, tmp_path) -> None:
    """The inference mode of the configuration that came last was applied to the active adapter."""
    case = Case("timm-vit", variant)
    case.steered().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(case.base(), tmp_path)
    model.add_adapter("other", case.config())
    assert not trainable(model)
    model = case.wrap()
    model.add_adapter("other", case.config(inference_mode=True))
    assert trainable(model) == of_adapter(model)


def test_3509_a_head_is_loaded_in_the_precision_of_the_base(saved) -> None:
    """With `low_cpu_mem_usage` a head kept the file's precision, and the first call failed."""
    model = PeftModel.from_pretrained(VIT.base(torch.bfloat16), saved, low_cpu_mem_usage=True)
    other = PeftModel.from_pretrained(VIT.base(torch.bfloat16), saved)
    assert {name: p.dtype for name, p in model.named_parameters()} == {
        name: p.dtype for name, p in other.named_parameters()
    }
    x = VIT.inputs(dtype=torch.bfloat16)
    assert torch.equal(output(model, x), output(other, x))


@pytest.mark.parametrize("variant", ["full", "lite"])
def test_3555_disabling_within_disabling(variant: str) -> None:
    """The inner context enabled what the outer one had disabled, or failed."""
    case = Case("timm-vit", variant)
    model, frozen = case.steered(), output(case.base(), case.inputs())
    steered = output(model, case.inputs())
    with model.disable_adapter():
        with model.disable_adapter():
            assert torch.equal(output(model, case.inputs()), frozen)
        assert torch.equal(output(model, case.inputs()), frozen)
    assert torch.equal(output(model, case.inputs()), steered)
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert torch.equal(output(model, case.inputs()), steered)


def test_3559_a_name_that_is_taken_changes_nothing() -> None:
    """Adding an adapter under a name that was taken replaced its configuration and its weights."""
    model = VIT.steered()
    config = model.peft_config["default"]
    with refused(model, "Adapter with name 'default' already exists"):
        model.add_adapter("default", VIT.config(lora_rank=2))
    assert model.peft_config["default"] is config


def test_3580_a_trainable_adapter_beside_a_frozen_one(saved) -> None:
    """The frozen adapter became trainable and the one that was loaded to be trained stayed frozen."""
    model = PeftModel.from_pretrained(VIT.base(), saved)
    model.load_adapter(saved, "other", is_trainable=True)
    assert trainable(model) == of_adapter(model, "other")


def test_3716_the_head_of_the_adapter_that_takes_over_is_trained() -> None:
    """The active adapter was deleted; the head of the one that became active stayed frozen."""
    model = VIT.wrap()
    model.add_adapter("other", VIT.config(modules_to_save=None))
    model.set_adapter("other")
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        model.delete_adapter("other")
    assert trainable(model) == of_adapter(model)
    assert model.base_model.head.active_adapters == ["default"]


def test_3793_an_adapter_is_loaded_where_the_base_is(saved, monkeypatch) -> None:
    """Weights went over an accelerator that was only said to be there. PEFT's own default still asks it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = PeftModel.from_pretrained(VIT.base(), saved, torch_device="cpu")
    model.load_adapter(saved, "other", torch_device="cpu")
    assert {p.device.type for layer in layers(model) for p in layer.parameters()} == {"cpu"}


class Named(nn.Module):
    """A model whose modules are named like what TOAST adds."""

    def __init__(self) -> None:
        super().__init__()
        self.toast_body = VIT.base()
        self.toast_head = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.toast_head(self.toast_body(x))


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}])
def test_3433_modules_that_are_named_like_the_prefix(options, tmp_path) -> None:
    """A head whose name contains the prefix of the method's parameters was not restored."""
    torch.manual_seed(0)
    base = Named()
    twin, x = copy.deepcopy(base), VIT.inputs()
    frozen = output(base, x)
    config = ToastConfig(modules_to_save=["toast_head"], **options)
    model = peft.get_peft_model(base, config).eval()
    toast.calibrate(model, **x)
    with torch.no_grad():
        nn.init.normal_(model.base_model.toast_head.modules_to_save["default"].weight)
        for layer in layers(model):
            for _, parameter in layer.groups("default"):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    expected = output(model, x)
    assert not torch.allclose(expected, frozen)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(twin, tmp_path)
    assert torch.equal(output(loaded, x), expected)
    loaded.add_adapter("other", ToastConfig(modules_to_save=["toast_head"], **options))
    loaded.set_adapter("other")
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        loaded.delete_adapter("other")
    assert not [name for name in loaded.state_dict() if "other" in name]
    assert torch.equal(output(loaded, x), expected)
    with loaded.disable_adapter():
        assert torch.equal(output(loaded, x), frozen)


def test_3707_an_adapter_that_fails_on_the_way_leaves_nothing_behind(monkeypatch) -> None:
    """Layers that had been wrapped before the error kept parameters of the adapter that failed."""
    model = VIT.steered("one", lora_rank=2)
    with monkeypatch.context() as patch:
        patch.setattr(
            "toast.model.ToastSelector.update_layer", lambda *_: (_ for _ in ()).throw(OSError("full"))
        )
        with refused(model, "full", OSError):
            model.add_adapter("two", VIT.config())
    model.add_adapter("two", VIT.config())


@pytest.mark.parametrize("training", [False, True])
def test_3753_new_layers_are_in_the_mode_of_the_model(training: bool) -> None:
    """An adapter that was added in evaluation mode had its dropout on."""
    model = VIT.wrap(lora_rank=2, lora_dropout=0.5).train(training)
    model.add_adapter("other", VIT.config(lora_rank=2, lora_dropout=0.5))
    assert {module.training for layer in layers(model) for module in layer.modules()} == {training}


def test_3770_names_do_not_pile_up_in_the_configuration() -> None:
    """The names of heads were added to the list of modules to save again with each model."""
    config = Case("llama-classifier").config(modules_to_save=["score"])
    for _ in range(2):
        model = peft.get_peft_model(Case("llama-classifier").base(), config)
        assert list(model.base_model.model.score.modules_to_save) == ["default"]
