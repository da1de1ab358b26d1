"""What a saved adapter holds."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft.utils import CONFIG_NAME, AuxiliaryTrainingWrapper
from torch import Tensor, nn

from toast.config import ToastConfig
from toast.families.layouts import is_plain
from toast.files.adapter_folder import PREFIX
from toast.files.atomic import named, replace_all
from toast.files.tensors import checksum
from toast.saving.card import CARD
from toast.saving.initial import without_initial
from toast.saving.names import CONTAINER, is_frozen, without_adapter_name

if TYPE_CHECKING:
    from peft import PeftModel


def save_adapter(model: PeftModel, folder: str | Path, **options: Any) -> Path:
    """Saves an adapter as `PeftModel.save_pretrained` does, but written beside the folder and then renamed.

    Args:
        model: The wrapped model.
        folder: Where the adapter goes. Its files replace those of an earlier one, each at once and only when
            all are written; other files there stay.
        **options: Further options of `save_pretrained`.

    Returns:
        The folder.

    Raises:
        ValueError: If the folder has no name.
    """
    folder = named(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as beside:
        if (folder / CARD).is_file():  # what others wrote there stays
            shutil.copy(folder / CARD, beside)
        model.save_pretrained(beside, **options)
        written = [path for path in Path(beside).rglob("*") if path.is_file()]
        # The configuration comes last: until it is there, nothing loads what is not complete.
        written.sort(key=lambda path: path.name == CONFIG_NAME)
        replace_all([(path, folder / path.relative_to(beside)) for path in written])
    return folder


def tensors_to_save(
    model: nn.Module, config: ToastConfig, adapter: str, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Returns the tensors of one adapter; without the frozen feedback if its source is named.

    Their checksums are left with the configuration, which is written beside them.

    Raises:
        ValueError: If this process does not hold them whole.
    """
    own = {name: tensor for name, tensor in state_dict.items() if CONTAINER.search(name)}
    if not config.save_frozen:
        own = {name: tensor for name, tensor in own.items() if not is_frozen(name)}
    _refuse_parts(own)
    own = without_initial(config, own)
    config.written = None  # type: ignore[misc]
    if all(is_plain(tensor) and not tensor.is_meta for tensor in own.values()):
        config.written = {  # type: ignore[misc]
            without_adapter_name(name, adapter).removeprefix(PREFIX): checksum(tensor)
            for name, tensor in (own | _of_modules_to_save(model, adapter, state_dict)).items()
        }
    return own


def _refuse_parts(own: dict[str, Tensor]) -> None:
    """Refuses tensors of which a process holds nothing or a part, as under ZeRO-3 and FSDP."""
    parts = [name for name, tensor in own.items() if not tensor.numel() or hasattr(tensor, "full_tensor")]
    if parts:
        what = "in parts" if own[parts[0]].numel() else "empty"
        raise ValueError(
            f"an adapter is saved whole; {len(parts)} of its {len(own)} tensors are {what} in this process, "
            f"first {parts[0]}: the model is sharded (FSDP, or DeepSpeed's ZeRO-3). Gather them in all "
            "processes and pass them on: model.save_pretrained(folder, state_dict=...). toast tune does."
        )


def _of_modules_to_save(model: nn.Module, adapter: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns what PEFT saves of the modules that are trained in full, by their saved names."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            for saved, key in module.adapter_state_dict_load_map(adapter).items():
                tensor = state_dict.get(f"{name}.{key}")
                if tensor is not None and is_plain(tensor) and not tensor.is_meta:
                    found[f"{name}.{saved}"] = tensor
    return found
