"""Every row of the table, on a tiny random model of its library.

Values are compared with what the block's own code makes of `x + s` in an untouched copy of the model.
"""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn

import toast
from tests.attention import run_alone, watched, with_states
from tests.models import awaken
from tests.steered import assert_same, set_checkpointing, trained
from tests.zoo import DECODERS, ENCODERS, MULTIMODAL, TIMM, build, example
from toast.families.listing import table, verified
from toast.families.table import FAMILIES
from toast.families.table import REFUSED as REFUSED_TRUNKS
from toast.steering import find_steering

REFUSED = {"timm-maxvit"}
CONVOLUTIONS = [name for name in TIMM if name.startswith("timm-convnext")]
ALL = [name for name in (*DECODERS, *ENCODERS, *TIMM) if name not in REFUSED]
ATTENTION = [name for name in ALL if name not in CONVOLUTIONS]
#: Every layout of values, order of tokens and way of reading, and the weight taken by hand.
OF_EACH_KIND = [
    "llama", "phi3", "gpt2", "gpt-neox", "codegen", "bert", "vit", "timm-vit-parallel-scaling",
    "timm-swin", "timm-swin-v2", "timm-eva", "timm-cait", "timm-convnext",
]  # fmt: skip
TEXT = set(DECODERS) | set(MULTIMODAL)


def call(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The first output tensor; without a cache, so that every call stands alone."""
    out = model(**inputs, **({"use_cache": False} if "input_ids" in inputs and can_generate(model) else {}))
    return out if isinstance(out, Tensor) else next(x for x in out.values() if isinstance(x, Tensor))


def can_generate(model: Any) -> bool:
    while hasattr(model, "base_model") and not hasattr(model, "can_generate"):
        model = model.base_model
    return bool(getattr(model, "can_generate", lambda: False)())


def steered(name: str, dtype: torch.dtype | None = None, **options: Any) -> Any:
    """A wrapped model with strong signals."""
    model = awaken(toast.wrap(build(name, dtype), **options)).eval()
    calibrate(model, name, inputs(name, dtype))
    return model


def calibrate(model: Any, name: str, x: dict[str, Tensor]) -> None:
    toast.calibrate(model, **x, **({"use_cache": False} if name in TEXT else {}))


def inputs(name: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return example(name, dtype=dtype)


def test_a_fresh_selector_of_any_row_lives_on_its_first_input() -> None:
    turned = 0
    for seed, name in enumerate([*ALL, *MULTIMODAL] * 2):
        torch.manual_seed(seed)
        model = toast.wrap(build(name)).eval()
        embedding = find_steering(model).selector.toast_task_embedding["default"]
        drawn = embedding.detach().clone()
        assert toast.trace(model, **inputs(name)).selection_weights.any(), (name, seed)
        turned += torch.equal(embedding.detach(), -drawn)
    assert turned  # some would have been dead


@pytest.mark.parametrize("name", [*ALL, *MULTIMODAL])
def test_zero_signals_change_no_bit(name: str) -> None:
    model, x = build(name), inputs(name)
    with torch.no_grad():
        plain = call(model, x)
        wrapped = toast.wrap(model)
        assert torch.equal(call(wrapped, x), plain)
        awaken(wrapped)
        calibrate(wrapped, name, x)
        assert not torch.equal(call(wrapped, x), plain)
        with wrapped.disable_adapter():
            assert torch.equal(call(wrapped, x), plain)
        assert torch.equal(call(wrapped.unload(), x), plain)


@pytest.mark.parametrize("name", ATTENTION)
def test_values_are_those_of_x_plus_s(name: str) -> None:
    plain, x = build(name), inputs(name)
    model = steered(name)
    steering = find_steering(model)
    trunk = copy.deepcopy(plain).get_submodule(path_of(model, steering.trunk))
    with torch.no_grad(), watched(steering.trunk, holders(steering)) as wrapped:
        signals = toast.trace(model, **x, **({"use_cache": False} if name in TEXT else {})).signals
    for value, signal, holder in zip(steering.values, signals, holders(steering), strict=True):
        assert signal.abs().mean() > 0.01
        attention = trunk.get_submodule(holder)
        given = wrapped.calls[holder]
        signal = signal.detach()
        if steering.family.tokens == "windows":
            block = trunk.get_submodule(steering.block_names[value.unit.block])
            signal = in_windows(block, signal)
        if holder == steering.block_names[value.unit.block]:  # its norm stands before the projection
            before, after = (at_projection(attention, value.unit.path, given, s) for s in (0, signal))
        else:
            before = run_alone(attention, given)
            after = run_alone(attention, with_states(given, lambda h, s=signal: h + s))
        seen = wrapped.seen[holder]
        assert_same([seen["query"], seen["key"]], [before["query"], before["key"]])
        assert_same(seen["value"], after["value"])
        assert (after["value"] - before["value"]).abs().mean() > 1e-3


def path_of(model: Any, module: nn.Module) -> str:
    base = model.get_base_model()
    return next(name for name, each in base.named_modules() if each is module)


def holders(steering: Any) -> list[str]:
    """The attentions: what holds each value projection."""
    return [value.unit.path.rpartition(".")[0] for value in steering.values]


def at_projection(block: nn.Module, path: str, given: Any, signal: Any) -> dict[str, Tensor]:
    projection = block.get_submodule(path.rpartition(".")[2])
    handle = projection.register_forward_pre_hook(lambda _, args: (args[0] + signal, *args[1:]))
    try:
        return run_alone(block, given)
    finally:
        handle.remove()


def in_windows(block: Any, signal: Tensor) -> Tensor:
    """The order in which the block's own code gives tokens to its attention."""
    seen: list[Tensor] = []
    attention, block.attn = block.attn, Keeps(seen)
    block._attn(signal[:, : block.input_resolution[0], : block.input_resolution[1]])
    block.attn = attention
    return seen[0]


class Keeps(nn.Module):
    """Stands for an attention: keeps what it is given, and gives it back."""

    def __init__(self, seen: list[Tensor]) -> None:
        super().__init__()
        self.seen = seen

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        self.seen.append(x)
        return x


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_stages_get_their_input_plus_s(name: str) -> None:
    plain, x, model = build(name), inputs(name), steered(name)
    with torch.no_grad():
        signals = [s.permute(0, 3, 1, 2) for s in toast.trace(model, **x).signals]
        y = x["x"]
        for index, stage in enumerate(plain.stages):
            y = y + signals[index]
            y = stage(plain.stem(y) if index == 0 else y)
        assert_same(call(model, x), plain.forward_head(plain.norm_pre(y)))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in ALL),
        # What is trained is no matter of the family, but of what its values are made of.
        *((name, {"train": ["task_embedding", "to_signal"]}) for name in OF_EACH_KIND),
        *((name, {"lora_rank": 2}) for name in OF_EACH_KIND),
    ],
)
def test_gradients_reach_what_is_trained_and_nothing_else(name: str, options: dict[str, Any]) -> None:
    model = steered(name, **options)
    call(model, inputs(name)).square().mean().backward()
    config = model.peft_config["default"]
    layers = [find_steering(model).selector, *find_steering(model).values]
    expected = {
        id(p) for layer in layers for group, p in layer.groups("default") if group in config.trained_groups
    }
    assert expected == {id(p) for p in model.parameters() if p.grad is not None and p.grad.abs().max() > 0}


@pytest.mark.parametrize("name", DECODERS)
def test_cached_generation_is_uncached_generation(name: str) -> None:
    model = steered(name)
    text = inputs(name)["input_ids"]
    padded, mask = text.clone(), torch.ones_like(text)
    padded[0, :2], mask[0, :2] = 0, 0
    for options in ({}, {"input_ids": padded, "attention_mask": mask, "num_beams": 3}):
        given = {"input_ids": text, "attention_mask": torch.ones_like(text)} | options
        with_cache, without = (
            model.generate(**given, max_new_tokens=4, do_sample=False, use_cache=cached)
            for cached in (True, False)
        )
        assert torch.equal(with_cache, without)


@pytest.mark.parametrize("name", ALL)
def test_a_loaded_adapter_is_the_saved_one(name: str, tmp_path: Path) -> None:
    model, x = steered(name), inputs(name)
    toast.save_adapter(model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(build(name), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(call(loaded, x), call(model, x))


@pytest.mark.parametrize("name", ALL)
def test_checkpointing_gives_the_same_gradients(name: str) -> None:
    model = steered(name).train()
    set_checkpointing(model.get_base_model(), enable=False)
    found = []
    for enable in (False, True):
        set_checkpointing(model.get_base_model(), enable)
        torch.manual_seed(0)
        loss = call(model, inputs(name)).square().mean()
        found.append(torch.autograd.grad(loss, list(trained(model).values())))
    assert_same(*found)


@pytest.mark.parametrize("name", ALL)
def test_bfloat16(name: str) -> None:
    x = inputs(name, torch.bfloat16)
    model = build(name, torch.bfloat16)
    with torch.no_grad():
        plain = call(model, x)
        model = toast.wrap(model)
        assert torch.equal(call(model, x), plain)
    calibrate(awaken(model), name, x)
    call(model, x).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained(model).values())


@pytest.mark.parametrize("name", MULTIMODAL)
def test_of_a_multi_modal_model_the_language_model_is_steered(name: str) -> None:
    model, x = steered(name), inputs(name)
    steering = find_steering(model)
    assert steering.family.kind == "decoder"
    call(model, x).square().mean().backward()
    assert all(p.grad is not None for p in trained(model).values())
    cached, uncached = (
        model.generate(**x, max_new_tokens=3, do_sample=False, use_cache=cached) for cached in (True, False)
    )
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize(
    "name", ["llama", "falcon-40b", "codegen", "phi3", "vit", "timm-swin-v2", "timm-eva", "bert"]
)
def test_a_probe_proves_the_row(name: str) -> None:
    model = toast.wrap(build(name))
    before = {n: p.clone() for n, p in model.named_parameters()}
    probe = toast.probe(model, **inputs(name))
    assert probe.proved, str(probe)
    assert "NO" not in str(probe)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("llama", {"value": "self_attn.k_proj"}),
        ("gpt-neox", {"value": "attention.query_key_value", "layout": "last_third"}),
        ("codegen", {"value": "attn.qkv_proj", "layout": "last_third"}),
        ("timm-eva", {"value": "attn.qkv", "layout": "last_third"}),  # which is not called
    ],
)
def test_a_probe_shows_what_is_wrong(name: str, wrong: dict[str, Any]) -> None:
    row = find_steering(toast.wrap(build(name))).family
    model = build(name)
    trunk = next(n for n, m in model.named_modules() if row.trunk.endswith(f".{type(m).__name__}"))
    anatomy = {"trunk": trunk, "blocks": row.blocks, "norm": row.norm, "methods": list(row.methods)} | wrong
    probe = toast.probe(toast.wrap(model, anatomy=anatomy), **inputs(name))
    assert not probe.proved
    assert "NOT PROVED" in str(probe)
    assert "NO " in str(probe)


@pytest.mark.parametrize("trunk", [*REFUSED_TRUNKS, *(row.trunk for row in FAMILIES)])
def test_named_classes_exist(trunk: str) -> None:
    module, _, name = trunk.rpartition(".")
    assert isinstance(getattr(importlib.import_module(module), name), type)


def test_every_row_has_a_model_and_claims_what_is_shown_here() -> None:
    family = {name: find_steering(toast.wrap(build(name))).family.name for name in (*ALL, *MULTIMODAL)}
    # Rows that tests or users registered aside.
    assert {row.name for row in FAMILIES if row.library in ("timm", "transformers")} == set(family.values())
    shown = {
        "bits": {*ALL, *MULTIMODAL},
        "values": ALL,
        "gradients": {*ALL, *MULTIMODAL},
        "generation": {*DECODERS, *MULTIMODAL},
        "saving": ALL,
        "checkpointing": ALL,
        "bfloat16": ALL,
    }
    rows = {row.name: row for row in FAMILIES}
    for check, names in shown.items():
        assert {row for row in rows if check in verified(rows[row])} <= {family[name] for name in names}
    lines = table().splitlines()
    assert [line.split()[0] for line in lines[1 : lines.index("")]] == list(rows)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("DeepseekV3Config", "DeepseekV3Model at 'model' cannot be steered: its attention keeps a latent"),
        ("Glm4MoeLiteConfig", "keeps a latent"),
        ("JambaConfig", "some of its blocks have no attention"),
    ],
)
def test_what_cannot_be_steered_is_refused_with_the_reason(config: str, message: str) -> None:
    made = getattr(transformers, config)(num_hidden_layers=2, vocab_size=37)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(made)
    with pytest.raises(ValueError, match=message):
        toast.wrap(model)


def test_maxvit_is_refused() -> None:
    with pytest.raises(ValueError, match="MaxxVit cannot be steered: its attention alternates"):
        toast.wrap(build("timm-maxvit"))


@pytest.mark.parametrize("name", ["timm-swin", "timm-convnext"])
def test_hierarchies_read_the_last_block(name: str) -> None:
    with pytest.raises(ValueError, match=r"select_from: the blocks of .* differ in tokens or width"):
        toast.wrap(build(name), select_from=0)
    with pytest.raises(ValueError, match="blocks of the same tokens and width"):
        call(toast.wrap(build(name), feedback_form="composed"), inputs(name))


@pytest.mark.parametrize("name", ["timm-swin", "timm-swin-v2", "timm-convnext"])
def test_hierarchies_are_reconstructed_at_their_own_resolution(name: str) -> None:
    model = steered(name)
    loss, parts = toast.pretraining_loss(model, **inputs(name), task_loss=lambda y: y.square().mean())
    loss.backward()
    assert parts["reconstruction"] > 0
    for value in find_steering(model).values:
        assert value.toast_to_state["default"].weight.grad.abs().sum() > 0
