"""Every method by its name, for vision and language."""

from __future__ import annotations

import pytest
import torch

from tests.models import decoder, images, tokens, vit
from toast.baselines.applying import METHODS, apply_method

# What PEFT says of its own calls of a newer transformers.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`past_key_values` is deprecated:FutureWarning",
    "ignore:Both `past_key_values` and `cache` are set:FutureWarning",
)


@pytest.mark.parametrize("name", METHODS)
def test_groups_are_what_gets_gradients(name: str) -> None:
    model, groups = apply_method(vit(), name)
    model(images(2)).square().sum().backward()
    for parameter in model.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for members in groups.values() for n in members}
    assert "head" in groups


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("linear", "full")])
def test_heads_can_stay_frozen(name: str) -> None:
    model, groups = apply_method(vit(), name, head=())
    assert "head" not in groups
    assert not model.head.weight.requires_grad
    assert not model.head.bias.requires_grad


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.on_text])
def test_prompts_of_language_models_are_pefts(name: str) -> None:
    plain, text = decoder(dtype=torch.float32), tokens()
    before = plain(text).logits
    model, groups = apply_method(plain, name, prompts=3)
    assert type(model.peft_config["default"]) is METHODS[name].on_text
    assert model.peft_config["default"].num_virtual_tokens == 3
    assert list(groups) == ["prompts"]
    loss = model(input_ids=text, labels=text).loss
    loss.backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (key in groups["prompts"])
    with model.disable_adapter():
        assert torch.equal(model(input_ids=text).logits, before)
    with pytest.raises(ValueError, match=r"generate: PEFT 0\.21 loses prompts"):
        model.generate(input_ids=text)


def test_options_reach_the_method() -> None:
    model, _ = apply_method(vit(), "vpt-shallow", prompts=2, dropout=0.25)
    assert (model.prompts.count, model.prompts.dropout.p) == (2, 0.25)
    model, _ = apply_method(vit(), "adapter", bottleneck=3, scale=0.5)
    assert model.blocks[0].adapters[0].options == {"bottleneck": 3, "scale": 0.5, "dropout": 0.0}
    model, _ = apply_method(vit(), "attentive", queries=3)
    assert model.probe.options == {"queries": 3}
    model, _ = apply_method(decoder(), "vpt-deep", prefix_projection=True, encoder_hidden_size=8)
    assert model.peft_config["default"].prefix_projection


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match=r"method: needs one of linear, .*; got 'lora'"):
        apply_method(vit(), "lora")
    with pytest.raises(ValueError, match=r"options of vpt-deep: needs some of dropout; got depth"):
        apply_method(vit(), "vpt-deep", depth=3)
    with pytest.raises(ValueError, match=r"options of bias: needs some of \(there are none\); got scale"):
        apply_method(vit(), "bias", scale=3)
    with pytest.raises(ValueError, match=r"options of vpt-shallow: needs some of .*; got dropout"):
        apply_method(decoder(), "vpt-shallow", dropout=0.1)
