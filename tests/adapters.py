"""Saved adapters of a tiny language model, ways to load them, and ways to spoil them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import toast
from tests.models import awaken, decoder, tokens

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
    "lost": (lose, f"{FILE} does not exist: the folder holds an adapter's configuration"),
    "folder": (replace_by_folder, f"{FILE} is a folder; needs a file of tensors"),
    "cut": (cut, f"{FILE} is damaged or not a safetensors file"),
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
