"""Official TOAST and TOAST-Lite checkpoints, loaded into plain timm and transformers models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from toast.config import ToastConfig
from toast.families import Anatomy, find_anatomy
from toast.layer import FACTORS, ToastSelector, ToastValue
from toast.model import find_steering
from toast.saving import read_safetensors
from toast.wrapping import wrap

# decoders.N.linear is this project's `to_state`, decoders.N.linear2 its `to_signal`.
_DECODER = re.compile(
    r"(?P<prefix>.*?)decoders\.(?P<block>\d+)\.(?P<map>linear2?)\.(?P<part>weight|lora_[AB])$"
)
_SELECTOR = re.compile(r"(?P<prefix>.*?)(?P<part>prompt|top_down_transform)$")
# What PEFT puts into the names of wrapped modules; `modules_to_save` keeps two copies, both are filled.
_WRAPPED = re.compile(r"(?<=\.)(base_layer|original_module|modules_to_save\.[^.]+)\.")
# Tables that old releases of transformers stored and newer ones compute.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$")


def load_official(
    model: nn.Module, checkpoint: str | Path | Mapping[str, Tensor], **options: Any
) -> PeftModel:
    """Puts an official TOAST or TOAST-Lite state dict into a plain model.

    Args:
        model: The plain backbone: a timm ViT or a Llama of transformers. It is wrapped in place.
        checkpoint: The state dict, or its file: `.safetensors`, or `.pth` / `.pt` / `.bin` read with
            `weights_only`. A file may nest it under `model` or `state_dict`. It holds the top-down module,
            and the backbone's weights either all or not at all.
        **options: Fields of `ToastConfig` that override the official variant, such as `lora_alpha`
            (official: 1).

    Returns:
        The wrapped model, in evaluation mode.

    Raises:
        ValueError: If keys are missing, unexpected or of another shape; it lists them, and the model is as it
            was. Also if the file is damaged, or would run code.
    """
    tensors = _tensors(checkpoint)
    anatomy = find_anatomy(model)
    top_down = {name: t for name, t in tensors.items() if _DECODER.match(name) or _SELECTOR.match(name)}
    backbone = {name: t for name, t in tensors.items() if name not in top_down and not _COMPUTED.search(name)}
    ranks = {t.shape[0] for name, t in top_down.items() if name.endswith("lora_A")}
    if len(ranks) > 1:
        raise ValueError(f"the checkpoint has LoRA factors of different ranks ({sorted(ranks)}); needs one.")
    rank = ranks.pop() if ranks else 0
    expected = _expected(anatomy, rank)
    found = {_place(name): t for name, t in top_down.items()}
    _compare(
        "top-down module",
        {_spelled(p): s for p, s in expected.items()},
        {_spelled(p): t for p, t in found.items()},
    )
    if backbone:
        own = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        if "lm_head.weight" not in backbone and _tied(model):
            own.pop("lm_head.weight", None)
        _compare("backbone", own, backbone)

    variant = anatomy.family.official + ("-lite" if rank else "")
    wrapped = wrap(model, ToastConfig.official(variant, **({"lora_rank": rank} | options)))
    if backbone:
        _load_backbone(wrapped, backbone)
    steering = find_steering(wrapped)
    assert steering is not None
    with torch.no_grad():
        for place, tensor in found.items():
            _parameter(steering.selector, steering.values, place).copy_(tensor)
    return wrapped.eval()  # type: ignore[no-any-return]


def _tensors(checkpoint: str | Path | Mapping[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(checkpoint, Mapping):
        return dict(checkpoint)
    path = Path(checkpoint)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if not path.is_file():
        raise ValueError(f"{path} is not there.")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for files that are cut off, foreign or hold code
        raise ValueError(
            f"{path} is damaged, or holds more than tensors, which is refused: {error}"
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise ValueError(
            f"{path} holds no state dict: needs names to tensors, or that under 'model' or 'state_dict'."
        )
    return dict(loaded)


_Place = tuple[int | None, str, str]


def _place(name: str) -> _Place:
    """Says where an official name belongs: block (None: selector), map, part."""
    if match := _DECODER.match(name):
        return int(match["block"]), match["map"], match["part"]
    match = _SELECTOR.match(name)
    assert match is not None
    return None, match["part"], ""


def _spelled(place: _Place) -> str:
    block, what, part = place
    return what if block is None else f"decoders.{block}.{what}.{part}"


def _expected(anatomy: Anatomy, rank: int) -> dict[_Place, tuple[int, ...]]:
    width = anatomy.width
    shapes: dict[_Place, tuple[int, ...]] = {
        (None, "prompt", ""): (width,),
        (None, "top_down_transform", ""): (width, width),
    }
    parts = {"weight": (width, width)} | ({"lora_A": (rank, width), "lora_B": (width, rank)} if rank else {})
    for block in range(len(anatomy.values)):
        shapes |= {
            (block, linear, part): shape for linear in ("linear", "linear2") for part, shape in parts.items()
        }
    return shapes


def _compare(what: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor]) -> None:
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    misshapen = [
        f"{name} is {tuple(found[name].shape)}, needs {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if tuple(found[name].shape) != tuple(expected[name])
    ]
    if missing or unexpected or misshapen:
        raise ValueError(
            f"the checkpoint's {what} does not fit the model. Missing: {missing or 'none'}. "
            f"Unexpected: {unexpected or 'none'}. Of another shape: {misshapen or 'none'}."
        )


def _tied(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))


def _load_backbone(wrapped: PeftModel, backbone: Mapping[str, Tensor]) -> None:
    """Copies the backbone's weights; what stands around a module of the wrapped model shows in its name."""
    for name, own in wrapped.get_base_model().state_dict().items():
        plain = _WRAPPED.sub("", name)
        if ".toast_" not in name and plain in backbone:
            own.copy_(backbone[plain])


def _parameter(selector: ToastSelector, values: list[ToastValue], place: _Place) -> Any:
    block, what, part = place
    adapter = selector.adapter
    assert adapter is not None
    if block is None:
        holder = selector.toast_task_embedding if what == "prompt" else selector.toast_channel_transform
        return holder[adapter]
    maps = values[block].toast_to_state if what == "linear" else values[block].toast_to_signal
    linear: Any = maps[adapter]
    if part == "weight":
        return (linear.base_layer if hasattr(linear, "base_layer") else linear).weight
    return getattr(linear, part)[FACTORS].weight
