"""The probe tells models that keep packed documents apart from those that do not."""

from __future__ import annotations

import pytest
import torch

import toast
from tests.data.language.wording import tokenizer
from tests.models import VOCABULARY, awaken, decoder
from toast.data.language import leaks


@pytest.mark.parametrize("manner", ["plain", "steered"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_documents_are_kept_apart_without_a_cache_alone(kind: str, attention: str, manner: str) -> None:
    model = decoder(kind)
    model.set_attn_implementation(attention)
    model = model if manner == "plain" else awaken(toast.wrap(model))
    model.train()
    assert not leaks(model, VOCABULARY)
    assert leaks(model, VOCABULARY, use_cache=True)
    assert model.training


def test_an_attention_mask_hides_the_documents() -> None:
    assert leaks(decoder(), VOCABULARY, attention_mask=torch.ones(1, 16, dtype=torch.long))


def test_the_probe_sees_a_faint_leak_of_small_weights_in_half_precision() -> None:
    model = decoder(dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.2)
    assert not leaks(model, VOCABULARY)
    assert leaks(model, VOCABULARY, use_cache=True)


def test_a_model_without_position_ids_leaks() -> None:
    """ALiBi counts from the beginning of the row."""
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=24, n_layer=2, n_head=3))
    assert leaks(model.eval(), VOCABULARY)


def test_experts_that_are_chosen_by_token_are_no_leak() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    model = MixtralForCausalLM(config).float().eval()
    assert not leaks(model, VOCABULARY)
    assert leaks(model, VOCABULARY, use_cache=True)


def test_the_vocabulary_may_be_a_tokenizer() -> None:
    words = tokenizer()
    assert not leaks(decoder(vocab_size=len(words)), words)
