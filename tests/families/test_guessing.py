"""Models of no family row: guessed, proved, or refused with what is lacking."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import toast
from tests.models import awaken
from tests.zoo import build, example
from toast.families import table
from toast.families.guessing import guess
from toast.steering import find_steering


@pytest.fixture
def no_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every model is of an unknown family."""
    monkeypatch.setattr(table, "FAMILIES", [])
    monkeypatch.setattr("toast.families.anatomy.FAMILIES", [])
    yield


class Attention(nn.Module):
    """Self-attention of one head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (project(x)[:, None] for project in (self.to_q, self.to_k, self.to_v))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v)[:, 0])


class Block(nn.Module):
    """Attention behind a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = Attention(width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm(x))


class Own(nn.Module):
    """A transformer of nobody's library."""

    def __init__(self, width: int = 16, norms: int = 1) -> None:
        super().__init__()
        self.stem = nn.Linear(4, width)
        self.stack = nn.ModuleList(Block(width) for _ in range(3))
        for index in range(norms):
            setattr(self, f"norm{index}", nn.LayerNorm(width))
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.stack:
            x = block(x)
        return self.head(self.norm0(x)).mean(1)


@pytest.mark.usefixtures("no_rows")
@pytest.mark.parametrize("name", ["llama", "gemma2", "phi", "starcoder2", "vit", "dinov2", "timm-vit"])
def test_what_leaves_no_choice_is_found_and_proved(
    name: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with caplog.at_level(logging.WARNING):
        model = toast.wrap(build(name))
    assert "is of no known family" in caplog.text
    assert "proved" in caplog.text
    assert "NO" not in caplog.text
    pictures = "pixel_values" in example(name) or name == "timm-vit"
    assert (find_steering(model).family.kind == "vision") == pictures
    awaken(model)
    toast.save_adapter(model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(build(name), tmp_path / "adapter")
    x = example(name)
    with torch.no_grad():
        found, expected = (first(each(**x)) for each in (loaded, model))
    assert torch.equal(found, expected)


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@pytest.mark.usefixtures("no_rows")
@pytest.mark.parametrize("name", ["gpt-neox", "codegen", "bloom"])
def test_a_wrong_guess_is_refused_with_what_was_seen(name: str) -> None:
    model = build(name)
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"(?s)which is wrong:.*NOT PROVED.*NO .*register_family"):
        toast.wrap(model)
    assert dict(model.named_modules()) == before


def test_what_lacks_is_named() -> None:
    with pytest.raises(ValueError, match=r"Found: value=.*Not found: norm .several norms follow the blocks"):
        toast.wrap(Own(norms=2))
    with pytest.raises(ValueError, match=r"Not found: norm .no norm follows the blocks"):
        toast.wrap(Own(norms=0))
    with pytest.raises(
        ValueError, match=r"Not found: blocks .needs a single list of blocks; candidates are none"
    ):
        toast.wrap(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    with pytest.raises(
        ValueError, match=r"could not be verified: Own does not say what its inputs look like"
    ):
        toast.wrap(Own())
    with pytest.raises(ValueError, match=r"candidates are 'a.stack', 'b.stack'"):
        toast.wrap(nn.ModuleDict({"a": Own(), "b": Own()}))
    assert guess(Own()).fields == {
        "value": "attention.to_v", "layout": "separate", "trunk": "", "blocks": "stack", "norm": "norm0",
        "methods": ["forward"],
    }  # fmt: skip


def test_a_guess_needs_weights_to_be_proved() -> None:
    with torch.device("meta"):
        model = Own()
    with pytest.raises(ValueError, match=r"cannot be verified while weights are on the meta device"):
        toast.wrap(model)


def test_a_registered_family_is_known() -> None:
    trunk = f"{Own.__module__}.{Own.__qualname__}"
    row = toast.register_family("own", trunk, blocks="stack", value="attention.to_v", norm="norm0")
    try:
        model = toast.wrap(Own())
        assert find_steering(model).family is row
        assert toast.probe(model, torch.randn(2, 5, 4)).proved
        with pytest.raises(ValueError, match=r"there is a family 'own' already"):
            toast.register_family("own", trunk, blocks="stack", value="attention.to_v", norm="norm0")
    finally:
        table.FAMILIES.remove(row)
    with pytest.raises(ValueError, match=r"layout: needs one of separate, last_third"):
        toast.register_family("odd", trunk, blocks="b", value="v", norm="n", layout="first")
    with pytest.raises(ValueError, match=r"family: needs blocks, norm, value and may have .*got .*colour"):
        toast.register_family("odd", trunk, blocks="b", value="v", norm="n", colour="red")


def test_probing_needs_a_wrapped_model_and_inputs() -> None:
    with pytest.raises(ValueError, match=r"probe needs a model with an active TOAST adapter"):
        toast.probe(Own())
    anatomy = {"blocks": "stack", "value": "attention.to_v", "norm": "norm0"}
    with pytest.raises(ValueError, match=r"does not say what its inputs look like"):
        toast.probe(toast.wrap(Own(), anatomy=anatomy))
