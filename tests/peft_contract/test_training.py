"""Exactly the adapter is trained."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, prepare_model_for_kbit_training
from torch import Tensor, nn

from tests.models import awaken
from tests.peft_contract.cases import Case, of_adapter, output, run, trainable
from tests.steered import set_checkpointing


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def train(model: Any, case: Case, steps: int = 2) -> None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        out = nn.functional.normalize(run(model, case.inputs()), dim=-1)
        (out.square() * torch.arange(out.shape[-1])).sum().backward()
        optimizer.step()
    model.eval()


def test_gradients_reach_the_adapter_and_nothing_else(case: Case) -> None:
    model = case.wrap().train()
    run(model, case.inputs()).sum().backward()
    assert gradients(model).keys() == trainable(model) == of_adapter(model)


def test_training_changes_the_adapter_and_nothing_else(each: Case, tmp_path) -> None:
    model = each.steered()
    before = copy.deepcopy(dict(model.named_parameters()))
    train(model, each)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == of_adapter(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(each.base(), tmp_path)
    assert torch.equal(output(loaded, each.inputs()), output(model, each.inputs()))


def test_a_loaded_adapter_is_trained_on(each: Case, tmp_path) -> None:
    each.steered().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(each.base(), tmp_path, is_trainable=True)
    assert trainable(model) == of_adapter(model)
    run(model, each.inputs()).sum().backward()
    assert gradients(model).keys() == of_adapter(model)


@pytest.mark.parametrize("name", ["gpt2", "timm-vit"])
def test_fewer_blocks_train_less(name: str, tmp_path) -> None:
    case = Case(name)
    counts = []
    for start in range(3):
        model = case.steered(steer_from=start)
        run(model, case.inputs()).sum().backward()
        assert gradients(model).keys() == of_adapter(model)
        counts.append(len(gradients(model)))
        model.save_pretrained(tmp_path / str(start))
        loaded = PeftModel.from_pretrained(case.base(), tmp_path / str(start))
        assert torch.equal(output(loaded, case.inputs()), output(model, case.inputs()))
    assert counts[0] > counts[1] > counts[2]


def test_checkpointing_changes_no_gradient(each: Case) -> None:
    plain, model = each.steered().train(), each.steered().train()
    model.load_state_dict(plain.state_dict())
    run(plain, each.inputs()).square().mean().backward()
    set_checkpointing(model.get_base_model())
    run(model, each.inputs()).square().mean().backward()
    assert gradients(model).keys() == gradients(plain).keys() == of_adapter(model)
    for name, expected in gradients(plain).items():
        torch.testing.assert_close(gradients(model)[name], expected, msg=name)


def test_reentrant_checkpointing_is_refused() -> None:
    case = Case("llama")
    model = case.steered().train()
    set_checkpointing(model.get_base_model(), use_reentrant=True)
    with pytest.raises((ValueError, RuntimeError), match=r"re-?entrant"):
        run(model, case.inputs()).sum().backward()


@pytest.mark.parametrize("variant", ["full", "lite", "partial"])
def test_preparing_for_training(variant: str) -> None:
    case = Case("llama", variant)
    base = prepare_model_for_kbit_training(case.base())
    assert not trainable(base)
    model = peft.get_peft_model(base, case.config())
    model.enable_input_require_grads()
    embedded = model.get_input_embeddings()(case.inputs()["input_ids"])
    assert embedded.requires_grad
    run(awaken(model).train(), case.inputs()).sum().backward()
    assert gradients(model).keys() == of_adapter(model)


def test_gradients_are_switched_by_adapter(few: Case) -> None:
    model = few.wrap("one")
    model.add_adapter("two", few.config(train=["task_embedding"]))
    one, two = of_adapter(model, "one"), of_adapter(model, "two")
    assert trainable(model) == one
    model.set_requires_grad("two")
    assert trainable(model) == one | two
    model.set_requires_grad(["one", "two"], requires_grad=False)
    assert not trainable(model)
    model.set_requires_grad(["one"])
    assert trainable(model) == one  # what is frozen by design stays so


@pytest.mark.parametrize("trained", [False, True])
def test_a_further_adapter_is_loaded_as_asked(few: Case, trained: bool, tmp_path) -> None:
    few.steered().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(few.base(), tmp_path, is_trainable=trained)
    expected = of_adapter(model) if trained else set()
    assert trainable(model) == expected
    model.load_adapter(tmp_path, "other", is_trainable=trained)
    assert trainable(model) == (expected | of_adapter(model, "other") if trained else set())
