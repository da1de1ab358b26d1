"""Loading changes nothing that it was not asked to change, whichever library loads, whatever it fails at."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import toast
from tests.models import awaken, decoder, images, tokens, vit
from tests.snapshots import refused
from toast.config import ToastConfig

FILE, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
EMBEDDING = "base_model.model.model.norm.toast_task_embedding"


def base(**options: Any) -> Any:
    """The model that `saved` was made for."""
    torch.manual_seed(1)
    return decoder(**options)


def saved(folder: Path, model: nn.Module | None = None, **options: Any) -> Path:
    awaken(toast.wrap(base() if model is None else model, **options)).save_pretrained(folder)
    return folder


def by_peft(model: Any, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(model, folder)


def by_peft_without_memory(model: Any, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=True)


def by_transformers(model: Any, folder: Path) -> Any:
    model.load_adapter(folder)
    return model


ROUTES = pytest.mark.parametrize("route", [by_peft, by_peft_without_memory, by_transformers])


def output(model: Any) -> Tensor:
    torch.manual_seed(3)
    with torch.no_grad():
        return model(tokens()).logits


def change(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """Changes tensors behind the back of the configuration, whose checksums are taken out."""
    held = load_file(folder / FILE)
    edit(held)
    save_file(held, folder / FILE)
    settings = json.loads((folder / SETTINGS).read_text())
    del settings["checksums"]
    (folder / SETTINGS).write_text(json.dumps(settings))


def lose(folder: Path) -> None:
    (folder / FILE).unlink()


def replace_by_folder(folder: Path) -> None:
    (folder / FILE).unlink()
    (folder / FILE).mkdir()


def cut(folder: Path) -> None:
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-8])


def as_pickle(folder: Path, held: Any = None) -> None:
    torch.save(load_file(folder / FILE) if held is None else held, folder / "adapter_model.bin")
    (folder / FILE).unlink()


def cut_pickle(folder: Path) -> None:
    as_pickle(folder)
    path = folder / "adapter_model.bin"
    path.write_bytes(path.read_bytes()[:-400])


def pickle_code(folder: Path) -> None:
    as_pickle(folder, {EMBEDDING: print})


def rename(folder: Path) -> None:
    change(folder, lambda t: t.update({EMBEDDING + "s": t.pop(EMBEDDING)}))


def add_to_base(folder: Path) -> None:
    name = "base_model.model.model.layers.0.mlp.up_proj.weight"
    change(folder, lambda t: t.update({name: torch.ones(40, 24, dtype=torch.float64)}))


def flip(folder: Path, file: str = FILE) -> None:
    """Changes one bit of the last tensor: the lowest of a number, so that it stays finite."""
    data = bytearray((folder / file).read_bytes())
    data[-8] ^= 1
    (folder / file).write_bytes(data)


def poison(value: float) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        change(folder, lambda t: t[EMBEDDING].view(-1)[3:4].fill_(value))

    return edit


def retype(dtype: torch.dtype) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        change(folder, lambda t: t.update({EMBEDDING: t[EMBEDDING].to(dtype)}))

    return edit


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "lost": (lose, f"{FILE} is not there: the folder holds an adapter's configuration"),
    "folder": (replace_by_folder, f"{FILE} is a folder; needs a file of tensors"),
    "cut": (cut, f"{FILE} is damaged or no safetensors file"),
    "cut pickle": (cut_pickle, "adapter_model.bin is damaged, or holds more than tensors"),
    "code": (pickle_code, "adapter_model.bin is damaged, or holds more than tensors, which is refused"),
    "renamed": (rename, f"{FILE} .*1 missing: model.norm.toast_task_embedding; 1 unexpected: .*embeddings"),
    "base": (add_to_base, f"{FILE} .*1 unexpected: model.layers.0.mlp.up_proj.weight"),
    "flipped": (flip, f"{FILE} is damaged: the values of .* are not those that were saved.*'checksums' from"),
    "nan": (poison(float("nan")), f"{FILE}: {EMBEDDING} holds values that are not finite"),
    "infinite": (poison(-float("inf")), f"{FILE}: {EMBEDDING} holds values that are not finite"),
    "whole numbers": (retype(torch.int64), f"{FILE}: {EMBEDDING} is of type torch.int64; needs floating"),
    "truth values": (retype(torch.bool), f"{EMBEDDING} is of type torch.bool"),
    "complex": (retype(torch.complex64), f"{EMBEDDING} is of type torch.complex64"),
}


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


@pytest.mark.parametrize("route", [by_peft, by_transformers])
def test_what_fails_after_the_check_is_undone(route, tmp_path, monkeypatch) -> None:
    saved(tmp_path)
    model = base()
    monkeypatch.setattr("toast.checking.check_file", lambda *_: None)
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


def resized(folder: Path) -> Any:
    """Saves base and adapter with a larger vocabulary; returns how to load the base as it was."""
    from transformers import AutoModelForCausalLM

    base(dtype=torch.float32).save_pretrained(folder / "base")

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder / "base")

    model = load()
    model.resize_token_embeddings(40)
    nn.init.normal_(model.get_input_embeddings().weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that it saves the embeddings
        saved(folder / "adapter", model)
    return load


def test_a_resized_vocabulary_is_asked_for_before_the_base_is_changed(tmp_path) -> None:
    load = resized(tmp_path)
    model = load()
    message = r"embed_tokens.weight is \(40, 24\), needs \(37, 24\).*resize_token_embeddings"
    with refused(model, message):
        by_peft(model, tmp_path / "adapter")
    model.resize_token_embeddings(40)
    table = load_file(tmp_path / "adapter" / FILE)["base_model.model.model.embed_tokens.weight"]
    loaded = by_peft(model, tmp_path / "adapter")
    assert torch.equal(loaded.get_input_embeddings().weight, table)


def test_embeddings_that_peft_saved_are_covered_by_the_checksums(tmp_path) -> None:
    load = resized(tmp_path)
    path = tmp_path / "adapter" / FILE
    held = load_file(path)
    held["base_model.model.model.embed_tokens.weight"][2, 2] += 1
    save_file(held, path)
    model = load()
    model.resize_token_embeddings(40)
    with refused(model, "the values of .*embed_tokens.weight are not those"):
        by_peft(model, tmp_path / "adapter")


@pytest.mark.parametrize("what", ["head.weight", "head.bias"])
def test_a_head_with_a_flipped_bit_is_found(what: str, tmp_path) -> None:
    torch.manual_seed(1)
    awaken(toast.wrap(vit(), modules_to_save=["head"])).save_pretrained(tmp_path)
    held = load_file(tmp_path / FILE)
    held[f"base_model.model.{what}"].view(-1)[0] += 1e-9
    save_file(held, tmp_path / FILE)
    torch.manual_seed(1)
    with refused(model := vit(), f"the values of base_model.model.{what} are not those"):
        by_peft(model, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), None])
def test_a_head_of_no_numbers_is_refused(value: float | None, tmp_path) -> None:
    torch.manual_seed(1)
    awaken(toast.wrap(vit(), modules_to_save=["head"])).save_pretrained(tmp_path)
    name = "base_model.model.head.weight"
    if value is None:
        change(tmp_path, lambda tensors: tensors.update({name: tensors[name].long()}))
    else:
        change(tmp_path, lambda tensors: tensors[name][0, :1].fill_(value))
    torch.manual_seed(1)
    with refused(model := vit(), f"{name} (is of type torch.int64|holds values that are not finite)"):
        by_peft(model, tmp_path)


def test_a_head_may_count(tmp_path) -> None:
    def made() -> nn.Module:
        torch.manual_seed(1)
        model = vit()
        model.head = nn.Sequential(nn.BatchNorm1d(24), nn.Linear(24, 5)).double()
        return model.eval()

    model = toast.wrap(made(), modules_to_save=["head"])
    model.base_model.model.head.modules_to_save["default"][0].num_batches_tracked += 3
    model.save_pretrained(tmp_path)
    loaded = by_peft(made(), tmp_path)
    assert loaded.base_model.model.head.modules_to_save["default"][0].num_batches_tracked == 3
    peft.set_peft_model_state_dict(loaded, peft.get_peft_model_state_dict(model))


PRETUNED: dict[str, tuple[Callable[[Path], None], str]] = {
    name: FAULTS[name] for name in FAULTS if name not in ("lost", "renamed", "base")
} | {"lost": (lose, f"pretrained: .*{FILE} is not there")}


@pytest.mark.parametrize("fault", PRETUNED)
def test_a_spoilt_pretuned_adapter_is_refused(fault: str, tmp_path) -> None:
    spoil, message = PRETUNED[fault]
    spoil(saved(tmp_path))
    with refused(model := base(), message.removesuffix(".*'checksums' from")):
        toast.wrap(model, lora_rank=2, pretrained=tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", f"{SETTINGS} is damaged or no JSON"),
        ("[]", f"{SETTINGS} needs a JSON object"),
        ('{"steer_from": "x"}', f"{SETTINGS}: steer_from is 'x'"),
        ('{"backbone": 3}', f"{SETTINGS}: backbone is 3"),
    ],
)
def test_damaged_settings_of_a_pretuned_adapter_name_their_file(text: str, message: str, tmp_path) -> None:
    (saved(tmp_path) / SETTINGS).write_text(text)
    with refused(model := base(), message):
        toast.wrap(model, lora_rank=2, pretrained=tmp_path)


def test_tensors_in_memory_are_checked_too() -> None:
    model = awaken(toast.wrap(base()))
    held = peft.get_peft_model_state_dict(model)
    extra = held | {"base_model.model.model.norm.weight": torch.ones(24)}
    with refused(model, "1 unexpected: model.norm.weight"):
        peft.set_peft_model_state_dict(model, extra)
    with refused(model, f"{EMBEDDING} holds values that are not finite"):
        peft.set_peft_model_state_dict(model, held | {EMBEDDING: torch.full((24,), float("nan"))})


def test_transformers_checks_tensors_in_memory(tmp_path) -> None:
    model = awaken(toast.wrap(base(), lora_rank=2))
    held = peft.get_peft_model_state_dict(model)
    config = copy.deepcopy(model.peft_config["default"])
    plain = base()
    with refused(plain, "1 missing: model.norm.toast_task_embedding"):
        plain.load_adapter(
            peft_config=config, adapter_state_dict={n: t for n, t in held.items() if n != EMBEDDING}
        )
    plain.load_adapter(peft_config=config, adapter_state_dict=held)
    assert torch.equal(output(plain), output(model))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", f"{SETTINGS} is damaged or no JSON"),
        ("[]", f"{SETTINGS} needs a JSON object of settings; it holds a list"),
        ("{}", f"{SETTINGS} names no method of PEFT: needs text at 'peft_type'; got None"),
        ('{"peft_type": "TOAST", "lora_rank": "4"}', f"{SETTINGS}: lora_rank: needs"),
        (
            '{"peft_type": "TOAST", "backbone": {"width": [3]}}',
            f"{SETTINGS}: backbone: needs names and sizes|names",
        ),
        (
            '{"peft_type": "TOAST", "backbone": {"weights": "x"}}',
            f"{SETTINGS}: backbone: needs a list of numbers",
        ),
        ('{"peft_type": "TOAST", "checksums": ["x"]}', f"{SETTINGS}: checksums: needs None or a dictionary"),
        ('{"peft_type": "TOAST", "pretrained": 3, "lora_rank": 2}', f"{SETTINGS}: pretrained: needs"),
    ],
)
@pytest.mark.parametrize("route", [by_peft, by_transformers])
def test_damaged_settings_name_their_file(text: str, message: str, route, tmp_path) -> None:
    (saved(tmp_path) / SETTINGS).write_text(text)
    with refused(model := base(), message):
        route(model, tmp_path)


def test_settings_alone_name_their_file(tmp_path) -> None:
    (tmp_path / SETTINGS).write_text('{"peft_type": "TOAST", "init": "random"}')
    with pytest.raises(ValueError, match=f"{SETTINGS}: init: needs one of"):
        ToastConfig.from_pretrained(tmp_path)


def test_a_head_of_another_size_may_be_left_out(tmp_path) -> None:
    torch.manual_seed(1)
    awaken(toast.wrap(vit(), modules_to_save=["head"])).save_pretrained(tmp_path)
    torch.manual_seed(1)
    model = vit()
    model.head = nn.Linear(24, 7).double()
    with refused(model, r"head.weight is \(5, 24\), needs \(7, 24\)"):
        by_peft(model, tmp_path)
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
        loaded = peft.PeftModel.from_pretrained(model, tmp_path, ignore_mismatched_sizes=True)
    assert loaded(images()).shape == (4, 7)
