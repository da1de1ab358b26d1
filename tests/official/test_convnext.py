"""Official ConvNeXt checkpoints: against the official implementation, in float64, and what is refused."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

import toast
from tests.official.test_models import official_gradients, weights
from toast.families.anatomy import find_anatomy
from toast.official.naming import official_shape, spelled


def plain_convnext(sizes: dict[str, str], **options: object) -> nn.Module:
    options = {name: json.loads(sizes[name]) for name in ("depths", "dims", "num_classes")} | options
    return timm.models.convnext.ConvNeXt(**options).double().eval()


def official_convolution(gradient: Tensor, like: Tensor) -> Tensor:
    """The gradient of a linear map in the shape of the official convolution."""
    if like.shape[2:] == (1, 1):
        return gradient[:, :, None, None]
    return rearrange(gradient, "(sh sw c) above -> above c sh sw", sh=like.shape[2], sw=like.shape[3])


@pytest.mark.parametrize("options", [{}, {"conv_mlp": True}], ids=["linear", "conv_mlp"])
def test_convnext_equals_the_official_run(options: dict[str, bool], official) -> None:
    run, sizes = official("toast_convnext")
    model = toast.load_official(plain_convnext(sizes, **options), weights(run), train="all")
    traced = toast.trace(model, run["input"], block_states=True)

    def close(found: Tensor, expected: Tensor) -> None:
        if expected.ndim == 4:  # channels first
            expected = rearrange(expected, "batch c h w -> batch h w c").reshape(found.shape)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)

    close(traced.output, run["logits"])
    close(traced.features, run["first_features"])
    assert traced.selection_weights.shape == (3, 2, 2)
    close(traced.selection_weights, run["mask"])
    close(traced.selected, run["selected"])
    assert len(traced.signals) == 4
    for stage, signal in enumerate(traced.signals):
        close(signal, run[f"signal.{stage}"])
    close(toast.reconstruction_loss(model, traced), run["reconstruction_loss_sum"])
    loss = F.cross_entropy(traced.output, run["labels"])
    close(loss, run["loss"])
    loss.backward()
    found = official_gradients(model)
    assert {f"grad.{name}" for name in found} == {name for name in run if name.startswith("grad.")}
    for name, gradient in found.items():
        like = run[f"grad.{name}"]
        gradient = official_convolution(gradient, like) if like.ndim == 4 else gradient
        torch.testing.assert_close(gradient, like, rtol=0, atol=1e-9)


def test_convnext_takes_the_top_down_module_alone_and_a_kept_head(official) -> None:
    run, sizes = official("toast_convnext")
    state = weights(run)
    top_down = {n: t for n, t in state.items() if n.startswith(("prompt", "top_down", "decoders"))}
    backbone = {n: t for n, t in state.items() if n not in top_down}
    model = plain_convnext(sizes)
    model.load_state_dict(timm.models.convnext.checkpoint_filter_fn(backbone, model))
    outputs = [toast.load_official(model, top_down)(run["input"])]
    kept = toast.load_official(
        plain_convnext(sizes), {f"module.{n}": t for n, t in state.items()}, modules_to_save=["head.fc"]
    )
    outputs.append(kept(run["input"]))
    for output in outputs:
        torch.testing.assert_close(output, run["logits"], rtol=0, atol=1e-9)
    assert torch.equal(kept.get_base_model().head.fc.original_module.weight, state["head.weight"])


def test_convnext_names_are_those_of_timm(official) -> None:
    run, sizes = official("toast_convnext")
    for options in ({}, {"conv_mlp": True}, {"use_grn": True, "ls_init_value": None}):
        model = plain_convnext(sizes, **options)
        anatomy = find_anatomy(model)
        official_state = {
            spelled(name, anatomy): tensor.reshape(official_shape(name, tensor, anatomy))
            for name, tensor in model.state_dict().items()
        }
        back = timm.models.convnext.checkpoint_filter_fn(official_state, model)
        assert list(back) == list(model.state_dict())
        assert all(torch.equal(tensor, back[name]) for name, tensor in model.state_dict().items())
        if not options:
            assert official_state.keys() < weights(run).keys()


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        (
            {"use_grn": True, "ls_init_value": None},
            {},
            r"missing: stages.0.0.grn.beta, stages.0.0.grn.gamma.* unexpected: stages.0.0.gamma",
        ),
        ({"head_norm_first": True}, {}, r"missing: norm_pre.bias, .* unexpected: norm.bias, "),
        ({"depths": (1, 1, 1, 1)}, {}, r"unexpected: stages.2.1.dwconv.bias"),
        ({}, {"decoders.3.linear.weight": None}, r"module .*missing: decoders.3.linear.weight"),
        ({}, {"downsample_layers.0.1.bias": None}, r"missing: downsample_layers.0.1.bias"),
        ({}, {"head.bias": torch.zeros(7)}, r"head.bias is \(7,\), needs \(4,\)"),
        (
            {"dims": (8, 12, 24, 20)},
            {},
            r"decoders.3.linear.weight is \(20, 16, 2, 2\), needs \(20, 24, 2, 2\)",
        ),
        (
            {"conv_mlp": True},
            {"stages.2.1.pwconv1.weight": torch.zeros(2, 2)},
            r"stages.2.1.pwconv1.weight is \(2, 2\), needs \(64, 16\)",
        ),
        (
            {},
            {"decoders.0.linear2.weight": torch.zeros(3, 3)},
            r"decoders.0.linear2.weight is \(3, 3\), needs \(3, 3, 1, 1\)",
        ),
        (
            {},
            {"decoders.0.linear.lora_A": torch.zeros(2, 8), "decoders.0.linear.lora_B": torch.zeros(3, 2)},
            "LoRA factors of rank 2 for a ConvNeXt; no official TOAST-Lite code",
        ),
    ],
)
def test_convnext_misfits_are_named_officially(options, change, message: str, official) -> None:
    run, sizes = official("toast_convnext")
    state = {n: t for n, t in (weights(run) | change).items() if t is not None}
    model = plain_convnext(sizes, **options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        toast.load_official(model, state)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("rank", [0, 2])
def test_convnext_trains_with_the_official_settings(rank: int, official) -> None:
    run, sizes = official("toast_convnext")
    options = {"lora_rank": rank} if rank else {}
    config = toast.ToastConfig.official("convnext-lite" if rank else "convnext", **options)
    assert (config.select_features, config.value_bias, config.reconstruction_weight) == (
        "mixed",
        "once",
        0.01,
    )
    model = toast.wrap(plain_convnext(sizes), config)
    F.cross_entropy(model(run["input"]), run["labels"]).backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in model.named_parameters() if p.grad is not None}
    assert any("lora_" in n for n in trained) == any("channel_transform" in n for n in trained) == bool(rank)
