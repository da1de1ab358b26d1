"""What a method starts from: a pre-tuned adapter, an official checkpoint, a LoRA of another task."""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME
from torch import Tensor

from toast.files.adapter_folder import weights_of
from toast.files.json_files import read_json
from toast.files.shapes import refuse_misfits
from toast.files.tensors import TensorFile, refuse_values
from toast.training.method_config import refuse_missing

#: What decides how factors of given shapes act.
_SCALING = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")


def as_adapter(start: Path, folder: Path | None) -> Path:
    """Returns the folder of the TOAST adapter that is started from; official checkpoints become one.

    Args:
        start: An adapter's folder, that of a run, or an official checkpoint.
        folder: Where an official checkpoint is imported to.

    Raises:
        ValueError: If it is none of these, or an adapter of another method.
    """
    found = _adapter_in(start)
    if found is not None:
        _check_method(found, "TOAST", "toast")
        return found
    refuse_missing(start)
    if folder is None:
        raise ValueError(
            f"method.start: {start} is not an adapter's folder; import it with toast import-official."
        )
    from toast.official.importing import convert

    # Under a name of its own: a run that was refused before it began may have imported another one.
    files = [start] if start.is_file() else sorted(path for path in start.rglob("*") if path.is_file())
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    imported = folder / f"official-{zlib.crc32(repr((str(start.resolve()), states)).encode()):08x}"
    if not (imported / CONFIG_NAME).is_file():
        convert(start, imported, head=False)
    return imported


def start_lora(model: PeftModel, start: Path) -> None:
    """Takes over the factors of a LoRA that was tuned on another task, in place; the head stays as it is.

    Args:
        model: The model with a LoRA.
        start: Folder of the other one's adapter, or of its run.

    Raises:
        ValueError: If that is no LoRA, or one of another rank, scaling or on other modules.
    """
    found = _adapter_in(start)
    if found is None:
        raise ValueError(
            f"method.start: {start} is no folder of a LoRA adapter, or of a run with method lora."
        )
    _check_method(found, "LORA", "lora")
    saved, own = LoraConfig.from_pretrained(str(found)), model.peft_config["default"]
    for name in _SCALING:
        if getattr(saved, name) != getattr(own, name):
            raise ValueError(
                f"method.start: the LoRA in {found} has {name}={getattr(saved, name)!r}, this one "
                f"{getattr(own, name)!r}; needs the same (method.rank, method.options)."
            )
    file = TensorFile(weights_of(found))
    held = get_peft_model_state_dict(model, save_embedding_layers=False)
    wanted = {name: tensor for name, tensor in held.items() if ".lora_" in name}
    given: dict[str, Tensor] = {name: tensor for name, tensor in file.tensors() if ".lora_" in name}
    refuse_misfits(
        f"method.start: the LoRA in {found}",
        {name: tuple(tensor.shape) for name, tensor in wanted.items()},
        {name: tuple(tensor.shape) for name, tensor in given.items()},
    )
    refuse_values(f"method.start: {file.path}", given.items())
    with torch.no_grad():
        for name, tensor in wanted.items():  # these share the memory of the parameters
            tensor.copy_(given[name])


def _adapter_in(start: Path) -> Path | None:
    """Returns the folder of an adapter: this one, or that within the folder of a run."""
    return next((at for at in (start, start / "adapter") if (at / CONFIG_NAME).is_file()), None)


def _check_method(adapter: Path, kind: str, method: str) -> None:
    saved = read_json(adapter / CONFIG_NAME).get("peft_type")
    if saved != kind:
        raise ValueError(
            f"method.start: {adapter} is an adapter of method {str(saved).lower()}; {method} needs one of "
            "its own kind."
        )
