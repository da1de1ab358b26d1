"""Every way to call a wrapped model."""

from __future__ import annotations

import peft
import pytest
import torch

from tests.models import awaken
from tests.peft_contract.cases import BASES, EACH, FEW, VARIANTS, Case, output

#: transformers takes the last token of embedded inputs without looking for padding, of its own accord.
LAST_TOKEN = ("llama-classifier", "gpt2-classifier")

TEXTS = [case for case in EACH if case.is_text and case.name not in LAST_TOKEN]
GENERATING = [*(case for case in EACH if case.generates), *(Case("llama", variant) for variant in VARIANTS)]


@pytest.mark.parametrize("case", GENERATING, ids=str)
def test_generating(case: Case) -> None:
    model, ids = case.steered(), case.inputs()["input_ids"]
    options = {
        "max_new_tokens": 3,
        "do_sample": False,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    found = model.generate(input_ids=ids, **options)
    assert found.sequences.shape == (2, ids.shape[1] + 3)
    assert torch.equal(model.generate(ids, **options).sequences, found.sequences)
    torch.testing.assert_close(found.scores[0], output(model, {"input_ids": ids})[:, -1])
    with model.disable_adapter():
        plain = model.generate(input_ids=ids, **options)
    expected = case.base().generate(input_ids=ids, **options)
    assert torch.equal(plain.sequences, expected.sequences)
    assert torch.equal(plain.scores[0], expected.scores[0])
    assert not torch.allclose(found.scores[0], expected.scores[0])


@pytest.mark.parametrize("name", [name for name, (_, _, task) in BASES.items() if task == "CAUSAL_LM"])
def test_generating_in_half_precision(name: str) -> None:
    case = Case(name)
    model = awaken(peft.get_peft_model(case.base(torch.bfloat16), case.config())).eval()
    ids, mask = torch.tensor([[1, 1, 1], [2, 1, 2]]), torch.tensor([[1, 1, 1], [1, 0, 1]])
    assert model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2).shape == (2, 5)


@pytest.mark.parametrize("case", TEXTS, ids=str)
def test_embedded_inputs_are_the_same_as_tokens(case: Case) -> None:
    model, inputs = case.steered(), case.inputs()
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    expected = output(model, inputs)
    torch.testing.assert_close(output(model, {"inputs_embeds": embedded}), expected)


@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bases_in_half_precision(case: Case, dtype: torch.dtype, autocast: bool) -> None:
    base = case.base(dtype)
    model = awaken(peft.get_peft_model(base, case.config(), autocast_adapter_dtype=autocast), 0.1).eval()
    found = output(model, case.inputs(dtype=dtype))
    assert found.dtype == dtype
    assert found.isfinite().all()
