"""One call wraps every family; the values of the second pass are those of x + s; what is named is trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import toast
from tests.models import DECODERS, DEPTH, VITS, VOCABULARY, WIDTH, awaken, decoder, images, tokens, vit
from toast.config import GROUPS, ToastConfig
from toast.layer import ToastLayer
from toast.presets import OFFICIAL
from toast.steering import find_steering

MODELS = [
    *(pytest.param(vit, kind, images, id=f"vit-{kind}") for kind in VITS),
    *(pytest.param(decoder, kind, tokens, id=kind) for kind in [*DECODERS, "gpt2"]),
]
all_models = pytest.mark.parametrize(("make", "kind", "inputs"), MODELS)


def output(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        found = model(inputs)
    return found if isinstance(found, Tensor) else found.logits


def steered(model: nn.Module, inputs: Tensor) -> nn.Module:
    """Random parameters, and an embedding that lets tokens pass."""
    toast.calibrate(awaken(model), inputs)
    return model


class Kernel(TorchFunctionMode):
    """Keeps the queries, keys and values that reach every attention, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.seen.append(
                args[:3] if len(args) >= 3 else tuple(kwargs[n] for n in ("query", "key", "value"))
            )
        return func(*args, **(kwargs or {}))


def norms_before_attention(model: nn.Module) -> list[nn.Module]:
    trunk = find_steering(model).trunk
    blocks = getattr(trunk, "blocks", None) or getattr(trunk, "layers", None) or trunk.h
    names = ("norm1", "input_layernorm", "ln_1")
    return [next(getattr(block, name) for name in names if hasattr(block, name)) for block in blocks]


@contextmanager
def entering(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what enters the attention of every block, in every pass."""
    seen: list[Tensor] = []
    with ExitStack() as stack:
        for norm in norms_before_attention(model):
            handle = norm.register_forward_hook(lambda _module, _args, out: seen.append(out))
            stack.callback(handle.remove)
        yield seen


def weights_of_values(projection: nn.Module) -> tuple[Tensor, Tensor]:
    """Returns W_V, `(values, width)`, and its bias or zeros, from the raw weights."""
    weight, bias = projection.weight.detach(), projection.bias
    if type(projection).__name__ == "Conv1D":
        weight = weight.T
    bias = torch.zeros(weight.shape[0], dtype=weight.dtype) if bias is None else bias.detach()
    fused = weight.shape[0] == 3 * weight.shape[1]
    return (weight[2 * WIDTH :], bias[2 * WIDTH :]) if fused else (weight, bias)


def heads_joined(x: Tensor) -> Tensor:
    """`(batch, heads, tokens, size)` to `(batch, tokens, heads * size)`."""
    return x.transpose(1, 2).flatten(2)


def ungrouped(found: Tensor, expected: Tensor) -> Tensor:
    """Values as they were before the kernel repeated them for the heads of their group."""
    size = found.shape[-1]
    repeats = found.shape[1] * size // expected.shape[-1]
    return heads_joined(found[:, ::repeats])


@all_models
def test_the_identity_start_is_the_frozen_model_bit_for_bit(make, kind: str, inputs) -> None:
    model, x = make(kind), inputs()
    frozen = output(model, x)
    wrapped = toast.wrap(model)
    assert torch.equal(output(wrapped, x), frozen)
    assert not wrapped.training
    assert not torch.equal(output(steered(wrapped, x), x), frozen)


@all_models
@pytest.mark.parametrize("value_bias", ["once", "twice"])
def test_the_values_of_the_second_pass_are_those_of_x_plus_s(
    make, kind: str, inputs, value_bias: str
) -> None:
    model, x = make(kind), inputs()
    plain = [copy.deepcopy(module) for module in projections(model)]
    wrapped = steered(toast.wrap(model, init="official", value_bias=value_bias), x)
    with Kernel() as kernel, entering(wrapped) as seen, torch.no_grad():
        signals = toast.trace(wrapped, x).signals
    assert len(kernel.seen) >= 2 * DEPTH
    assert len(seen) == 2 * DEPTH
    second = kernel.seen[DEPTH : 2 * DEPTH]  # what follows is attention pooling
    for block, (projection, signal) in enumerate(zip(plain, signals, strict=True)):
        entered = seen[DEPTH + block]
        weight, bias = weights_of_values(projection)
        expected = (entered + signal) @ weight.T + bias * (2 if value_bias == "twice" else 1)
        values = ungrouped(second[block][2], expected)
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-10)
        assert (signal @ weight.T).abs().max() > 1e-6


@all_models
def test_queries_and_keys_of_the_second_pass_are_those_of_x(make, kind: str, inputs) -> None:
    model, x = make(kind), inputs()
    plain = copy.deepcopy(model)
    wrapped = steered(toast.wrap(model, init="official"), x)
    with Kernel() as kernel, torch.no_grad(), entering(wrapped) as seen:
        wrapped(x)
    # The frozen block's own attention, fed with what entered that block in the second pass.
    trunk = plain if make is vit else plain.base_model
    blocks = getattr(trunk, "blocks", None) or getattr(trunk, "layers", None) or trunk.h
    recorded = iter(seen[DEPTH:])
    for block in blocks:
        norm = next(getattr(block, n) for n in ("norm1", "input_layernorm", "ln_1") if hasattr(block, n))
        norm.register_forward_hook(lambda _module, _args, _out: next(recorded))
    with Kernel() as unsteered, torch.no_grad():
        plain(x)
    for (q, k, v), (plain_q, plain_k, plain_v) in zip(
        kernel.seen[DEPTH : 2 * DEPTH], unsteered.seen[:DEPTH], strict=True
    ):
        assert torch.equal(q, plain_q)
        assert torch.equal(k, plain_k)
        assert not torch.allclose(v, plain_v)


def projections(model: nn.Module) -> list[nn.Module]:
    names = ("attn.qkv", "self_attn.v_proj", "attn.c_attn")
    return [module for name, module in model.named_modules() if name.endswith(names)]


PRESETS: list[tuple[str, Any, set[str]]] = [
    *((name, OFFICIAL[name], set(OFFICIAL[name]["train"])) for name in OFFICIAL),
    ("all", {"train": "all"}, set(GROUPS) - {"lora"}),
    ("all-lite", {"train": "all", "lora_rank": 4}, set(GROUPS)),
    ("default", {}, set(GROUPS) - {"lora"}),
    ("default-lite", {"lora_rank": 4}, {"task_embedding", "channel_transform", "lora"}),
    ("one", {"train": ["to_signal"]}, {"to_signal"}),
]


@pytest.mark.parametrize(("make", "inputs"), [(vit, images), (decoder, tokens)])
@pytest.mark.parametrize(("name", "options", "groups"), PRESETS, ids=[name for name, *_ in PRESETS])
@pytest.mark.parametrize("head", [False, True])
def test_gradients_reach_the_named_groups_and_nothing_else(
    make, inputs, name: str, options, groups: set[str], head: bool
) -> None:
    model = make()
    module = "head" if make is vit else "lm_head"
    options = options | {"init": "official"} | ({"modules_to_save": [module]} if head else {})
    x = inputs()
    wrapped = steered(toast.wrap(model, ToastConfig(**options)), x)
    found = wrapped(x)
    (found if isinstance(found, Tensor) else found.logits).pow(2).sum().backward()
    of = {
        parameter: group
        for layer in wrapped.modules()
        if isinstance(layer, ToastLayer)
        for group, parameter in layer.groups("default")
    }
    reached = {n for n, p in wrapped.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    expected = {n for n, p in wrapped.named_parameters() if of.get(p) in groups}
    if head:
        expected |= {n for n, _ in wrapped.named_parameters() if f"{module}.modules_to_save" in n}
    assert reached == expected
    assert {n for n, p in wrapped.named_parameters() if p.requires_grad} == expected


@pytest.mark.parametrize("rank", [0, 4])
def test_parameter_counts(rank: int) -> None:
    model = vit()
    backbone = sum(p.numel() for p in model.parameters())
    wrapped = toast.wrap(model, lora_rank=rank)
    selector = WIDTH + WIDTH**2
    feedback = 2 * DEPTH * (2 * rank * WIDTH if rank else WIDTH**2)
    frozen = 2 * DEPTH * WIDTH**2 if rank else 0
    trained, whole = wrapped.get_nb_trainable_parameters()
    assert trained == selector + feedback
    assert whole == backbone + trained + frozen


def test_lite_on_vit_b_is_under_one_percent(capsys) -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
        backbone = sum(p.numel() for p in model.parameters())
        wrapped = toast.wrap(model, lora_rank=4)
    trained, _ = wrapped.get_nb_trainable_parameters()
    assert trained == 768 + 768**2 + 12 * 2 * 2 * 4 * 768
    assert trained / backbone < 0.01
    wrapped.print_trainable_parameters()
    assert "trainable params: 738,048" in capsys.readouterr().out


TIMM = {
    "deit_tiny_patch16_224": 12, "deit3_small_patch16_224": 12, "vit_small_patch14_dinov2": 12,
    "vit_small_patch14_reg4_dinov2": 12, "vit_base_patch16_siglip_224": 12, "vit_base_patch16_clip_224": 12,
    "vit_tiny_patch16_224": 12,
}  # fmt: skip


@pytest.mark.parametrize("name", TIMM)
def test_real_timm_models_wrap(name: str) -> None:
    with torch.device("meta"):
        model = toast.wrap(timm.create_model(name, num_classes=3))
    steering = find_steering(model)
    assert len(steering.values) == TIMM[name]
    assert model.peft_config["default"].select_features == "normed"


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_real_timm_models_run(name: str) -> None:
    model = timm.create_model(name, num_classes=3, img_size=28 if "14" in name else 32).eval()
    x = torch.randn(2, 3, *model.patch_embed.img_size)
    frozen = output(model, x)
    wrapped = toast.wrap(model)
    assert torch.equal(output(wrapped, x), frozen)
    assert not torch.allclose(output(awaken(wrapped), x), frozen)


def sized(config: str, **options: Any) -> Any:
    sizes = {
        "hidden_size": WIDTH, "intermediate_size": 40, "num_hidden_layers": DEPTH, "num_attention_heads": 3,
        "num_key_value_heads": 3, "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": None,
        "pad_token_id": 0,
    }  # fmt: skip
    made = getattr(transformers, config)(**(sizes | options))
    model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


BY_HAND: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "stablelm": (
        lambda: sized("StableLmConfig"),
        {"trunk": "model", "blocks": "layers", "value": "self_attn.v_proj", "norm": "norm"},
    ),
    "starcoder2": (
        lambda: sized("Starcoder2Config", num_key_value_heads=1),
        {"trunk": "model", "blocks": "layers", "value": "self_attn.v_proj", "norm": "norm"},
    ),
    "olmo": (
        lambda: sized("OlmoConfig"),
        {"trunk": "model", "blocks": "layers", "value": "self_attn.v_proj", "norm": "norm"},
    ),
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_a_family_is_wrapped_by_hand(kind: str) -> None:
    make, anatomy = BY_HAND[kind]
    model, x = make(), tokens()
    frozen = output(model, x)
    plain = [copy.deepcopy(module) for module in projections(model)]
    wrapped = toast.wrap(model, anatomy=anatomy)
    assert torch.equal(output(wrapped, x), frozen)
    steered(wrapped, x)
    with Kernel() as kernel, entering(wrapped) as seen, torch.no_grad():
        signals = toast.trace(wrapped, x).signals
    for block, (projection, signal) in enumerate(zip(plain, signals, strict=True)):
        weight, bias = weights_of_values(projection)
        expected = (seen[DEPTH + block] + signal) @ weight.T + bias
        values = ungrouped(kernel.seen[DEPTH + block][2], expected)
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-10)
    generated = wrapped.generate(input_ids=x[:1], max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, x.shape[1] + 3)


def test_language_models_read_normed_features_unless_asked() -> None:
    for kind in DECODERS:
        assert (
            find_steering(toast.wrap(decoder(kind))).selector.configs["default"].select_features == "normed"
        )
    official = find_steering(toast.wrap(decoder(), ToastConfig.official("language")))
    assert official.selector.configs["default"].select_features == "unnormed"


@pytest.mark.parametrize("name", ["norm", "blocks.1", "attn.qkv", "blocks"])
def test_what_is_steered_cannot_be_kept(name: str) -> None:
    with pytest.raises(ValueError, match=r"is or holds .* which TOAST wraps"):
        toast.wrap(vit(), modules_to_save=[name])
