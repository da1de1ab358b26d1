"""Several adapters in one call, for all samples or one for each sample, give what each gives by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import toast
from tests.models import awaken, decoder, images, tokens, vit
from tests.steered import assert_same, blocks_of, call, steer

NAMES = ["b", "__base__", "default", "b"]
HEADS = {"vit": ["head"], "llama": ["lm_head"]}


def several(kind: str, bare: Any = None, **options: Any) -> Any:
    """A model with two adapters whose signals are far from zero, each with a head."""
    bare = bare or (vit() if kind == "vit" else decoder(kind))
    options |= {"modules_to_save": HEADS[kind]}
    model = steer(bare, kind, **options)
    model.add_adapter("b", toast.ToastConfig(lora_rank=2, **options))
    awaken(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_()
    return model.eval()


def alone(model: Any, x: Tensor, name: str, run: Any = call) -> Tensor:
    if name == "__base__":
        with model.disable_adapter():
            return run(model, x)
    model.set_adapter(name)
    return run(model, x)


def mixed(model: Any, x: Tensor) -> Tensor:
    if x.is_floating_point():
        return model(x, adapter_names=NAMES)
    return model(input_ids=x, use_cache=False, adapter_names=NAMES).logits


@pytest.mark.parametrize("kind", ["vit", "llama"])
@pytest.mark.parametrize(
    "options", [{}, {"steer_from": 1, "select_from": 1}, {"feedback_form": "composed"}], ids=str
)
def test_samples_may_name_their_adapters(kind: str, options: dict[str, Any]) -> None:
    model = several(kind, **options)
    x = images(4) if kind == "vit" else tokens(4)
    expected = torch.cat([alone(model, x[i : i + 1], name) for i, name in enumerate(NAMES)])
    ran: list[int] = []
    for block in blocks_of(model):
        block.register_forward_hook(lambda *_: ran.append(toast.running_pass()))
    assert_same(mixed(model, x), expected)
    assert ran == ([1, 1, 2, 2] if options.get("steer_from") else [1, 1, 1, 2, 2, 2])
    assert (expected[0] - alone(model, x[:1], "default")).abs().max() > 1e-3


def test_forms_of_the_feedback_may_differ_and_one_adapter_be_fused() -> None:
    model, x = several("vit").requires_grad_(False), images(4)
    expected = mixed(model, x)
    for name in ("default", "b"):
        model.set_adapter(name)
        toast.fuse(model.requires_grad_(False))
        assert_same(mixed(model, x), expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
def test_texts_are_generated_with_their_own_adapters(options: dict[str, Any]) -> None:
    model, x = several("llama"), tokens(4)
    settings = {"max_new_tokens": 5, **options, "top_k": 1}  # sampling takes the likeliest of one
    found = model.generate(input_ids=x, adapter_names=NAMES, **settings)
    times = len(found) // 4
    for i, name in enumerate(NAMES):
        expected = alone(model, x[i : i + 1], name, lambda m, each: m.generate(input_ids=each, **settings))
        assert torch.equal(found[times * i : times * (i + 1)], expected)


@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_tasks_of_one_input_share_its_first_pass(kind: str) -> None:
    model = several(kind, steer_from=1)
    x = images(2) if kind == "vit" else tokens(2)
    expected = {name: alone(model, x, name) for name in ("b", "default")}
    ran: list[int] = []
    for block in blocks_of(model):
        block.register_forward_hook(lambda *_: ran.append(toast.running_pass()))
    found = toast.run_adapters(model, ["b", "default"], x)
    assert ran == [1] * 3 + [2] * 4
    for name, output in found.items():
        assert_same(output if kind == "vit" else output.logits, expected[name])
    assert model.active_adapter == "default"


def test_what_cannot_share_a_pass_is_refused() -> None:
    model, x = several("vit"), images(4)
    model.add_adapter("upper", toast.ToastConfig(steer_from=1))
    model.add_adapter("twice", toast.ToastConfig(value_bias="twice"))
    for names, needed in (
        (["b"] * 2, "needs a name for each sample; got 2 for 4 rows"),
        ("b", "needs a list with a name for each sample; got 'b'"),
        (["b", "c", "b", "b"], "adapter 'c' is none of the model's: default, b, upper, twice"),
        (["b", "b", "b", "upper"], "agree in steer_from; 'b' has 0, 'upper' has 1"),
        (["b", "b", "b", "twice"], "agree in value_bias"),
        (["twice", "twice", "twice", "__base__"], "'__base__' cannot be beside"),
    ):
        with pytest.raises(ValueError, match=needed):
            model(x, adapter_names=names)
    with pytest.raises(ValueError, match="only calls of one adapter are observed"):
        toast.trace(model, x, adapter_names=NAMES)
    with pytest.raises(ValueError, match="is for inference"):
        model.train()(x, adapter_names=NAMES)
    with pytest.raises(ValueError, match="agree in steer_from"):
        toast.run_adapters(model, ["b", "upper"], x)
    with pytest.raises(ValueError, match=r"needs names of adapters of the model; got 'b'"):
        toast.run_adapters(model, "b", x)
    language, prompts = several("llama"), tokens(8)
    for run in (language.generate, language):
        with pytest.raises(ValueError, match="got 4 for 8 rows"):
            run(input_ids=prompts, adapter_names=NAMES)
    below = steer(vit(), "vit", modules_to_save=["patch_embed.proj"])
    with pytest.raises(ValueError, match=r"'patch_embed.proj' is in modules_to_save and runs in the first"):
        toast.run_adapters(below, ["default"], x)
    assert_same(
        below(x, adapter_names=["default", "__base__"] * 2)[::2], below(x[::2])
    )  # where samples name them, each has its own rows
