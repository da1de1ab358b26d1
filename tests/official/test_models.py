"""Against the official implementation, in float64, and what is refused."""

from __future__ import annotations

import json
import re
import weakref
from pathlib import Path

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import toast
from tests.models import vit
from tests.snapshots import refused
from toast.official import models as reading
from toast.official.importing import import_official
from toast.steering import find_steering


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
        block = re.search(r"(?:blocks|layers|stages)\.(\d+)\.", name) or [0, 0]  # or the stem of a ConvNeXt
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


def test_blocks_that_are_not_steered_need_no_feedback(official) -> None:
    run, sizes = official("toast_vit")
    model = toast.load_official(plain_vit(sizes), weights(run), steer_from=2)
    traced = toast.trace(model, run["input"])
    torch.testing.assert_close(traced.signals[-1], run["signal.2"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
def test_every_kind_of_file(suffix: str, official, tmp_path) -> None:
    run, sizes = official("toast_vit")
    path = tmp_path / f"official{suffix}"
    if suffix == ".safetensors":
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
        (lambda w: w.pop("decoders.1.linear2.weight"), r"missing: decoders.1.linear2.weight"),
        (
            lambda w: w.update({"decoders.7.linear.weight": torch.zeros(24, 24)}),
            r"unexpected: .*decoders.7.linear",
        ),
        (lambda w: w.pop("blocks.0.norm1.weight"), r"backbone .*missing: blocks.0.norm1.weight"),
        (lambda w: w.update({"extra": torch.zeros(2)}), r"unexpected: extra"),
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
    with pytest.raises(ValueError, match="does not exist"):
        toast.load_official(vit(), tmp_path / "absent.bin")


def shards(state: dict[str, Tensor], folder: Path, suffix: str, index: bool) -> list[Path]:
    """Writes a state dict in three files, as transformers does."""
    folder.mkdir()
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    paths = [folder / f"{stem}-{i:05}-of-00003{suffix}" for i in (1, 2, 3)]
    names = sorted(state)
    for i, path in enumerate(paths):
        part = {n: state[n].contiguous() for n in names[i::3]}
        save_file(part, path) if suffix == ".safetensors" else torch.save(part, path)
    if index:
        where = {name: paths[i % 3].name for i, name in enumerate(names)}
        Path(folder, f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": where}))
    torch.save({"optimizer": print}, folder / "training_args.bin")
    return paths


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards(suffix: str, index: bool, official, tmp_path) -> None:
    run, sizes = official("toast_vit")
    paths = shards(weights(run), tmp_path / "shards", suffix, index)
    for source in [tmp_path / "shards", *(tmp_path / "shards").glob("*.index.json")]:
        model = toast.load_official(plain_vit(sizes), source)
        torch.testing.assert_close(model(run["input"]), run["logits"], rtol=0, atol=1e-9)
    paths[1].write_bytes(paths[1].read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"{paths[1].name} is damaged"):
        toast.load_official(plain_vit(sizes), tmp_path / "shards")
    paths[1].unlink()
    with pytest.raises(ValueError, match=f"{paths[1].name} does not exist"):
        toast.load_official(plain_vit(sizes), tmp_path / "shards")


def test_bad_folders_and_indices(tmp_path) -> None:
    def refused(message: str, source: Path = tmp_path) -> None:
        with pytest.raises(ValueError, match=message):
            toast.load_official(vit(), source)

    refused("holds no checkpoint: needs an .index.json or files that end in .safetensors")
    save_file({"prompt": torch.zeros(2)}, tmp_path / "a.safetensors")
    save_file({"prompt": torch.zeros(2)}, tmp_path / "b.safetensors")
    refused("prompt is in two shards, .*a.safetensors and .*b.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    for text, message in (
        ("{", "is not an index of shards"),
        ("[]", "is not an index of shards"),
        ('{"weight_map": {"prompt": 3}}', "is not an index of shards"),
        ('{"weight_map": {"prompt": "../a.safetensors"}}', "outside of its folder"),
        ('{"weight_map": {"extra": "a.safetensors"}}', "not in their shard: extra in a.safetensors"),
        ('{"weight_map": {"extra": "c.safetensors"}}', "c.safetensors does not exist"),
    ):
        index.write_text(text)
        refused(message)
        refused(message, index)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_one_tensor_is_read_at_a_time(suffix: str, official, tmp_path, monkeypatch) -> None:
    run, sizes = official("toast_vit")
    shards(weights(run), tmp_path / "shards", suffix, index=False)
    reader = reading._Safetensors if suffix == ".safetensors" else reading._Pickled
    monkeypatch.setattr(reading, "_BYTES_MAPPED", 10_000)
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def counted(self: reading.Checkpoint, name: str, take=reader.take) -> Tensor:
        nonlocal most
        # A view of its own: what stands for the mapped file may live on, it holds nothing in memory.
        tensor = take(self, name).view_as(run["weight." + name])
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(reader, "take", counted)
    model = toast.load_official(plain_vit(sizes), tmp_path / "shards")
    assert len(alive) == len(weights(run))
    assert most == 1
    torch.testing.assert_close(model(run["input"]), run["logits"], rtol=0, atol=1e-9)


def test_files_from_before_torch_1_6(official, tmp_path) -> None:
    run, sizes = official("toast_vit")
    torch.save(weights(run), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    model = toast.load_official(plain_vit(sizes), tmp_path / "old.pth")
    torch.testing.assert_close(model(run["input"]), run["logits"], rtol=0, atol=1e-9)


def test_wrappers_before_the_names(official) -> None:
    run, sizes = official("toast_lite_vit")
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in weights(run).items()}
    model = toast.load_official(plain_vit(sizes), wrapped)
    torch.testing.assert_close(model(run["input"]), run["logits"], rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match=r"two names, module\.prompt and prompt"):
        toast.load_official(vit(), {"module.prompt": torch.zeros(24), "prompt": torch.zeros(24)})


EVERY = (".safetensors", ".pth", None)


def spoilt(tensor: Tensor, fault: str) -> Tensor:
    if fault == "sparse":
        return tensor.to_sparse()
    if fault == "meta":
        return tensor.to("meta")
    if fault == "not finite":
        return torch.full_like(tensor, float("inf"))
    return tensor.to(torch.int64)


@pytest.mark.parametrize("name", ["prompt", "decoders.1.linear.weight", "blocks.1.attn.qkv.weight"])
@pytest.mark.parametrize(
    ("suffix", "fault", "message"),
    [
        *((suffix, "not finite", "holds values that are not finite") for suffix in EVERY),
        *((suffix, "whole", "is of type torch.int64; needs floating-point numbers") for suffix in EVERY),
        # safetensors holds dense tensors alone
        *((suffix, "sparse", "is of the layout torch.sparse_coo; needs a dense") for suffix in EVERY[1:]),
        *((suffix, "meta", r"is without values \(meta\)") for suffix in EVERY[1:]),
    ],
)
def test_wrong_values_are_refused_before_anything_changes(
    suffix: str | None, name: str, fault: str, message: str, official, tmp_path
) -> None:
    run, sizes = official("toast_vit")
    state = {n: t.contiguous() for n, t in weights(run).items()}
    state[name] = spoilt(state[name], fault)
    source = tmp_path / f"official{suffix}"
    if suffix == ".safetensors":
        save_file(state, source)
    elif suffix == ".pth":
        torch.save(state, source)
    where = "the checkpoint" if suffix is None else str(source)
    with refused(model := plain_vit(sizes), f"{re.escape(where)}: {name} {message}"):
        toast.load_official(model, state if suffix is None else source)
    if "blocks" not in name:  # the backbone is not imported
        with pytest.raises(ValueError, match=f"{name} (is|holds) "):
            import_official(state if suffix is None else source, tmp_path / "adapter", kind="vision")
        assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (3.0, "holds no state dict: needs names to tensors; it is a float"),
        ({3: torch.zeros(2)}, "holds no state dict: needs names to tensors; at 3 it holds a Tensor"),
        ({"prompt": 3.0}, "holds no state dict: needs names to tensors; at 'prompt' it holds a float"),
        ({"prompt": torch.tensor(3.0)}, "does not fit this model|does not show its sizes"),
        ({"decoders.0.linear.lora_A": torch.tensor(3.0)}, r"lora_A is of shape \(\); needs two dimensions"),
    ],
)
@pytest.mark.parametrize(
    "read", [toast.load_official, lambda _, p: import_official(p, p.parent / "a", kind="vision")]
)
def test_what_is_no_checkpoint_names_its_file(held: object, message: str, read, tmp_path) -> None:
    torch.save(held, tmp_path / "official.pth")
    with refused(model := vit(), f"official.pth.*({message})"):
        read(model, tmp_path / "official.pth")


def test_a_quantised_backbone_is_refused_before_anything_changes(official) -> None:
    run, sizes = official("toast_vit")
    model = plain_vit(sizes)
    weight = model.blocks[1].attn.qkv.weight
    model.blocks[1].attn.qkv.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with refused(model, "blocks.1.attn.qkv.weight is quantised .*quantise or offload afterwards"):
        toast.load_official(model, weights(run))
    top_down = {n: t for n, t in weights(run).items() if n.startswith(("prompt", "top_down", "decoders"))}
    toast.load_official(model, top_down)
