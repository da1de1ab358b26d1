"""What the functions that look return has a public name, and both can be had from `toast`."""

from __future__ import annotations

import inspect
from typing import get_type_hints

import pytest
import torch

import toast
from tests.models import images, vit
from tests.visual.seen import steer
from tests.visual.text.test_cells import tiny_tokenizer
from tests.visual.text.test_looking import plain_decoder
from tests.visual.text.test_looking import steer as steer_decoder


@pytest.mark.parametrize(
    ("function", "returned"),
    [("look", "AttentionMaps"), ("look_at_text", "TextAttentionMaps"), ("compare", "Comparison")],
)
def test_the_returned_type_is_public(function: str, returned: str) -> None:
    assert {function, returned} <= set(toast.__all__)
    assert get_type_hints(getattr(toast, function))["return"] is getattr(toast, returned)
    assert f"`toast.{function}`" in (inspect.getdoc(getattr(toast, returned)) or "").split("\n\n")[0]


def test_a_frozen_models_maps_can_be_had_by_themselves() -> None:
    x = images(2)
    maps = toast.look(steer(vit(), x), x)
    before = maps.before
    assert before is not None
    assert before.attention is maps.frozen
    assert (before.frozen, before.selection, before.signals, before.before) == (None, None, {}, None)
    assert torch.equal(before.on_patches, maps.frozen_on_patches)
    assert before.name == maps.name
    assert toast.look(vit(), x).before is None


def test_a_text_is_looked_at_without_drawing() -> None:
    maps = toast.look_at_text(steer_decoder(plain_decoder()), tiny_tokenizer(), "soup", answer=" hot")
    assert isinstance(maps, toast.TextAttentionMaps)
    assert maps.text.endswith("soup hot")
    assert maps.selection_weights.shape == maps.attention_change.shape == maps.token_ids.shape
    assert maps.second_attention.shape == (len(maps.tokens), len(maps.tokens))
