"""The folder of a saved adapter, as PEFT lays it out: names of its files, and checksums of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from toast.files.tensors import TensorFile, checksum

#: Names of the files of tensors: the one that is written unless asked otherwise, and the other.
WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"

#: What PEFT puts before the names of the model.
PREFIX = "base_model.model."


def weights_of(folder: Path) -> Path:
    """Returns the file of tensors that PEFT would read from a folder; it may not be there."""
    if not (folder / WEIGHTS).exists() and (folder / PICKLED).exists():
        return folder / PICKLED
    return folder / WEIGHTS


def checksums_for(written: Mapping[str, str] | None, folder: Path) -> dict[str, str] | None:
    """Returns the checksums to write into a configuration, by the names of the tensors without PEFT's prefix.

    PEFT writes the tensors before the configuration, transformers after it. So the file in the folder is
    believed, with the embeddings that PEFT has added, if it holds what was to be saved.

    Args:
        written: The checksums of what was to be saved; None if they are not known.
        folder: Where the configuration goes.
    """
    before = None if written is None else dict(written)
    path = weights_of(folder)
    if not path.is_file():
        return before
    try:
        held = {name.removeprefix(PREFIX): checksum(tensor) for name, tensor in TensorFile(path).tensors()}
    except ValueError:
        return before
    return held if before is None or before.items() <= held.items() else before
