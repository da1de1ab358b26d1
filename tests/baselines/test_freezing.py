"""What is trained is what its group says, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import zoo
from tests.models import DEPTH, decoder, images, tokens, vit
from toast.baselines.freezing import PARTS, train_only


def names(groups: dict[str, list[str]]) -> list[str]:
    return sorted(name for members in groups.values() for name in members)


def moved(model: Any, **inputs: Tensor) -> list[str]:
    """The parameters that a step of gradient descent changes."""
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    out = model(**inputs)
    (out if isinstance(out, Tensor) else out.logits).square().sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()
    return sorted(name for name, p in model.named_parameters() if not torch.equal(p, before[name]))


@pytest.mark.parametrize("what", ["linear", "full", "partial", "bias"])
def test_a_step_moves_the_groups_and_nothing_else(what: str) -> None:
    model = vit("norm-pre")
    groups = train_only(model, what, freeze=1 if what == "partial" else 0)
    assert moved(model, x=images(2)) == names(groups)
    assert all(groups.values())


def test_groups_of_a_vit() -> None:
    model = vit("average-fc-norm", reg_tokens=2)
    full = train_only(model, "full")
    assert list(full) == ["embeddings", "blocks", "above", "head"]
    assert full["embeddings"] == [
        "cls_token",
        "reg_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
    ]
    assert full["above"] == ["fc_norm.weight", "fc_norm.bias"]
    assert names(full) == sorted(name for name, _ in model.named_parameters())
    assert train_only(model, "linear") == {"head": ["head.weight", "head.bias"]}
    bias = train_only(model, "bias")
    assert bias["head"] == ["head.weight", "head.bias"]
    assert all(name.endswith(".bias") and not name.startswith("head") for name in bias["bias"])
    assert len(bias["bias"]) == 1 + 6 * DEPTH + 1


@pytest.mark.parametrize("freeze", range(DEPTH + 1))
def test_partial_freezes_from_the_bottom(freeze: int) -> None:
    model = vit()
    groups = train_only(model, "partial", freeze=freeze)
    blocks = {int(name.split(".")[1]) for name in groups.get("blocks", [])}
    assert blocks == set(range(freeze, DEPTH))
    assert groups["norm"] == ["norm.weight", "norm.bias"]
    assert "embeddings" not in groups


def test_parts_between_blocks_go_with_the_upper_one() -> None:
    model = zoo.build("timm-swin")  # two stages of two blocks, the second begins with a reduction
    reduction = "layers.1.downsample.reduction.weight"
    assert reduction in train_only(model, "partial", freeze=2)["blocks"]
    assert reduction not in train_only(model, "partial", freeze=3)["blocks"]


@pytest.mark.parametrize("name", ["llama", "opt-post-norm", "bert", "modernbert", "siglip-vision", "llava"])
def test_transformers_groups_are_complete(name: str) -> None:
    model = zoo.build(name)
    full = train_only(model, "full")
    assert names(full) == sorted(key for key, _ in model.named_parameters())
    kept = train_only(model, "partial", freeze=3, head=())
    assert "blocks" not in kept
    assert not set(names(kept)) & set(full["embeddings"])
    if name == "opt-post-norm":
        assert kept["above"] == ["model.decoder.project_out.weight"]
    if name == "llava":
        assert any(key.startswith("model.vision_tower") for key in full["embeddings"])


def test_heads_by_name() -> None:
    model = vit("average-fc-norm")
    assert names(train_only(model, "linear", head=["fc_norm", "head"])) == [
        "fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight",
    ]  # fmt: skip
    for what in ("bias", "partial"):
        assert not {"head.weight", "head.bias"} & set(names(train_only(model, what, head=())))
    assert {"head.weight", "head.bias"} < set(names(train_only(model, "full", head=())))
    with pytest.raises(ValueError, match="linear: trains the head alone, and `head` names none"):
        train_only(model, "linear", head=())


@pytest.mark.parametrize("what", ["linear", "partial"])
def test_tied_heads_are_refused_where_the_embedding_stays_frozen(what: str) -> None:
    model = decoder("llama", tie_word_embeddings=True)
    before = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match=r"lm_head.weight is the same weight as model.embed_tokens.weight"):
        train_only(model, what)
    assert [parameter.requires_grad for parameter in model.parameters()] == before


def test_tied_heads_are_trained_in_full_or_left() -> None:
    model = decoder("llama", tie_word_embeddings=True)
    groups = train_only(model, "full")
    assert "head" not in groups
    assert "model.embed_tokens.weight" in groups["embeddings"]
    assert moved(model, input_ids=tokens()) == names(groups)
    kept = train_only(model, "partial", freeze=1, head=())
    assert list(kept) == ["blocks", "norm"]
    assert not model.lm_head.weight.requires_grad


def test_unknown_models_can_be_trained_in_full() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    assert train_only(model, "full") == {"model": ["0.weight", "0.bias", "1.weight", "1.bias"]}
    assert train_only(model, "bias", head="1") == {"bias": ["0.bias"], "head": ["1.weight", "1.bias"]}


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match=f"what: needs one of {', '.join(PARTS)}; got 'half'"):
        train_only(vit(), "half")
    with pytest.raises(ValueError, match=f"has {DEPTH} blocks, so needs 0 to {DEPTH}; got {DEPTH + 1}"):
        train_only(vit(), "partial", freeze=DEPTH + 1)
    with pytest.raises(ValueError, match="needs 0 to 3; got -1"):
        train_only(vit(), "partial", freeze=-1)
    with pytest.raises(ValueError, match="freeze: belongs to 'partial'"):
        train_only(vit(), "bias", freeze=1)
    with pytest.raises(ValueError, match="bias: LlamaForCausalLM has none"):
        train_only(decoder(), "bias")
    with pytest.raises(ValueError, match="prompts: VisionTransformer has none"):
        train_only(vit(), "prompts")
