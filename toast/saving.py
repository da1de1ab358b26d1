"""What a saved adapter holds, and what is checked before one is loaded."""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from toast.config import ToastConfig
from toast.families import Anatomy
from toast.layer import ToastLayer
from toast.layouts import is_transposed

if TYPE_CHECKING:
    from peft import PeftModel

WEIGHTS = "adapter_model.safetensors"

# The frozen feedback of TOAST-Lite, in the names of a saved adapter: with factors beside it, it is `base_layer`.
_FEEDBACK = re.compile(r"(?P<map>.*\.toast_to_(?:state|signal))(?:\.base_layer)?\.weight$")
_CONTAINER = re.compile(r"\.toast_(task_embedding|channel_transform|to_state|to_signal)(?=\.|$)")


def save_adapter(model: PeftModel, folder: str | Path, **options: Any) -> Path:
    """Saves an adapter as `PeftModel.save_pretrained` does, but written beside the folder and then renamed.

    Args:
        model: The wrapped model.
        folder: Where the adapter goes; an earlier adapter there is replaced once the new one is complete.
        **options: Further options of `save_pretrained`.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as beside:
        fresh, old = Path(beside, "new"), Path(beside, "old")
        model.save_pretrained(str(fresh), **options)
        if folder.exists():
            shutil.move(folder, old)
        shutil.move(fresh, folder)
    return folder


def tensors_to_save(config: ToastConfig, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of one adapter; without the frozen feedback if the configuration names its source."""
    own = {name: tensor for name, tensor in state_dict.items() if _CONTAINER.search(name)}
    return own if config.save_frozen else {n: t for n, t in own.items() if not _is_frozen(n)}


def _is_frozen(name: str) -> bool:
    return _CONTAINER.search(name) is not None and ".base_layer." in name.rpartition(".toast_")[2]


def without_adapter_name(key: str, adapter: str) -> str:
    """Returns a model's key without the adapter's name, which stands behind each container of adapters."""
    head, marker, tail = key.rpartition(".toast_")
    if not marker:
        return (
            key.replace(f".{adapter}.", ".", 1) if f".{adapter}." in key else key.removesuffix(f".{adapter}")
        )
    parts = tail.split(".")
    return head + marker + ".".join(part for i, part in enumerate(parts) if part != adapter or i == 0)


def check_config(config: ToastConfig, anatomy: Anatomy) -> None:
    """Fills in what a configuration leaves to the model, and checks what it was made for.

    Raises:
        ValueError: If the adapter was made for another backbone, or reads a block that is not there.
    """
    blocks = len(anatomy.values)
    if config.select_from is not None and not 0 <= config.select_from < blocks:
        raise ValueError(f"select_from: needs a block from 0 to {blocks - 1}; got {config.select_from}.")
    config.select_features = config.select_features or anatomy.family.select_features  # type: ignore[assignment]
    config.family = anatomy.family.name
    here = fingerprint(anatomy)
    if config.backbone is not None:
        for name in ("family", "blocks", "width", "value_width"):
            if name in config.backbone and config.backbone[name] != here[name]:
                raise ValueError(
                    f"this adapter was made for another backbone: its {name.replace('_', ' ')} is "
                    f"{config.backbone[name]}, this model's {here[name]}."
                )
        if not _alike(config.backbone.get("weights"), here["weights"]):
            raise ValueError(
                "this adapter was made for a backbone with other weights (a few values of its value projections "
                "differ). Load the backbone that it was trained on, or, if the weights were changed on purpose, "
                "load the configuration with ToastConfig.from_pretrained, set backbone=None and pass it as config."
            )
    config.backbone = here


def fingerprint(anatomy: Anatomy) -> dict[str, Any]:
    """Says what an adapter is made for: family, blocks, widths, and 16 weights of the value projections.

    The weights are compared with a wide tolerance, so a base in another precision is still the same base.
    """
    weights: list[float] = []
    for projection in (anatomy.values[0], anatomy.values[-1]):
        weight = projection.weight
        assert isinstance(weight, Tensor)
        if weight.is_meta or not weight.dtype.is_floating_point or weight.ndim != 2:
            return _shapes(anatomy) | {"weights": None}
        rows = weight.detach()
        out = rows.shape[1] if is_transposed(projection) else rows.shape[0]
        rows = rows.T if is_transposed(projection) else rows
        row = rows[out - out // anatomy.layout.parts]
        picked = row[:: max(1, len(row) // 8)][:8].float()
        weights += [round(value, 6) for value in picked.tolist()]
    return _shapes(anatomy) | {"weights": weights}


def _shapes(anatomy: Anatomy) -> dict[str, Any]:
    width, value_width = anatomy.layout.widths(anatomy.values[0], anatomy.value_names[0])
    return {
        "family": anatomy.family.name,
        "blocks": len(anatomy.values),
        "width": width,
        "value_width": value_width,
    }


def _alike(saved: list[float] | None, here: list[float] | None) -> bool:
    if saved is None or here is None or len(saved) != len(here):
        return True
    a, b = torch.tensor(saved), torch.tensor(here)
    return bool((a - b).abs().max() <= 0.25 * a.std() + 1e-4)


def check_tensors(model: nn.Module, config: ToastConfig, adapter: str, tensors: dict[str, Tensor]) -> None:
    """Checks the tensors of a saved adapter against the model, before any is loaded.

    Raises:
        ValueError: If tensors are missing, unexpected or of another shape; it lists them.
    """
    expected = {
        f"{layer_name}.{name}": parameter
        for layer_name, layer in model.named_modules()
        if isinstance(layer, ToastLayer)
        for name, parameter in layer.named_parameters()
        if name.startswith("toast_") and adapter in name.split(".")
    }
    given = {name: tensor for name, tensor in tensors.items() if _CONTAINER.search(name)}
    missing = [n for n in expected if n not in given and (config.save_frozen or not _is_frozen(n))]
    unexpected = [n for n in given if n not in expected]
    misshapen = [
        f"{n} is {tuple(given[n].shape)}, needs {tuple(expected[n].shape)}"
        for n in expected
        if n in given and given[n].shape != expected[n].shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    found = [f"{len(names)} {what}: {_few(names)}" for what, names in problems.items() if names]
    if found:
        raise ValueError(f"the saved adapter does not fit this model; its tensors are {'; '.join(found)}.")


def _few(names: list[str], limit: int = 6) -> str:
    shown = ", ".join(sorted(names)[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def pretrained_tensors(config: ToastConfig, anatomy: Anatomy) -> dict[str, Tensor]:
    """Reads the pre-tuned adapter that a configuration stands on.

    Args:
        config: Its `pretrained` names the folder; the checksum is compared, or filled in if there is none.
        anatomy: The model that it has to fit.

    Returns:
        Tensors by their saved names; empty if nothing has to be read.

    Raises:
        ValueError: If the adapter is missing, damaged, of another shape, or not the one that was named.
    """
    if config.pretrained is None or (config.feedback_checksum is not None and config.save_frozen):
        return {}
    path = Path(config.pretrained, WEIGHTS)
    tensors = read_safetensors(path)
    tensors = {name: tensor for name, tensor in tensors.items() if _CONTAINER.search(name)}
    feedback = {name: tensor for name, tensor in tensors.items() if _FEEDBACK.match(name)}
    if len(feedback) != 2 * len(anatomy.values) or any("lora_" in name for name in tensors):
        raise ValueError(
            f"pretrained: {path} needs the full feedback of {len(anatomy.values)} blocks (a TOAST adapter that is "
            f"not Lite); it holds {len(feedback)} feedback maps."
        )
    widths = {tuple(tensor.shape) for tensor in feedback.values()}
    if widths != {(anatomy.width, anatomy.width)}:
        raise ValueError(
            f"pretrained: {path} has feedback maps of {sorted(widths)}; the model's width is {anatomy.width}."
        )
    digest = checksum(feedback)
    if config.feedback_checksum not in (None, digest):
        raise ValueError(
            f"pretrained: {path} is not the adapter that this one stands on: its feedback has checksum {digest}, "
            f"needed is {config.feedback_checksum}. Pass the right folder with pretrained='...'."
        )
    config.feedback_checksum = digest
    return tensors


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
        ValueError: If it is not there, cut off, or something else.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not there.")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}.") from error


def checksum(feedback: dict[str, Tensor]) -> str:
    """Returns the SHA-256 over the feedback maps in float32, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(feedback):
        match = _FEEDBACK.match(name)
        assert match is not None
        digest.update(match["map"].removeprefix("base_model.model.").encode())
        digest.update(feedback[name].detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_pretrained(model: nn.Module, adapter: str, tensors: dict[str, Tensor]) -> None:
    """Starts an adapter from the tensors of a pre-tuned one; under Lite the feedback becomes the frozen part."""
    if not tensors:
        return
    by_place = {}
    for name, tensor in tensors.items():
        layer, _, rest = name.removeprefix("base_model.model.").rpartition(".toast_")
        by_place[layer, "toast_" + rest.removesuffix(".weight")] = tensor
    for layer_name, layer in model.named_modules():
        if not isinstance(layer, ToastLayer):
            continue
        for container in layer.adapter_layer_names:
            held = getattr(layer, container)[adapter]
            tensor = by_place[layer_name, container]
            if isinstance(held, nn.Parameter):
                fresh = _like(held, tensor)
                getattr(layer, container)[adapter] = nn.Parameter(fresh, requires_grad=held.requires_grad)
            else:
                linear = held.base_layer if hasattr(held, "base_layer") else held
                fresh = _like(linear.weight, tensor)
                linear.weight = nn.Parameter(fresh, requires_grad=linear.weight.requires_grad)


def _like(parameter: Tensor, tensor: Tensor) -> Tensor:
    device = "cpu" if parameter.is_meta else parameter.device
    return tensor.to(device, parameter.dtype, copy=True)
