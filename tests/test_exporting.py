"""Exported models compute what the model does; what a fused matrix holds is known when it is fused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim

import toast
from tests.models import awaken, decoder, images, tokens, vit
from tests.steered import call, steer
from tests.zoo import build

OPTIONS: dict[str, dict[str, Any]] = {
    "whole": {"feedback_form": "composed"},
    "upper": {"steer_from": 1, "select_from": 1, "feedback_form": "per_token"},
    "lite-twice": {"lora_rank": 2, "value_bias": "twice"},
}


def frozen(kind: str, fused: bool, **options: Any) -> tuple[Any, Tensor, Tensor]:
    """A steered model in single precision, inputs, and what it makes of them; steering moves that.

    It has two blocks: the time that exporting takes grows with them.
    """
    bare = vit(depth=2) if kind == "vit" else decoder(kind, num_hidden_layers=2)
    model = steer(bare, kind, **options).float().requires_grad_(False)
    x = images(2).float() if kind == "vit" else tokens(2)
    if fused:
        toast.fuse(model)
    expected = call(model, x)
    with model.disable_adapter():
        assert (call(model, x) - expected).abs().max() > 1e-3
    return model.requires_grad_(False), x, expected


def near(found: Any, expected: Tensor, digits: float = 1e-5) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found), expected, rtol=0, atol=digits * expected.abs().max().item()
    )


cases = pytest.mark.parametrize(
    ("options", "fused"), [(o, f) for o in OPTIONS.values() for f in (False, True)],
    ids=[f"{name}{'-fused' * f}" for name in OPTIONS for f in (False, True)],
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # undone in the call
@cases
@pytest.mark.parametrize("strict", [False, True])
def test_torch_export(options: dict[str, Any], fused: bool, strict: bool) -> None:
    model, x, expected = frozen("vit", fused, **options)
    near(torch.export.export(model, (x,), strict=strict).module()(x), expected)


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
def test_blocks_of_different_widths_take_any_batch() -> None:
    """Their feedback has one form, so the size of the batch decides nothing."""
    model = awaken(toast.wrap(build("timm-swin"))).eval().float().requires_grad_(False)
    x = torch.rand(5, 3, *model.get_base_model().patch_embed.img_size)
    program = torch.export.export(model, (x[:2],), dynamic_shapes=(({0: Dim("batch")},),), strict=False)
    near(program.module()(x), model(x))


@pytest.mark.parametrize("fused", [False, True])
def test_torch_export_of_a_language_model(fused: bool) -> None:
    model, x, expected = frozen("llama", fused)
    exported = torch.export.export(model, (), {"input_ids": x, "use_cache": False})
    near(exported.module()(input_ids=x, use_cache=False).logits, expected)


@pytest.mark.filterwarnings("ignore")  # tracing warns of much
@cases
def test_torch_jit_trace(options: dict[str, Any], fused: bool) -> None:
    model, x, expected = frozen("vit", fused, **options)
    near(torch.jit.trace(model, (x,))(x), expected)


@pytest.mark.filterwarnings("ignore")  # deprecations within the exporters
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_onnx(fused: bool, dynamo: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    model, x, expected = frozen("vit", fused)
    options = {"dynamo": True} if dynamo else {"dynamo": False, "opset_version": 17}
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", input_names=["x"], **options)
    near(reference.ReferenceEvaluator(str(tmp_path / "model.onnx")).run(None, {"x": x.numpy()})[0], expected)


def test_projections_that_are_quantised_after_fusing() -> None:
    """W_V is in the matrix as it was: steering comes through, and the error is that of quantisation."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, x, expected = frozen("vit", fused=True)
    with model.disable_adapter():
        plain = model(x)
    model.requires_grad_(False)
    quantize_(model.get_base_model().blocks, Int8WeightOnlyConfig())
    with model.disable_adapter():
        alone = (model(x) - plain).abs().max()
    model.requires_grad_(False)
    assert (model(x) - expected).abs().max() <= 3 * alone
    assert (model(x) - plain).abs().max() > 10 * alone
    near(torch.export.export(model, (x,)).module()(x), model(x))


def test_an_unloaded_model_is_exported_as_the_bare_one() -> None:
    bare = vit()
    model = toast.wrap(copy.deepcopy(bare)).eval()
    x = images(2)
    exported = torch.export.export(model.unload(), (x,))
    near(exported.module()(x), bare(x), 1e-12)
