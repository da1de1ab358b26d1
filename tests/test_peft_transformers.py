"""What transformers offers for adapters of PEFT, each with TOAST: its own methods, LoRA beside, Trainer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

import toast
from tests.models import awaken, decoder, images, tokens, vit
from tests.snapshots import refused
from toast.config import ToastConfig

second_adapter = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")


def output(model: Any, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(inputs).logits


def saved(folder: Path, base: nn.Module, **options: Any) -> Tensor:
    """Saves an adapter of a copy of the base; returns what the wrapped model gives for `tokens()`."""
    model = awaken(toast.wrap(copy.deepcopy(base), **options))
    model.save_pretrained(folder)
    torch.manual_seed(3)
    return output(model, tokens())


def same_tokens() -> Tensor:
    torch.manual_seed(3)
    return tokens()


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_load_adapter_equals_peft(kind: str, options, tmp_path) -> None:
    base = decoder(kind)
    expected = saved(tmp_path, base, **options)
    base.load_adapter(tmp_path)
    assert torch.equal(output(base, same_tokens()), expected)
    assert not any(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.usefixtures("adapters_of_transformers")
@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_loaded_adapter_is_disabled_enabled_and_deleted(kind: str, options, tmp_path) -> None:
    base = decoder(kind)
    frozen = output(base, same_tokens())
    expected = saved(tmp_path, base, **options)
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    base.load_adapter(tmp_path)
    base.disable_adapters()
    assert torch.equal(output(base, same_tokens()), frozen)
    base.enable_adapters()
    assert torch.equal(output(base, same_tokens()), expected)
    base.delete_adapter("default")
    assert torch.equal(output(base, same_tokens()), frozen)
    held = {name.replace(".base_layer.", "."): tensor for name, tensor in base.state_dict().items()}
    assert held.keys() == weights.keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in weights.items())
    base.load_adapter(tmp_path)
    assert torch.equal(output(base, same_tokens()), expected)


@pytest.mark.usefixtures("adapters_of_transformers")
def test_an_adapter_that_transformers_saves_is_the_same(tmp_path) -> None:
    base = decoder()
    twin = copy.deepcopy(base)
    base.add_adapter(ToastConfig(task_type="CAUSAL_LM"))
    awaken(base)
    base.save_pretrained(tmp_path)
    assert all(".toast_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = peft.PeftModel.from_pretrained(twin, tmp_path)
    assert torch.equal(output(loaded, same_tokens()), output(base, same_tokens()))


@pytest.mark.usefixtures("adapters_of_transformers")
def test_add_adapter_equals_peft() -> None:
    base = decoder()
    wrapped = peft.get_peft_model(copy.deepcopy(base), ToastConfig())
    base.add_adapter(ToastConfig())
    with torch.no_grad():
        for name, parameter in awaken(wrapped).named_parameters():
            base.get_parameter(name.removeprefix("base_model.model.")).copy_(parameter)
    assert torch.equal(output(base, same_tokens()), output(wrapped, same_tokens()))
    one = base.generate(same_tokens()[:1], max_new_tokens=5, do_sample=False)
    other = wrapped.generate(input_ids=same_tokens()[:1], max_new_tokens=5, do_sample=False)
    assert torch.equal(one, other)
    flags = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
    assert flags == {name for name, _ in base.named_parameters() if ".toast_" in name}


@pytest.mark.usefixtures("adapters_of_transformers")
@second_adapter
def test_several_adapters_switch_and_are_deleted(tmp_path) -> None:
    base = decoder()
    frozen = output(base, same_tokens())
    one = saved(tmp_path / "one", base)
    two = saved(tmp_path / "two", base, lora_rank=2, init="official")
    base.load_adapter(tmp_path / "one", "one")
    base.load_adapter(tmp_path / "two", "two")
    base.set_adapter("one")
    assert torch.equal(output(base, same_tokens()), one)
    base.set_adapter("two")
    assert torch.equal(output(base, same_tokens()), two)
    with refused(base, "one TOAST adapter can be active at a time, .*; got one, two"):
        base.set_adapter(["one", "two"])
    with pytest.warns(UserWarning, match="Setting active adapter to one"):
        base.delete_adapter("two")
    assert torch.equal(output(base, same_tokens()), one)
    base.delete_adapter("one")
    assert torch.equal(output(base, same_tokens()), frozen)


@pytest.mark.usefixtures("adapters_of_transformers")
@second_adapter
def test_an_adapter_in_memory_survives_loading_another(tmp_path) -> None:
    base = decoder()
    saved(tmp_path, base)
    base.add_adapter(ToastConfig(), "trained")
    expected = output(awaken(base), same_tokens())
    base.load_adapter(tmp_path, "other")
    base.set_adapter("trained")
    assert torch.equal(output(base, same_tokens()), expected)


@pytest.mark.usefixtures("adapters_of_transformers")
@second_adapter
def test_lora_on_the_queries_beside_toast() -> None:
    base = decoder()
    plain = copy.deepcopy(base)
    base.add_adapter(ToastConfig(), "steering")
    steered = output(awaken(base), same_tokens())
    base.add_adapter(
        peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], init_lora_weights=False), "low_rank"
    )
    with torch.no_grad():
        for theirs, ours in zip(base.model.layers, plain.model.layers, strict=True):
            q = theirs.self_attn.q_proj
            ours.self_attn.q_proj.weight += q.lora_B["low_rank"].weight @ q.lora_A["low_rank"].weight
    close = torch.testing.assert_close
    close(output(base, same_tokens()), output(plain, same_tokens()))  # adding LoRA made it the active one
    base.set_adapter("steering")
    assert torch.equal(output(base, same_tokens()), steered)
    base.set_adapter(["steering", "low_rank"])
    both = output(base, same_tokens())
    plain.add_adapter(ToastConfig(), "steering")
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if ".toast_" in name:
                parameter.copy_(base.get_parameter(name))
    close(both, output(plain, same_tokens()))
    assert not torch.allclose(both, steered)


@pytest.mark.usefixtures("adapters_of_transformers")
@second_adapter
def test_lora_around_a_steered_projection_acts_alone_or_is_refused() -> None:
    base = decoder()
    base.add_adapter(ToastConfig(), "steering")
    steered = output(awaken(base), same_tokens())
    base.add_adapter(
        peft.LoraConfig(r=2, lora_alpha=2, target_modules=["v_proj"], init_lora_weights=False), "low_rank"
    )
    plain = copy.deepcopy(base)
    plain.delete_adapter("steering")
    torch.testing.assert_close(output(base, same_tokens()), output(plain, same_tokens()))
    base.set_adapter("steering")
    assert torch.equal(output(base, same_tokens()), steered)
    base.set_adapter(["steering", "low_rank"])
    with refused(base, "adapter low_rank .* around the steered projection 'layers.0.self_attn.v_proj'"):
        base(same_tokens())


class Rows(torch.utils.data.Dataset):
    """Sentences of random tokens, each its own label."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        torch.manual_seed(index)
        row = tokens(1, 7)[0]
        return {"input_ids": row, "labels": row}


class Pictures(torch.utils.data.Dataset):
    """Random pictures with labels."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Any]:
        torch.manual_seed(index)
        return {"pixels": images(1)[0].float(), "labels": index % 5}


class Classifier(nn.Module):
    """Gives a classifier the interface that `Trainer` expects."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.model(pixels)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, report_to="none", use_cpu=True, seed=0,
        learning_rate=1e-2, disable_tqdm=True, logging_strategy="no", save_strategy="steps", save_steps=2,
        dataloader_pin_memory=False, **options,
    )  # fmt: skip


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_trainer_stops_and_resumes_as_if_it_had_not(tmp_path) -> None:
    base = decoder(dtype=torch.float32)
    runs = []
    for name in ("whole", "resumed"):
        torch.manual_seed(5)
        model = toast.wrap(copy.deepcopy(base), lora_rank=2)
        before = parameters(model)
        trainer = Trainer(model, arguments(tmp_path / name, max_steps=3), train_dataset=Rows())
        if name == "whole":
            trainer.train()
        else:
            trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
        runs.append(parameters(model))
    assert (tmp_path / "whole" / "checkpoint-2" / "adapter_model.safetensors").is_file()
    whole, resumed = runs
    for name, parameter in whole.items():
        torch.testing.assert_close(resumed[name], parameter, rtol=1e-5, atol=1e-6)
        frozen = ".toast_" not in name or "base_layer" in name.split(".toast_")[1]
        assert torch.equal(parameter, before[name]) == frozen, name


def test_trainer_trains_a_classifier(tmp_path) -> None:
    inner = toast.wrap(vit().float(), modules_to_save=["head"], init="official")
    model = Classifier(inner)
    before = parameters(model)
    options = arguments(tmp_path, max_steps=3, remove_unused_columns=False)
    result = Trainer(model, options, train_dataset=Pictures()).train()
    assert result.global_step == 3
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}
