"""Against the official implementation, in float64, and what is refused."""

from __future__ import annotations

import re

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import toast
from tests.models import vit
from toast.model import find_steering


def plain_vit(sizes: dict[str, str]) -> nn.Module:
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes")
    options = {name: int(sizes[name]) for name in names}
    return timm.models.vision_transformer.VisionTransformer(**options).double()


def plain_llama(sizes: dict[str, str]) -> nn.Module:
    whole = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    options = {name: int(sizes[name]) for name in (*whole, "max_position_embeddings")}
    options |= {name: float(sizes[name]) for name in ("rms_norm_eps", "rope_theta")}
    config = transformers.LlamaConfig(**options, bos_token_id=1, eos_token_id=None, pad_token_id=0)
    return transformers.LlamaForCausalLM(config).double()


def weights(run: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("weight."): t for name, t in run.items() if name.startswith("weight.")}


def official_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of the top-down module under the official names."""
    found = {}
    for name, parameter in model.named_parameters():
        if ".toast_" not in name:
            continue
        block = re.search(r"(?:blocks|layers)\.(\d+)\.", name)
        part = re.search(r"lora_[AB]", name)
        if "task_embedding" in name:
            found["prompt"] = parameter.grad
        elif "channel_transform" in name:
            found["top_down_transform"] = parameter.grad
        else:
            linear = "linear" if "to_state" in name else "linear2"
            found[f"decoders.{block[1]}.{linear}.{part[0] if part else 'weight'}"] = parameter.grad
    return found


def check_gradients(model: nn.Module, run: dict[str, Tensor], relative: float, absolute: float) -> None:
    expected = {
        n.removeprefix("grad.").removeprefix("model."): t for n, t in run.items() if n.startswith("grad.")
    }
    found = official_gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        tolerance = absolute + relative * gradient.abs().max()
        assert (found[name] - gradient).abs().max() <= tolerance, name


@pytest.mark.parametrize("name", ["toast_vit", "toast_lite_vit"])
def test_vit_equals_the_official_run(name: str, official) -> None:
    run, sizes = official(name)
    model = toast.load_official(plain_vit(sizes), weights(run), train="all")
    assert not model.training
    traced = toast.trace(model, run["input"], block_states=True)

    def close(found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)

    close(traced.output, run["logits"])
    close(traced.first_output, run["first_logits"])
    close(traced.features, run["first_features"])
    close(traced.selection_weights, run["mask"][..., 0])
    close(traced.selected, run["selected"])
    for block, signal in enumerate(traced.signals):
        close(signal, run[f"signal.{block}"])
    close(toast.reconstruction_loss(model, traced), run["reconstruction_loss_sum"])
    loss = F.cross_entropy(traced.output, run["labels"])
    close(loss, run["loss"])
    loss.backward()
    check_gradients(model, run, relative=0, absolute=1e-9)


@pytest.mark.parametrize("name", ["toast_llama", "toast_lite_llama"])
def test_llama_equals_the_official_run(name: str, official) -> None:
    run, sizes = official(name)
    model = toast.load_official(plain_llama(sizes), weights(run), train="all")
    inputs = {key: run[key] for key in ("input_ids", "attention_mask", "position_ids")}
    traced = toast.trace(model, **inputs, block_states=True, labels=run["labels"])

    def close(found: Tensor, expected: Tensor) -> None:
        seen = run["attention_mask"].bool()
        if found.shape[:2] == seen.shape:  # what padding tokens see is not defined
            found, expected = found[seen], expected[seen]
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()

    close(traced.output.logits, run["logits"])
    close(traced.features, run["first_features"])
    for block, signal in enumerate(traced.signals):
        close(signal, run[f"signal.{block}"])
    close(toast.reconstruction_loss(model, traced), run["reconstruction_loss"])
    close(traced.output.loss, run["loss"])
    traced.output.loss.backward()
    check_gradients(model, run, relative=1e-5, absolute=0)
    for use_cache in (True, False):
        generated = model.generate(run["prompt"], max_new_tokens=12, do_sample=False, use_cache=use_cache)
        assert torch.equal(generated, run["greedy"])


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
def test_every_kind_of_file(suffix: str, official, tmp_path) -> None:
    run, sizes = official("toast_vit")
    path = tmp_path / f"official{suffix}"
    if suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({n: t.contiguous() for n, t in weights(run).items()}, path)
    else:
        torch.save({"model": weights(run)} if suffix == ".pth" else weights(run), path)
    model = toast.load_official(plain_vit(sizes), path)
    torch.testing.assert_close(model(run["input"]), run["logits"], rtol=0, atol=1e-9)


def test_without_the_backbone_it_stays(official) -> None:
    run, sizes = official("toast_vit")
    top_down = {n: t for n, t in weights(run).items() if n.startswith(("prompt", "top_down", "decoders"))}
    model = plain_vit(sizes)
    before = model.head.weight.clone()
    wrapped = toast.load_official(model, top_down)
    assert torch.equal(model.head.weight, before)
    steering = find_steering(wrapped)
    assert torch.equal(steering.selector.toast_task_embedding["default"], run["weight.prompt"])


def test_a_head_that_is_kept_is_loaded_too(official) -> None:
    run, sizes = official("toast_vit")
    model = toast.load_official(plain_vit(sizes), weights(run), modules_to_save=["head"])
    torch.testing.assert_close(model(run["input"]), run["logits"], rtol=0, atol=1e-9)
    with model.disable_adapter():
        torch.testing.assert_close(model(run["input"]), run["first_logits"], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("decoders.1.linear2.weight"), r"Missing: \['decoders.1.linear2.weight'\]"),
        (
            lambda w: w.update({"decoders.7.linear.weight": torch.zeros(24, 24)}),
            r"Unexpected: .*decoders.7.linear",
        ),
        (lambda w: w.pop("blocks.0.norm1.weight"), r"backbone .*Missing: \['blocks.0.norm1.weight'\]"),
        (lambda w: w.update({"extra": torch.zeros(2)}), r"Unexpected: \['extra'\]"),
        (
            lambda w: w.update({"head.weight": torch.zeros(7, 24)}),
            r"head.weight is \(7, 24\), needs \(5, 24\)",
        ),
    ],
)
def test_wrong_keys_are_listed_and_nothing_changes(change, message: str, official) -> None:
    run, sizes = official("toast_vit")
    checkpoint = weights(run)
    change(checkpoint)
    model = plain_vit(sizes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        toast.load_official(model, checkpoint)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_file_that_would_run_code_is_refused(tmp_path) -> None:
    path = tmp_path / "bad.pth"
    torch.save({"model": print}, path)
    with pytest.raises(ValueError, match="holds more than tensors"):
        toast.load_official(vit(), path)
    path.write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(ValueError, match="damaged"):
        toast.load_official(vit(), path)
    with pytest.raises(ValueError, match="is not there"):
        toast.load_official(vit(), tmp_path / "absent.bin")
