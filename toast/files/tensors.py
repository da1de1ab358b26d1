"""Files of tensors and of settings: read whole, or refused with the name of the file and of what is wrong."""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from toast.families.layouts import is_plain
from toast.files.atomic import read_regular, refuse_special

Kinds = type | tuple[type, ...]
#: What a value of a JSON file may be; True and False are no numbers here, which they are in Python.
NUMBER: Kinds = (int, float)
#: In place of a key: all others.
OTHERS = "*"


def read_json(path: Path, keys: Mapping[str, Kinds] | None = None) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Args:
        path: The file.
        keys: Keys that have to be there, and of what type their values are.

    Raises:
        ValueError: If it is not there, cut off, no UTF-8, or holds something else: names the file, the line
            and what is wrong.
    """
    held = _parsed(read_regular(path, "JSON file"), str(path))
    if not isinstance(held, dict):
        raise ValueError(  # noqa: TRY004 - the file is wrong, not the type of the argument
            f"{path} needs a JSON object of settings; it holds {_named(held)}."
        )
    _refuse_keys(held, keys or {}, str(path))
    return held


def read_json_list(path: Path, kind: Kinds) -> list[Any]:
    """Reads a file that holds one JSON list.

    Args:
        path: The file.
        kind: Of what type its items are.

    Raises:
        ValueError: As `read_json`.
    """
    held = _parsed(read_regular(path, "JSON file"), str(path))
    wrong = [item for item in held if not _is_a(item, kind)] if isinstance(held, list) else [held]
    if not isinstance(held, list) or wrong:
        raise ValueError(f"{path} needs a JSON list of {_words(kind)}; it holds {_named(wrong[0])}.")
    return held


def read_json_lines(
    path: Path, keys: Mapping[str, Kinds] | None = None, may_be_cut: bool = False
) -> list[dict[str, Any]]:
    """Reads a file that holds a JSON object in each line.

    Args:
        path: The file.
        keys: As of `read_json`, of each line.
        may_be_cut: Whether a last line without an end, which an interruption has cut off, is left out.

    Raises:
        ValueError: As `read_json`.
    """
    *lines, last = read_regular(path, "file of JSON lines").split(b"\n")
    if last and not may_be_cut:
        lines.append(last)
    rows = []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        held = _parsed(line, where)
        if not isinstance(held, dict):
            raise ValueError(f"{where}: needs a JSON object; it holds {_named(held)}.")  # noqa: TRY004
        _refuse_keys(held, keys or {}, where)
        rows.append(held)
    return rows


def _parsed(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{where} is damaged or not JSON: line {line} is not in UTF-8 (byte 0x{data[error.start]:02x})."
        ) from error
    except (ValueError, RecursionError) as error:
        what = error if data.strip() else "it is empty"
        raise ValueError(f"{where} is damaged or not JSON: {what}.") from error


def _refuse_keys(held: dict[str, Any], keys: Mapping[str, Kinds], where: str) -> None:
    missing = [key for key in keys if key not in held and key != OTHERS]
    if missing:
        raise ValueError(f"{where} is damaged: {few(missing)} {'are' if missing[1:] else 'is'} not in it.")
    for key, value in held.items():
        kind = keys.get(key, keys.get(OTHERS, object))
        if not _is_a(value, kind):
            raise ValueError(f"{where} is damaged: {key} needs {_words(kind)}; it is {_named(value)}.")


def _is_a(value: Any, kind: Kinds) -> bool:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds or object in kinds)


def _words(kind: Kinds) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(dict.fromkeys(_WORDS.get(each, each.__name__) for each in kinds))


def _named(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, dict | list) else repr(value)[:60]


_WORDS = {
    dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", type(None): "null",
}  # fmt: skip


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


def few(names: Collection[str], limit: int = 6) -> str:
    """Returns names for a message, the first of them if there are many."""
    shown = ", ".join(sorted(names)[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


_DAMAGED = "{} is damaged or not a safetensors file: {}."


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
