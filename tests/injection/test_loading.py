"""Loading changes nothing that it was not asked to change, whichever library loads, whatever it fails at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import toast
from tests.adapters import (
    EMBEDDING,
    FAULTS,
    FILE,
    add_to_base,
    base,
    by_peft,
    by_peft_without_memory,
    by_transformers,
    change,
    cut,
    flip,
    lose,
    output,
    poison,
    rename,
    retype,
    saved,
)
from tests.models import awaken, decoder, tokens
from tests.snapshots import refused, structure

ROUTES = pytest.mark.parametrize("route", [by_peft, by_peft_without_memory, by_transformers])


@ROUTES
@pytest.mark.parametrize("fault", FAULTS)
def test_a_refused_folder_leaves_the_base_as_it_was(route, fault: str, tmp_path) -> None:
    spoil, message = FAULTS[fault]
    good, bad = saved(tmp_path / "good"), saved(tmp_path / "bad")
    spoil(bad)
    model = base()
    with refused(model, message):
        route(model, bad)
    assert torch.equal(output(route(model, good)), output(by_peft(base(), good)))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_refused_folder_leaves_a_wrapped_model_as_it_was(fault: str, tmp_path) -> None:
    spoil, message = FAULTS[fault]
    spoil(saved(tmp_path))
    model = awaken(toast.wrap(base()))
    with refused(model, message):
        model.load_adapter(tmp_path, "second")
    with refused(model, message):  # into the adapter that is there, as Trainer does it
        model.load_adapter(tmp_path, "default")
    assert list(model.peft_config) == ["default"]


def test_a_subfolder_is_checked_too(tmp_path) -> None:
    cut(saved(tmp_path / "inner"))
    with refused(model := base(), f"inner/{FILE} is damaged"):
        peft.PeftModel.from_pretrained(model, tmp_path, subfolder="inner")
    with refused(model, f"inner/{FILE} is damaged"):
        model.load_adapter(tmp_path, adapter_kwargs={"subfolder": "inner"})


@pytest.mark.parametrize("route", [by_peft, by_transformers])
def test_what_fails_after_the_check_is_undone(route, tmp_path, monkeypatch) -> None:
    saved(tmp_path)
    model = base()
    monkeypatch.setattr("toast.injection.fitting.check_file", lambda *_: None)
    fail: Any = lambda *_, **__: 1 / 0  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr("peft.peft_model.load_peft_weights", fail)
        patch.setattr(type(model), "_load_pretrained_model", staticmethod(fail))
        with refused(model, "division", ZeroDivisionError):
            route(model, tmp_path)
    route(model, tmp_path)


def test_a_failure_of_another_method_is_left_to_it(tmp_path) -> None:
    peft.get_peft_model(base(), peft.LoraConfig()).save_pretrained(tmp_path)
    lose(tmp_path)
    model = base()
    with pytest.raises(ValueError, match="Repo id"):
        by_peft(model, tmp_path)
    assert any("lora_A" in name for name, _ in model.named_parameters())


def in_a_cache(folder: Path, cache: Path) -> str:
    """Lays an adapter out as one of a hub that was fetched before; returns its name there."""
    place = cache / "models--some--adapter"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    (place / "snapshots").mkdir()
    folder.rename(place / "snapshots" / ("0" * 40))
    return "some/adapter"


def hub_by_peft(model: Any, name: str, cache: Path) -> Any:
    return peft.PeftModel.from_pretrained(model, name, cache_dir=str(cache))


def hub_by_transformers(model: Any, name: str, cache: Path) -> Any:
    model.load_adapter(name, adapter_kwargs={"cache_dir": str(cache)})
    return model


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (rename, "1 missing: model.norm.toast_task_embedding; 1 unexpected: .*embeddings"),
        (add_to_base, "1 unexpected: model.layers.0.mlp.up_proj.weight"),
        (flip, "is damaged: the values of .* are not those that were saved"),
        (poison(float("nan")), f"{EMBEDDING} holds values that are not finite"),
        (retype(torch.bool), f"{EMBEDDING} is of type torch.bool"),
    ],
)
@pytest.mark.parametrize("route", [hub_by_peft, hub_by_transformers])
def test_an_adapter_of_a_hub_is_checked_too(route, spoil, message: str, tmp_path) -> None:
    good = in_a_cache(saved(tmp_path / "good", lora_rank=2), tmp_path / "one")
    model = route(base(), good, tmp_path / "one")
    assert torch.equal(output(model), output(by_peft(base(), next((tmp_path / "one").rglob("0" * 40)))))
    spoil(saved(tmp_path / "bad"))
    bad = in_a_cache(tmp_path / "bad", tmp_path / "two")
    with refused(fresh := base(), message):
        route(fresh, bad, tmp_path / "two")


def test_the_hooks_of_an_offloaded_base_stay(tmp_path) -> None:
    cut(saved(tmp_path / "adapter"))
    model = base()
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu",
              "model.rotary_emb": "cpu"}  # fmt: skip
    accelerate.dispatch_model(model, places, "cpu", offload_dir=tmp_path, force_hooks=True)
    parts = structure(model)
    with pytest.raises(ValueError, match=f"{FILE} is damaged"):
        by_peft(model, tmp_path / "adapter")
    assert structure(model) == parts


@pytest.mark.parametrize("safe", [True, False])
@ROUTES
def test_a_pickle_is_loaded_as_well(route, safe: bool, tmp_path) -> None:
    model = awaken(toast.wrap(base(), lora_rank=2))
    model.save_pretrained(tmp_path, safe_serialization=safe)
    assert (tmp_path / "adapter_model.bin").is_file() != safe
    assert torch.equal(output(route(base(), tmp_path)), output(model))


def test_a_flipped_bit_in_a_pickle_is_found(tmp_path) -> None:
    toast.wrap(base()).save_pretrained(tmp_path, safe_serialization=False)
    path = tmp_path / "adapter_model.bin"
    held = torch.load(path)
    held[EMBEDDING][3] += 1e-9
    torch.save(held, path)
    with refused(model := base(), r"adapter_model.bin is damaged: the values of .*task_embedding are not"):
        by_peft(model, tmp_path)


def test_what_was_converted_or_saved_before_there_were_checksums_is_loaded(tmp_path) -> None:
    saved(tmp_path)
    held = load_file(tmp_path / FILE)
    save_file({name: tensor.half() for name, tensor in held.items()}, tmp_path / FILE)
    by_peft(base(), tmp_path)
    change(tmp_path, lambda tensors: tensors[EMBEDDING].mul_(2))
    by_peft(base(), tmp_path)


def alike(**options: Any) -> Any:
    """A wrapped language model, always on the same base."""
    torch.manual_seed(1)
    return awaken(toast.wrap(decoder("llama"), **options)).eval()


def test_an_adapter_is_not_loaded_over_one_of_other_settings(tmp_path: Path) -> None:
    alike(select_from=1).save_pretrained(tmp_path / "read-below")
    model, x = alike(), tokens(2)
    before = model(input_ids=x, use_cache=False).logits
    with pytest.raises(ValueError, match=r"read-below.*select_from is 1; adapter 'default' .* has None"):
        model.load_adapter(str(tmp_path / "read-below"), "default")
    assert torch.equal(model(input_ids=x, use_cache=False).logits, before)
    model.load_adapter(str(tmp_path / "read-below"), "other")
    on = {}
    for name, scale in (("first", 0.1), ("second", 0.2)):
        awaken(alike(), scale=scale).save_pretrained(tmp_path / name)
        on[name] = alike(lora_rank=2, save_frozen=False, pretrained=str(tmp_path / name))
        on[name].save_pretrained(tmp_path / f"on-{name}")
    with pytest.raises(ValueError, match="feedback_checksum is"):
        on["first"].load_adapter(str(tmp_path / "on-second"), "default")
    on["first"].load_adapter(str(tmp_path / "on-first"), "default")


def test_a_second_adapter_that_steers_fewer_blocks_starts_from_a_pretuned_one(tmp_path: Path) -> None:
    model, x = alike(), tokens(2)
    model.save_pretrained(tmp_path)
    expected = toast.trace(model, input_ids=x, use_cache=False).signals[1:]
    model.add_adapter("upper", toast.ToastConfig(pretrained=str(tmp_path), steer_from=1))
    model.set_adapter("upper")
    found = toast.trace(model, input_ids=x, use_cache=False).signals
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))
