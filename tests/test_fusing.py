"""The fused model against the plain one."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import toast
from tests.families.test_table import call as call_row
from tests.families.test_table import inputs as inputs_of_row
from tests.families.test_table import steered as steered_row
from tests.models import awaken, decoder, images, tokens
from tests.steered import assert_same, call, inputs, steered
from tests.zoo import build
from toast.steering import find_steering

#: One of every layout, and grouped-query attention, a bias counted twice, Lite, a part of the blocks.
ROWS: list[tuple[str, dict[str, Any]]] = [
    ("timm-vit", {}), ("timm-vit", {"value_bias": "twice"}), ("timm-vit", {"lora_rank": 2}),
    ("timm-vit", {"steer_from": 1}), ("timm-eva", {}), ("timm-vit-parallel-scaling", {}),
    ("llama", {}), ("llama", {"select_from": 0}), ("gpt2", {}), ("gpt-neox", {}), ("falcon-40b", {}),
    ("codegen", {}), ("phi3", {}), ("bert", {}), ("clip-vision", {}),
]  # fmt: skip


def still(model: nn.Module) -> Any:
    return model.requires_grad_(False)


class Quantised(nn.Module):
    """A linear map in eight bits, in the manner of bitsandbytes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.abs().amax() / 127
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.compute_dtype = torch.float64

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


@pytest.mark.parametrize(("name", "options"), ROWS)
def test_fused_is_plain(name: str, options: dict[str, Any]) -> None:
    model, x = still(steered_row(name, **options)), inputs_of_row(name)
    plain = call_row(model, x)
    assert toast.fuse(model) is model
    assert find_steering(model).adapter.fused is not None
    fused = call_row(model, x)
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-6 * plain.abs().max().item())
    assert torch.equal(call_row(toast.unfuse(model), x), plain)


def test_fused_is_plain_to_the_last_digits() -> None:
    model, (x,) = still(steered_row("timm-vit")), [inputs_of_row("timm-vit")]
    plain = call_row(model, x)
    assert_same(call_row(toast.fuse(model), x), plain)


def test_quantised_projections_get_signals() -> None:
    base = build("llama")
    for block in base.model.layers:
        block.self_attn.v_proj = Quantised(block.self_attn.v_proj)
    model, (x,) = still(awaken(toast.wrap(base))).eval(), inputs("llama")
    plain = call(model, x)
    fused = call(toast.fuse(model), x)
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-6 * plain.abs().max().item())


def test_generation_and_saving(tmp_path: Path) -> None:
    model, x = still(steered_row("llama")), tokens(2)
    plain = model.generate(x, max_new_tokens=6, do_sample=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    toast.fuse(model)
    assert torch.equal(model.generate(x, max_new_tokens=6, do_sample=False), plain)
    assert model.state_dict().keys() == before.keys()
    toast.save_adapter(model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "adapter")
    assert torch.equal(call(loaded, x), call(toast.unfuse(model), x))
    toast.fuse(loaded)
    assert torch.equal(loaded.generate(x, max_new_tokens=6, do_sample=False), plain)


def test_each_adapter_is_fused_by_itself() -> None:
    model, (x,) = still(steered_row("llama")), inputs("llama")
    plain = call(model, x)
    toast.fuse(model)
    model.add_adapter("other", toast.ToastConfig())
    model.set_adapter("other")
    assert find_steering(model).adapter.fused is None
    call(model, x)
    model.set_adapter("default")
    still(model)
    torch.testing.assert_close(call(model, x), plain)
    model.delete_adapter("other")
    assert torch.equal(call(toast.unfuse(model), x), plain)


def test_bfloat16_and_moves() -> None:
    model, (x,) = still(steered_row("llama", torch.bfloat16)), inputs("llama")
    plain = call(model, x)
    toast.fuse(model)
    matrix = find_steering(model).selector._buffers["fused_default"]
    assert matrix.dtype == torch.bfloat16
    torch.testing.assert_close(call(model, x), plain, rtol=0.1, atol=0.1 * plain.abs().max().item())
    model.double()
    assert find_steering(model).selector._buffers["fused_default"].dtype == torch.float64


def test_what_cannot_be_fused() -> None:
    with pytest.raises(
        ValueError, match="fuse is for inference, and 8 parameters of the adapter are trained"
    ):
        toast.fuse(toast.wrap(decoder()))
    with pytest.raises(ValueError, match="fuse needs blocks of the same tokens and width"):
        toast.fuse(still(toast.wrap(build("timm-swin"))))
    with pytest.raises(ValueError, match="fuse needs a model with an active TOAST adapter"):
        toast.fuse(decoder())


# A fused matrix that is not that of the weights any more.


def by_state(model: Any) -> None:
    model.load_state_dict(
        {name: 1.1 * t if "to_signal" in name else t for name, t in model.state_dict().items()}
    )


def by_assignment(model: Any) -> None:
    state = {name: 1.1 * t if "base_layer.weight" in name else t for name, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def by_peft(model: Any) -> None:
    set_peft_model_state_dict(model, {n: 1.1 * t for n, t in get_peft_model_state_dict(model).items()})


def in_place(model: Any) -> None:
    with torch.no_grad():
        find_steering(model).adapter.channel_transform[3, 4] += 1.0


def unseen(model: Any) -> None:
    find_steering(model).values[1].base_layer.weight.data *= 1.1


def by_optimiser(model: Any) -> None:
    weights = [w.requires_grad_() for w in find_steering(model).adapter.mapped()]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    torch.optim.AdamW(weights, lr=1e-6, fused=True).step()
    model.requires_grad_(False)


@pytest.mark.parametrize("change", [by_state, by_assignment, by_peft, in_place, unseen, by_optimiser])
def test_weights_that_changed_are_noticed(change: Any) -> None:
    model, x = steered("vit").requires_grad_(False), images(2)
    toast.fuse(model)
    model(x)
    change(model)
    with pytest.raises(ValueError, match=r"was fused, and its weights .* were changed since"):
        model(x)
    torch.testing.assert_close(toast.fuse(model)(x), toast.unfuse(copy.deepcopy(model))(x))


def test_a_change_of_weights_that_do_not_lie_in_one_piece_is_noticed() -> None:
    model, x = steered("vit").requires_grad_(False), images(2)
    weight = find_steering(model).values[1].base_layer.weight
    weight.data = weight.data.T.contiguous().T
    toast.fuse(model)
    torch.testing.assert_close(model(x), toast.unfuse(copy.deepcopy(model))(x))
    unseen(model)
    with pytest.raises(ValueError, match=r"was fused, and its weights .* were changed since"):
        model(x)


def test_a_traced_call_leaves_nothing_behind() -> None:
    model, x = steered("vit").requires_grad_(False), images(2)
    expected = toast.fuse(model)(x)
    toast.fuse(model)
    with (
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
        pytest.raises(Exception, match="aten"),  # what is asked of values that are not there
    ):
        model(mode.from_tensor(x))
    assert torch.equal(model(x), expected)


def test_what_is_no_change() -> None:
    model, x = steered("vit").requires_grad_(False), images(2)
    expected = toast.fuse(model)(x)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), expected)
    torch.testing.assert_close(
        copy.deepcopy(model).float()(x.float()).double(), expected, rtol=1e-3, atol=1e-4
    )
    toast.calibrate(model, images(2))  # the task embedding is no part of it
    torch.testing.assert_close(model(x), toast.unfuse(copy.deepcopy(model))(x))


def test_a_fused_adapter_is_not_trained() -> None:
    model, x = steered("vit").requires_grad_(False), images(2)
    expected = toast.fuse(model)(x)
    model.set_adapter("default")
    with pytest.raises(ValueError, match="is fused and trained"):
        model(x)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
