"""Bases that are not plain: quantised linear maps, weights that Accelerate fetches, merged LoRA.

The steering touches no weight, so it has to work on them as on any other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import toast
from tests.models import CACHE, DEPTH, awaken, decoder, images, tokens, vit
from tests.steered import call, gradients, trained
from toast.steering import find_steering

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:The following device_map keys do not match any submodules:UserWarning"
    ),
    # what PEFT's preparation calls was renamed within transformers 5
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]

MODELS = ["llama", "gpt2", "vit"]


def bare(kind: str, dtype: torch.dtype = torch.float32, **sizes: int) -> Any:
    """The same model at every call."""
    torch.manual_seed(1)
    return (vit(**sizes) if kind == "vit" else decoder(kind, **sizes)).to(dtype).eval()


def an_input(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(2)
    return images(2).to(dtype) if kind == "vit" else tokens(2)


def awakened(model: Any) -> Any:
    """The same adapter at every call, with signals far from zero."""
    torch.manual_seed(3)
    return awaken(model).eval()


def output(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return call(model, x)


def generated(model: Any, x: Tensor) -> Tensor:
    mask = torch.ones_like(x)
    return model.generate(input_ids=x, attention_mask=mask, max_new_tokens=4, do_sample=False)


def on_meta(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if ".toast_" in name and p.is_meta]


class Packed(nn.Module):
    """Looks like a quantised map of a library that nobody knows: packed bytes, scales, its own forward."""

    def __init__(self, weight: Tensor, bias: Tensor | None, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.compute_dtype = compute_dtype
        scale = weight.abs().amax(1, keepdim=True) / 127
        packed = (weight / scale).round().to(torch.int8).reshape(-1, 1)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.view(self.out_features, -1).to(self.compute_dtype) * self.scale
        return F.linear(x, weight.to(x.dtype), self.bias)


def bitsandbytes_map(bits: int, weight: Tensor, bias: Tensor | None) -> nn.Module:
    library = pytest.importorskip("bitsandbytes", exc_type=ImportError).nn
    out, width = weight.shape
    if bits == 8:
        linear = library.Linear8bitLt(width, out, bias=bias is not None, has_fp16_weights=False)
    else:
        linear = library.Linear4bit(width, out, bias=bias is not None, compute_dtype=weight.dtype)
    state = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    linear.load_state_dict(state)
    return linear.to("cpu").requires_grad_(False)


def replaced(model: nn.Module, make: Callable[[Tensor, Tensor | None], nn.Module]) -> nn.Module:
    """Puts other maps in the place of the blocks' linear maps, `Conv1D` among them."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ in ("Linear", "Conv1D") and "head" not in name:
            weight = module.weight.detach().T if type(module).__name__ == "Conv1D" else module.weight.detach()
            bias = None if module.bias is None else module.bias.detach()
            model.set_submodule(name, make(weight.contiguous(), bias))
    return model


def torchao(model: nn.Module) -> nn.Module:
    library = pytest.importorskip("torchao.quantization")
    library.quantize_(model, library.Int8WeightOnlyConfig())
    return model


QUANTISERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torchao": torchao,
    "bitsandbytes-8": lambda model: replaced(model, lambda *args: bitsandbytes_map(8, *args)),
    "bitsandbytes-4": lambda model: replaced(model, lambda *args: bitsandbytes_map(4, *args)),
    "stand-in": lambda model: replaced(model, lambda *args: Packed(*args, compute_dtype=args[0].dtype)),
}
#: The 4-bit kernels for CPUs want multiples of 64 channels, which the builder of GPT-2 does not take.
WIDE = {"llama": {"hidden_size": 192, "intermediate_size": 64}, "vit": {"embed_dim": 192, "mlp_ratio": 1}}
WITHOUT = [("bitsandbytes-4", "gpt2")]

#: Torchao leaves the Conv1D of GPT-2 alone: only its head is quantised there.
BASES = [(name, kind) for name in QUANTISERS for kind in MODELS if (name, kind) not in WITHOUT]
quantised_bases = pytest.mark.parametrize(("quantiser", "kind"), BASES)


def quantised(quantiser: str, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    sizes = WIDE[kind] if quantiser == "bitsandbytes-4" else {}
    return QUANTISERS[quantiser](bare(kind, dtype, **sizes)).eval()


@pytest.mark.parametrize(
    ("quantiser", "kind", "dtype"),
    [
        *((*base, torch.float32) for base in BASES),
        *((*base, torch.bfloat16) for base in BASES if base[0] in ("torchao", "bitsandbytes-4")),
    ],
)
def test_a_quantised_base_starts_bit_for_bit_and_trains(quantiser: str, kind: str, dtype) -> None:
    model, x = quantised(quantiser, kind, dtype), an_input(kind, dtype)
    frozen = output(model, x)
    wrapped = toast.wrap(model)
    assert torch.equal(output(wrapped, x), frozen)
    toast.calibrate(awakened(wrapped), x)
    assert not torch.equal(output(wrapped, x), frozen)
    if quantiser == "bitsandbytes-4":
        # On a CPU its first call in evaluation mode packs the weights, and there is no backward from then on.
        learnt = {name: p for name, p in wrapped.state_dict().items() if ".toast_" in name}
        wrapped = toast.wrap(quantised(quantiser, kind, dtype)).train()
        wrapped.load_state_dict(learnt, strict=False)
    assert all(parameter.dtype == torch.float32 for parameter in trained(wrapped).values())
    for gradient in gradients(wrapped, x):
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0


@quantised_bases
@pytest.mark.parametrize("value_bias", ["once", "twice"])
def test_the_values_are_what_the_quantised_map_makes_of_x_plus_s(
    quantiser: str, kind: str, value_bias: str
) -> None:
    wrapped, x = awakened(toast.wrap(quantised(quantiser, kind), value_bias=value_bias)), an_input(kind)
    toast.calibrate(wrapped, x)
    values, seen = find_steering(wrapped).values, []
    for value in values:
        value.register_forward_hook(lambda _module, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        signals = toast.trace(wrapped, x).signals
        for value, signal, (entered, found) in zip(values, signals, seen[DEPTH:], strict=True):
            plain = value.base_layer(entered)
            expected = value.base_layer(entered + signal)
            if value_bias == "twice" and value.base_layer.bias is not None:
                expected = expected + value.base_layer.bias
            start = found.shape[-1] - entered.shape[-1]
            torch.testing.assert_close(found[..., start:], expected[..., start:], rtol=0, atol=1e-5)
            assert torch.equal(found[..., :start], plain[..., :start])
            assert not torch.allclose(found[..., start:], plain[..., start:])


@quantised_bases
def test_a_quantised_map_is_not_composed(quantiser: str, kind: str) -> None:
    wrapped, x = awakened(toast.wrap(quantised(quantiser, kind), feedback_form="composed")), an_input(kind)
    if quantiser == "torchao" and kind == "gpt2":
        per_token = awakened(toast.wrap(quantised(quantiser, kind), feedback_form="per_token"))
        torch.testing.assert_close(output(wrapped, x), output(per_token, x), rtol=1e-4, atol=1e-4)
        return
    with pytest.raises(ValueError, match=r"needs .*value projections with plain weights"):
        output(wrapped, x)


@pytest.mark.parametrize(
    ("quantiser", "kind", "options"),
    [*((*base, {}) for base in BASES), *(("torchao", kind, {"lora_rank": 2}) for kind in MODELS)],
)
def test_an_adapter_of_a_quantised_base_is_saved_and_loaded(
    quantiser: str, kind: str, options, tmp_path
) -> None:
    wrapped, x = awakened(toast.wrap(quantised(quantiser, kind), **options)), an_input(kind)
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantised(quantiser, kind), tmp_path)
    assert torch.equal(output(loaded, x), output(wrapped, x))
    if kind != "vit":
        assert torch.equal(generated(loaded, x), generated(wrapped, x))
    with loaded.disable_adapter():
        assert torch.equal(output(loaded, x), output(quantised(quantiser, kind), x))


@pytest.mark.parametrize("kwargs", [{}, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}])
def test_preparation_for_kbit_training_checkpoints_re_entrantly_unless_told(kwargs) -> None:
    base = quantised("stand-in", "llama")
    base.is_loaded_in_8bit = True
    model = toast.wrap(prepare_model_for_kbit_training(base, **kwargs)).train()
    with pytest.raises(ValueError, match="re-entrant activation checkpointing loses the gradient"):
        call(model, an_input("llama"))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_preparation_for_kbit_training_comes_before(kind: str) -> None:
    base, x = quantised("stand-in", kind), an_input(kind)
    expected = gradients(awakened(toast.wrap(copy.deepcopy(base))), x)
    base.is_loaded_in_8bit = True
    kept = {"use_reentrant": False}
    model = awakened(toast.wrap(prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs=kept)))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    found = gradients(model.train(), x)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


SPLITS = {
    "llama": ["model.layers.0", "model.rotary_emb", "lm_head", "model.embed_tokens"],
    "gpt2": ["transformer.h.0", "transformer.wte", "transformer.wpe", "transformer.drop", "lm_head"],
    "vit": ["blocks.0", "cls_token", "pos_embed", "patch_embed", "head", "pos_drop", "patch_drop",
            "norm_pre", "fc_norm", "head_drop"],
}  # fmt: skip
AWAY = {
    "llama": ["model.layers.1", "model.layers.2", "model.norm"],
    "gpt2": ["transformer.h.1", "transformer.h.2", "transformer.ln_f"],
    "vit": ["blocks.1", "blocks.2", "norm"],
}


LITE_TWICE = {"lora_rank": 2, "value_bias": "twice"}


def offload(model: Any, how: str, kind: str, folder: Path) -> Any:
    """Accelerate takes the weights away and fetches them in `forward`, all of them or some blocks'."""
    if how == "cpu":
        return accelerate.cpu_offload(model, torch.device("cpu"))
    if how == "disk":
        return accelerate.disk_offload(model, folder, torch.device("cpu"))
    prefix = "base_model.model." if isinstance(model, PeftModel) else ""
    places = {prefix + name: "cpu" for name in SPLITS[kind]} | {prefix + n: "disk" for n in AWAY[kind]}
    return accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=folder, force_hooks=True, skip_keys=CACHE
    )


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("how", "options", "wrapped_first"),
    [
        ("cpu", {}, False),
        ("disk", {}, False),
        ("split", {}, False),
        ("split", LITE_TWICE, False),
        ("disk", {}, True),
        ("split", LITE_TWICE, True),
    ],
    ids=["cpu", "disk", "split", "split-lite", "disk-wrapped-first", "split-lite-wrapped-first"],
)
def test_an_offloaded_base_is_steered_alike(
    kind: str, how: str, options, wrapped_first: bool, tmp_path
) -> None:
    x, plain = an_input(kind), awakened(toast.wrap(bare(kind), **options))
    if wrapped_first:
        model = offload(awakened(toast.wrap(bare(kind), **options)), how, kind, tmp_path / "away")
        assert on_meta(model)
        with pytest.raises(ValueError, match=r"Dispatch the model before toast\.wrap"):
            call(model, x)
    else:
        model = awakened(toast.wrap(offload(bare(kind), how, kind, tmp_path / "away"), **options))
        assert not on_meta(model)
    assert any(parameter.is_meta for parameter in model.parameters())
    torch.testing.assert_close(output(model, x), output(plain, x), rtol=1e-4, atol=1e-5)
    assert not on_meta(model)
    for one, other in zip(gradients(model, x), gradients(plain, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    if kind != "vit":
        assert torch.equal(generated(model, x), generated(plain, x))
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(bare(kind), tmp_path / "adapter")
    torch.testing.assert_close(output(loaded, x), output(plain, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_value_bias_of_an_offloaded_map_counts_twice(kind: str, tmp_path) -> None:
    kind = "llama-grouped" if kind == "llama" else kind
    options, x = {"value_bias": "twice"}, an_input(kind)
    plain = awakened(toast.wrap(bare(kind), **options))
    model = awakened(toast.wrap(offload(bare(kind), "cpu", kind, tmp_path), **options))
    torch.testing.assert_close(output(model, x), output(plain, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "is_trainable"), [("llama", False), ("llama", True), ("gpt2", True)])
def test_a_device_map_of_transformers(kind: str, is_trainable: bool, tmp_path) -> None:
    bare(kind).save_pretrained(tmp_path / "base")
    x, plain = an_input(kind), awakened(toast.wrap(bare(kind)))
    plain.save_pretrained(tmp_path / "adapter")
    places = dict.fromkeys(SPLITS[kind], "cpu") | dict.fromkeys(AWAY[kind], "disk")

    def split() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", device_map=places, offload_folder=tmp_path / "away", dtype=torch.float32
        ).eval()

    model = awakened(toast.wrap(split()))
    assert any(parameter.is_meta for parameter in model.parameters())
    assert not on_meta(model)
    loaded = PeftModel.from_pretrained(
        split(), tmp_path / "adapter", is_trainable=is_trainable, offload_folder=str(tmp_path / "again"),
        device_map={"base_model.model." + name: place for name, place in places.items()},
    ).eval()  # fmt: skip
    assert any(parameter.is_meta for parameter in loaded.parameters())
    assert not on_meta(loaded)
    for one in (model, loaded):
        torch.testing.assert_close(output(one, x), output(plain, x), rtol=1e-4, atol=1e-4)
        assert torch.equal(generated(one, x), generated(plain, x))
    if is_trainable:
        for found, expected in zip(gradients(loaded, x), gradients(plain, x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrapped_first", [False, True])
def test_a_hook_on_the_trunk_itself(wrapped_first: bool) -> None:
    base, x = bare("llama").model, an_input("llama")
    expected = awakened(toast.wrap(copy.deepcopy(base)))(input_ids=x).last_hidden_state
    plain = base(input_ids=x).last_hidden_state
    model = awakened(toast.wrap(base)) if wrapped_first else base
    add_hook_to_module(base, AlignDevicesHook("cpu", io_same_device=True))
    model = model if wrapped_first else awakened(toast.wrap(base))
    assert torch.equal(model(input_ids=x).last_hidden_state, expected)
    assert torch.equal(model.unload()(input_ids=x).last_hidden_state, plain)


LORA = {"llama": ["v_proj", "up_proj"], "gpt2": ["c_attn"], "vit": ["qkv", "fc1"]}
BESIDE = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_fc"], "vit": ["fc1"]}


def lora(model: nn.Module, targets: list[str]) -> LoraConfig:
    fan = any(type(module).__name__ == "Conv1D" for module in model.modules())
    return LoraConfig(r=2, target_modules=targets, init_lora_weights=False, fan_in_fan_out=fan)


def with_lora(model: Any, targets: list[str]) -> Any:
    return get_peft_model(model, lora(model, targets)).eval()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("options", [{}, {"feedback_form": "composed"}, {"lora_rank": 2}])
def test_a_merged_lora_is_a_base_like_any_other(kind: str, options, tmp_path) -> None:
    x = an_input(kind)
    unmerged = output(with_lora(bare(kind), LORA[kind]), x)
    torch.manual_seed(1)
    merged = with_lora(bare(kind), LORA[kind]).merge_and_unload().eval()
    twin, frozen = copy.deepcopy(merged), output(merged, x)
    torch.testing.assert_close(frozen, unmerged, rtol=1e-4, atol=1e-4)
    wrapped = toast.wrap(merged, **options)
    torch.testing.assert_close(output(wrapped, x), frozen, rtol=0, atol=1e-6)
    toast.calibrate(awakened(wrapped), x)
    assert all(gradient.abs().max() > 0 for gradient in gradients(wrapped, x))
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(twin, tmp_path)
    assert torch.equal(output(loaded, x), output(wrapped, x))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize("kind", MODELS)
def test_lora_beside_the_steered_maps_comes_later(kind: str) -> None:
    merged = with_lora(bare(kind), LORA[kind]).merge_and_unload().eval()
    wrapped, x = awakened(toast.wrap(merged)), an_input(kind)
    before = output(wrapped, x)
    inject_adapter_in_model(lora(merged, BESIDE[kind]), merged, adapter_name="beside")
    assert find_steering(wrapped).selector.adapter == "default"
    torch.manual_seed(4)
    assert not torch.allclose(output(wrapped, x), before)
    factors = [parameter for name, parameter in wrapped.named_parameters() if ".beside." in name]
    found = torch.autograd.grad(call(wrapped, x).square().mean(), factors)
    assert found
    assert all(gradient.abs().max() > 0 for gradient in found)
