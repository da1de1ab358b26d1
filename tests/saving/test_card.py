"""The card beside an adapter has what the Hub searches, and code that loads the adapter as it is pasted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model

import toast
from tests.models import awaken, decoder, images, tokens
from toast.saving.card import CARD


def _timm(folder: Path) -> Any:
    """A tiny ViT that was opened from a folder, as others are from the Hub."""
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **sizes)
    timm.models.save_for_hf(model, folder, model_args=sizes)
    return timm.create_model(f"local-dir:{folder}", pretrained=True)


def _transformers(folder: Path) -> Any:
    decoder(dtype=torch.float32).save_pretrained(folder)
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(("opened", "inputs"), [(_timm, images), (_transformers, tokens)])
def test_the_code_in_the_card_loads_the_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: Any, inputs: Any
) -> None:
    model = awaken(toast.wrap(opened(tmp_path / "base"))).eval()
    toast.save_adapter(model, tmp_path / "adapter")
    text = (tmp_path / "adapter" / CARD).read_text()
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code) == 1 and "More Information Needed" not in text
    monkeypatch.chdir(tmp_path / "adapter")
    pasted: dict[str, Any] = {}
    exec(code[0], pasted)
    given = inputs()
    given = given.float() if given.is_floating_point() else given
    said, expected = pasted["model"](given), model(given)
    torch.testing.assert_close(
        said if isinstance(said, torch.Tensor) else said.logits,
        expected if isinstance(expected, torch.Tensor) else expected.logits,
    )


def test_tags_name_the_method_the_library_and_the_base_on_the_hub(tmp_path: Path) -> None:
    base = timm.create_model("test_vit.r160_in1k")
    model = toast.wrap(base, lora_rank=2)
    model.save_pretrained(tmp_path)
    data = ModelCard.load(tmp_path / CARD).data
    assert data.base_model == "timm/test_vit.r160_in1k" and data.library_name == "peft"
    assert {"toast", "peft", "timm", "arxiv:2305.15542", f"base_model:adapter:{data.base_model}"} <= {
        *data.tags
    }


def test_a_card_that_is_there_keeps_text_and_tags(tmp_path: Path) -> None:
    """As that of a trainer is, which PEFT updates when the model is saved."""
    (tmp_path / CARD).write_text("---\ntags:\n- sft\n- trl\n---\n\n# Mine\n\nWords of mine.\n")
    model = toast.wrap(decoder())
    for _ in range(2):
        toast.save_adapter(model, tmp_path)
    card = ModelCard.load(tmp_path / CARD)
    assert {"sft", "trl", "toast"} <= {*card.data.tags}
    assert "Words of mine." in card.text and card.text.count("## How to load it") == 1


def test_cards_of_other_methods_are_as_peft_writes_them(tmp_path: Path) -> None:
    get_peft_model(decoder(), LoraConfig(target_modules=["v_proj"])).save_pretrained(tmp_path)
    assert "toast" not in (tmp_path / CARD).read_text().lower()
