"""A smaller model starts from the weights of a larger one of its family."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.layers import SwiGLUPacked
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

import toast
from tests.models import VOCABULARY, decoder, images, tokens, vit
from toast.families.anatomy import find_anatomy
from toast.families.tensor_axes import channel_counts, factors, find_tensor_axes, named_tensors
from toast.weight_selection import positions


def convnext(**options: Any) -> nn.Module:
    sizes = {"dims": (4, 8, 12, 16), "depths": (1, 1, 2, 1), "num_classes": 5} | options
    return random(timm.models.ConvNeXt(**sizes))


def hf_vit(**options: Any) -> nn.Module:
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3}
    config = ViTConfig(image_size=16, patch_size=4, num_labels=5, **(sizes | options))
    return random(ViTForImageClassification(config))


def random(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.double().eval()


def swiglu(**options: Any) -> nn.Module:
    return vit("registers-layer-scale", mlp_layer=SwiGLUPacked, **options)


def gemma() -> nn.Module:
    return decoder("gemma")


def wide() -> nn.Module:
    return vit(embed_dim=48)


def gpt2(**options: Any) -> nn.Module:
    sizes = {"n_embd": 24, "n_layer": 3, "n_head": 3, "vocab_size": VOCABULARY, "n_positions": 16}
    return random(GPT2LMHeadModel(GPT2Config(bos_token_id=1, eos_token_id=1, **(sizes | options))))


#: How to make a model, and the options of a larger one; the smaller one has the defaults.
PAIRS: dict[str, tuple[Any, dict[str, Any]]] = {
    "vit": (lambda **o: vit("qk-norm", **o), {"embed_dim": 64, "depth": 5, "num_heads": 4}),
    "swiglu": (swiglu, {"embed_dim": 48, "depth": 4, "num_heads": 6}),
    "convnext": (convnext, {"dims": (6, 12, 24, 32), "depths": (2, 1, 3, 1)}),
    "convnext-grn": (lambda **o: convnext(use_grn=True, ls_init_value=None, conv_mlp=True, **o),
                     {"dims": (8, 16, 24, 32)}),
    "hf-vit": (hf_vit, {"hidden_size": 48, "intermediate_size": 50, "num_attention_heads": 6}),
    "llama-grouped": (
        lambda **o: decoder("llama", **({"num_key_value_heads": 1} | o)),
        {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 4},
    ),
    "qwen3": (
        lambda **o: decoder("qwen3", **o),
        {"hidden_size": 40, "head_dim": 16, "intermediate_size": 50},
    ),
    "gpt2": (gpt2, {"n_embd": 48, "n_head": 6}),
}  # fmt: skip


def run(model: Any) -> Tensor:
    torch.manual_seed(3)
    size = 64 if isinstance(model, timm.models.ConvNeXt) else 16
    out = model(tokens(2)) if hasattr(model, "generate") else model(images(2, size))
    return out if isinstance(out, Tensor) else out.logits


@pytest.mark.parametrize("name", PAIRS)
def test_the_same_channels_everywhere(name: str) -> None:
    """Permuting the teacher's channels leaves its function, and that of the student, as they are."""
    build, larger = PAIRS[name]
    torch.manual_seed(0)
    teacher, student = build(**larger), build()
    before = run(toast.select_weights(student, teacher, elements="consecutive"))
    assert run(teacher).std() > 1e-3
    assert before.std() > 1e-3
    permuted = permute(copy.deepcopy(teacher), student)
    assert permuted_parameters(permuted, teacher) > 0.8
    torch.testing.assert_close(run(permuted), run(teacher), rtol=1e-5, atol=1e-5)
    after = toast.select_weights(build(), permuted, elements="consecutive")
    torch.testing.assert_close(run(after), before, rtol=1e-5, atol=1e-5)


def permute(teacher: nn.Module, student: nn.Module) -> nn.Module:
    """Permutes the channels of each name among those that the student takes, and among the others."""
    counts, tensors = {}, {}
    for role, model in (("student", student), ("teacher", teacher)):
        anatomy = find_anatomy(model)
        row = find_tensor_axes(anatomy.family.name)
        tensors[role] = named_tensors(model, row)
        counts[role] = channel_counts(anatomy, row, tensors[role])
    orders: dict[str, Tensor] = {}
    for name, many in counts["teacher"].items():
        few = counts["student"][name]
        order = torch.cat([torch.randperm(few), few + torch.randperm(many - few)])
        fixed = name in ("2", "3", "pair")  # rotary embeddings know their channels
        orders[name] = torch.arange(many) if fixed else order
    shared = {id(each.tensor): name for name, each in tensors["teacher"].items()}
    for name in shared.values():
        each = tensors["teacher"][name]
        for dimension, axis in enumerate(each.axes):
            sizes = factors(name, axis, each.tensor.shape[dimension], counts["teacher"])
            parts = [
                (size, torch.arange(size) if part == "_" else orders[part])
                for part, size in zip(axis, sizes, strict=True)
            ]
            each.tensor.data = each.tensor.data.index_select(dimension, positions(parts))
    return teacher


def permuted_parameters(model: nn.Module, other: nn.Module) -> float:
    pairs = list(zip(model.parameters(), other.parameters(), strict=True))
    return sum(not torch.equal(*pair) for pair in pairs) / len(pairs)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("elements", ["uniform", "random"])
def test_a_student_as_large_is_the_teacher(name: str, elements: Any) -> None:
    build, larger = PAIRS[name]
    teacher = build(**larger)
    student = toast.select_weights(build(**larger), teacher, elements=elements, layers="uniform")
    assert torch.equal(run(student), run(teacher))


def test_heads_are_taken_whole_and_layers_as_asked() -> None:
    sizes = {"embed_dim": 48, "num_heads": 6, "depth": 6}
    teacher, student = vit(**sizes), vit()
    qkv = [block.attn.qkv.weight.view(3, 6, 8, 48)[:, ::2, :, ::2] for block in teacher.blocks]
    for layers, taken in (("first", (0, 1, 2)), ("uniform", (0, 2, 4))):
        toast.select_weights(student, teacher, layers=layers)
        for block, index in zip(student.blocks, taken, strict=True):
            assert torch.equal(block.attn.qkv.weight, qkv[index].reshape(72, 24))


def test_grouped_queries_stay_grouped_and_rotary_channels_pairs() -> None:
    build, _ = PAIRS["llama-grouped"]
    teacher = build(hidden_size=64, num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=3)
    student = build(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=4)
    toast.select_weights(student, teacher)
    few, many = student.model.layers[1].self_attn, teacher.model.layers[1].self_attn
    queries = many.q_proj.weight.view(4, 2, 2, 4, 64)[::2, :, :, ::2, ::2]
    assert torch.equal(few.q_proj.weight, queries.reshape(16, 32))
    assert torch.equal(
        few.k_proj.weight, many.k_proj.weight.view(4, 2, 4, 64)[::2, :, ::2, ::2].reshape(8, 32)
    )


def test_what_is_drawn_has_a_seed_and_spacing_reaches_the_end() -> None:
    teacher = vit(embed_dim=36)
    drawn = [
        toast.select_weights(vit(), teacher, elements="random", seed=seed).cls_token for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    spaced = toast.select_weights(vit(), teacher).cls_token
    assert torch.equal(spaced[..., [0, -1]], teacher.cls_token[..., [0, -1]])


def test_another_head_stays_as_it_is() -> None:
    student, teacher = vit(classes=4), vit(embed_dim=48)
    before = student.head.weight.clone()
    toast.select_weights(student, teacher)
    assert torch.equal(student.head.weight, before)
    assert torch.equal(student.norm.weight, teacher.norm.weight[::2])


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        (vit, vit, {"elements": "all"}, "elements: needs one of uniform, consecutive, random; got 'all'"),
        (vit, vit, {"layers": "last"}, "layers: needs one of first, uniform; got 'last'"),
        (vit, hf_vit, {}, "the student is a model of timm-vit, the teacher one of vit"),
        (gemma, gemma, {}, "axes of the tensors of 'gemma' are not known"),
        (lambda: vit(embed_dim=48), vit, {}, "cls_token does not fit: .* has 48 channels of 'width'"),
        (lambda: vit(depth=4), vit, {}, "the student has 4 layers in 'blocks', the teacher 3"),
        (lambda: vit(img_size=8), vit, {}, "pos_embed does not fit: .* 5 along axis 1, .* 17; .*resample"),
        (lambda: vit("no-value-bias"), vit, {}, "blocks.0.attn.qkv.bias is a tensor of the teacher that"),
        (vit, lambda: vit("no-value-bias"), {}, "blocks.0.attn.qkv.bias has no counterpart in the teacher"),
        (lambda: toast.wrap(vit()), vit, {}, "student: .* has a tensor 'base_model.model.*before adapters"),
        (vit, lambda: vit().to("meta"), {}, "teacher: cls_token has no values"),
        (lambda: vit(num_heads=6), wide, {}, "qkv.* does not fit: .* 6 channels of 'heads'"),
        (vit, lambda: vit(mlp_layer=SwiGLUPacked), {}, "fc1.weight does not fit: .* 1 along axis 0"),
    ],
)  # fmt: skip
def test_a_pair_that_does_not_fit(student: Any, teacher: Any, options: Any, message: str) -> None:
    model = student()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        toast.select_weights(model, teacher(), **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
