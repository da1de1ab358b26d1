"""Files of tensors: read whole, or refused with the name of the file and of what is wrong."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from toast.families.layouts import is_plain
from toast.files.atomic import refuse_special
from toast.files.json_files import few


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
        ValueError: If it is not there, cut off, or something else.
    """
    refuse_special(path, "file of tensors")
    try:
        return load_file(path)  # type: ignore[no-any-return]
    except (SafetensorError, OSError) as error:
        raise ValueError(_DAMAGED.format(path, error)) from error


def unpickled(path: Path, mmap: bool = True) -> Any:
    """Reads what `torch.save` wrote; code in it is never run.

    Raises:
        ValueError: If it is not there, cut off, or holds more than tensors.
    """
    refuse_special(path, "file of tensors")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that sparse tensors, which are refused later, take a while
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises many kinds for files that are cut off, foreign or hold code
        raise ValueError(
            f"{path} is damaged, or holds more than tensors, which is refused: {error}"
        ) from error


def state_dict(held: object, what: str) -> dict[str, Tensor]:
    """Returns what was read if it is a state dict.

    Raises:
        ValueError: If it is something else; it says what.
    """
    if not isinstance(held, Mapping):
        raise ValueError(  # noqa: TRY004 - what was read is wrong, not the type of the argument
            f"{what} holds no state dict: needs names to tensors; it is a {type(held).__name__}."
        )
    for name, tensor in held.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(  # noqa: TRY004
                f"{what} holds no state dict: needs names to tensors; at {name!r} it holds a "
                f"{type(tensor).__name__}."
            )
    return dict(held)


class TensorFile:
    """A file of tensors whose header has been read.

    Args:
        path: A `.safetensors` file, or one of `torch.save`.

    Attributes:
        shapes: Shape of every tensor.

    Raises:
        ValueError: If it is not there or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held: dict[str, Tensor] | None = None
        if path.suffix != ".safetensors":
            self._held = state_dict(unpickled(path), str(path))
            self.shapes = {name: tuple(tensor.shape) for name, tensor in self._held.items()}
            return
        refuse_special(path, "file of tensors")
        try:
            with safe_open(path, "pt") as file:
                self.shapes = {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(_DAMAGED.format(path, error)) from error

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the tensors, one in memory at a time where the format allows it."""
        if self._held is not None:
            yield from self._held.items()
            return
        with safe_open(self.path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


def refuse_values(
    what: str,
    tensors: Iterable[tuple[str, Tensor]],
    floating: Callable[[str], bool] = lambda name: True,
    checksums: Mapping[str, str] | None = None,
    remedy: str = "",
) -> None:
    """Refuses tensors that cannot be weights, or are not what was written.

    Args:
        what: Where they are from, for messages.
        tensors: The tensors; they are read one after another.
        floating: Says by name whether a tensor has to be one of floating-point numbers; others, such as the
            number of batches that a norm has seen, may be anything finite.
        checksums: What `checksum` gave when they were written; a tensor that is not in it, or has another
            type by now, is not compared.
        remedy: What to do if one was changed on purpose.

    Raises:
        ValueError: If one is of another type, not finite, without values, or changed; it names the first.
    """
    changed = []
    for name, tensor in tensors:
        if not is_plain(tensor) or tensor.is_meta or tensor.layout != torch.strided:
            kind = "without values (meta)" if tensor.is_meta else f"of the layout {tensor.layout}"
            raise ValueError(f"{what}: {name} is {kind}; needs a dense tensor of numbers.")
        if floating(name) and not tensor.is_floating_point():
            raise ValueError(f"{what}: {name} is of type {tensor.dtype}; needs floating-point numbers.")
        if not is_finite(tensor):
            raise ValueError(
                f"{what}: {name} holds values that are not finite (NaN or infinite). Take an earlier "
                "checkpoint, or train again with a lower rate."
            )
        saved = (checksums or {}).get(name)
        if saved is not None and saved.partition(":")[0] == _type(tensor) and saved != checksum(tensor):
            changed.append(name)
    if changed:
        raise ValueError(
            f"{what} is damaged: the values of {few(changed)} are not those that were saved (their checksums "
            f"differ). Copy it again from where it was saved.{remedy}"
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinities."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    narrow = tensor.is_floating_point() and tensor.itemsize == 1  # float8 has hardly any operators
    return bool((tensor.float() if narrow else tensor).isfinite().all())


def checksum(tensor: Tensor) -> str:
    """Returns the type of a tensor and the CRC-32 over its bytes: `float32:0a1b2c3d`."""
    data: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{_type(tensor)}:{zlib.crc32(data):08x}"


def checksum_file(path: Path) -> str:
    """Returns the CRC-32 over a file."""
    found = 0
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            found = zlib.crc32(chunk, found)
    return f"{found:08x}"


_DAMAGED = "{} is damaged or not a safetensors file: {}."


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
