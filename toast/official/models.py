"""Official TOAST and TOAST-Lite checkpoints, loaded into plain timm and transformers models."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from toast.config import ToastConfig
from toast.families.anatomy import find_anatomy
from toast.families.layouts import is_plain
from toast.files.shapes import refuse_misfits
from toast.files.tensors import refuse_values, state_dict, unpickled
from toast.official.naming import (
    Names,
    Place,
    Shape,
    backbone_names,
    check_top_down,
    flattened,
    official_shape,
    sort_names,
    spelled,
    variant,
)
from toast.saving.names import FACTORS, is_of_adapter
from toast.selector import ToastSelector
from toast.steering import find_steering
from toast.value import ToastValue
from toast.wrapping import wrap

# What PEFT puts into the names of wrapped modules; `modules_to_save` keeps two copies, both are filled.
_WRAPPED = re.compile(r"(?<=\.)(base_layer|original_module|modules_to_save\.[^.]+)\.")
# What trainers leave beside the weights, and how shards are numbered.
_COMPANIONS = re.compile(r"^(training_args|optimizer|scheduler|scaler|rng_state)")
_NUMBERED = re.compile(r"(?P<stem>.*)-(?P<shard>\d+)-of-(?P<count>\d+)$")
_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")

# Pages of a mapped file stay in memory until it is unmapped, so it is opened anew after so many bytes.
_BYTES_MAPPED = 64 * 2**20


def load_official(
    model: nn.Module, checkpoint: str | Path | Mapping[str, Tensor], **options: Any
) -> PeftModel:
    """Puts an official TOAST or TOAST-Lite state dict into a plain model.

    Tensors are read one at a time and copied into the model's own, so a file needs no second copy in memory.

    Args:
        model: The plain backbone: a timm ViT or ConvNeXt, or a Llama of transformers. It is wrapped in place.
        checkpoint: The state dict, or its file: `.safetensors`, or `.pth` / `.pt` / `.bin` read with
            `weights_only`, or the `.index.json` of its shards, or a folder of them. A file may nest it under
            `model`, `module` or `state_dict`. It holds the top-down module, and the backbone's weights either
            all or not at all.
        **options: Fields of `ToastConfig` that override the official variant, such as `lora_alpha`
            (official: 1).

    Returns:
        The wrapped model, in evaluation mode.

    Raises:
        ValueError: If keys are missing, unexpected or of another shape; it lists them. Also if a file is
            missing, damaged, or would run code, if a tensor is not one of finite numbers, or if the model is
            quantised. The model is as it was.
    """
    source = open_checkpoint(checkpoint)
    anatomy = find_anatomy(model)
    with naming_file(checkpoint):
        names = sort_names(source.shapes)
        check_top_down(source.shapes, names, anatomy)
        backbone = backbone_names(names, anatomy)
        own = model.state_dict()
        if backbone:
            _refuse_what_takes_no_copy(own)
            shapes = {spelled(n, anatomy): official_shape(n, t, anatomy) for n, t in own.items()}
            if "lm_head.weight" not in backbone and _tied(model):
                shapes.pop("lm_head.weight", None)
            given = {name: source.shapes[held] for name, held in backbone.items()}
            refuse_misfits("the checkpoint's backbone", shapes, given)
    whole = {  # of the numbers that a norm counts, and of indices
        backbone.get(spelled(name, anatomy))
        for name, tensor in own.items()
        if isinstance(tensor, Tensor) and not tensor.is_floating_point()
    }
    for held in [*backbone.values(), *names.top_down.values()]:
        refuse_values(source.where(held), [(held, source.peek(held))], lambda name: name not in whole)
    source = Flattened(source, names)

    config = ToastConfig.official(
        variant(anatomy, names.rank), **(({"lora_rank": names.rank} if names.rank else {}) | options)
    )
    wrapped = wrap(model, config)
    with torch.no_grad():
        # What stands around a module of the wrapped model shows in its name.
        for name, own_tensor in wrapped.get_base_model().state_dict().items():
            plain = spelled(_WRAPPED.sub("", name), anatomy)
            if not is_of_adapter(name) and plain in backbone:
                own_tensor.copy_(source.take(backbone[plain]).view_as(own_tensor))
        for place, parameter in parameters(wrapped, names.top_down).items():
            parameter.copy_(source.take(names.top_down[place]))
    return wrapped.eval()  # type: ignore[no-any-return]


@contextmanager
def naming_file(checkpoint: str | Path | Mapping[str, Tensor]) -> Iterator[None]:
    """Puts the name of the file before errors of a checkpoint."""
    try:
        yield
    except ValueError as error:
        if isinstance(checkpoint, Mapping) or str(checkpoint) in str(error):
            raise
        raise ValueError(f"{checkpoint}: {error}") from error


def _refuse_what_takes_no_copy(state: Mapping[str, Any]) -> None:
    """Refuses a backbone that is quantised, or whose weights are elsewhere."""
    for name, tensor in state.items():
        if not is_plain(tensor) or tensor.is_meta or tensor.dtype in (torch.int8, torch.uint8):
            what = "on the meta device" if getattr(tensor, "is_meta", False) else "quantised"
            raise ValueError(
                f"the model's {name} is {what} ({type(tensor).__name__}), so that the checkpoint's backbone "
                "cannot be copied into it. Load it into the plain model, and quantise or offload afterwards."
            )


class Checkpoint:
    """A state dict that is read one tensor at a time.

    Args:
        shapes: Shape of every tensor.
        held: The tensors, if they are in memory already.
    """

    def __init__(self, shapes: dict[str, Shape], held: Mapping[str, Tensor]) -> None:
        self.shapes = shapes
        self._held = held

    def take(self, name: str) -> Tensor:
        """Reads a tensor, on the CPU if it comes from a file; keep it no longer than it is needed."""
        return self.peek(name)

    def peek(self, name: str) -> Tensor:
        """Reads a tensor to look at, before any is taken."""
        return self._held[name]

    def where(self, name: str) -> str:
        """Returns the file that a tensor is in, for messages."""
        return "the checkpoint"


class _Safetensors(Checkpoint):
    """A safetensors file; each tensor is read from a mapping of its own."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with safe_open(path, "pt") as file:
                super().__init__({n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}, {})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged or not a safetensors file: {error}.") from error

    def peek(self, name: str) -> Tensor:
        with safe_open(self._path, "pt") as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]

    def where(self, name: str) -> str:
        return str(self._path)


class _Pickled(Checkpoint):
    """A file of `torch.save`; its tensors are backed by the file, which is mapped anew from time to time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # The format from before torch 1.6 cannot be mapped.
        self._mapped = zipfile.is_zipfile(path)
        self._taken = 0
        held = self._load()
        super().__init__({name: tuple(tensor.shape) for name, tensor in held.items()}, held)

    def peek(self, name: str) -> Tensor:
        if self._mapped and self._taken >= _BYTES_MAPPED:
            self._held, self._taken = {}, 0
            self._held = self._load()
        tensor = self._held[name]
        self._taken += tensor.numel() * tensor.itemsize
        return tensor

    def where(self, name: str) -> str:
        return str(self._path)

    def _load(self) -> Mapping[str, Tensor]:
        path = self._path
        loaded = unpickled(path, mmap=self._mapped)
        for key in ("model", "module", "state_dict"):
            if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
                loaded = loaded[key]
        return state_dict(loaded, f"{path} (itself, or under 'model', 'module' or 'state_dict')")


class _Sharded(Checkpoint):
    """Several files that hold one state dict."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._shards: dict[str, Checkpoint] = {}
        found: dict[str, Path] = {}
        for path in paths:
            shard = _open_file(path)
            for name in shard.shapes:
                if name in found:
                    raise ValueError(f"{name} is in two shards, {found[name]} and {path}; keep one of them.")
                found[name] = path
                self._shards[name] = shard
        super().__init__({name: shard.shapes[name] for name, shard in self._shards.items()}, {})

    def take(self, name: str) -> Tensor:
        return self._shards[name].take(name)

    def peek(self, name: str) -> Tensor:
        return self._shards[name].peek(name)

    def where(self, name: str) -> str:
        return self._shards[name].where(name)


class Flattened(Checkpoint):
    """A checkpoint whose feedback maps are read as linear maps also where they are convolutions.

    Args:
        source: The checkpoint.
        names: What its names mean.
    """

    def __init__(self, source: Checkpoint, names: Names) -> None:
        self._source = source
        self._maps = {held: place for place, held in names.top_down.items()}
        super().__init__(source.shapes | {held: self._shape(held) for held in self._maps}, {})

    def take(self, name: str) -> Tensor:
        """Reads a tensor; a convolution of the top-down module as the linear map that it is."""
        tensor = self._source.take(name)
        return flattened(tensor, self._maps[name]) if name in self._maps else tensor

    def peek(self, name: str) -> Tensor:
        """Reads a tensor as it is in the checkpoint."""
        return self._source.peek(name)

    def where(self, name: str) -> str:
        """Returns the file that a tensor is in, for messages."""
        return self._source.where(name)

    def _shape(self, name: str) -> Shape:
        return tuple(flattened(torch.empty(self._source.shapes[name], device="meta"), self._maps[name]).shape)


def open_checkpoint(checkpoint: str | Path | Mapping[str, Tensor]) -> Checkpoint:
    """Opens a state dict, its file, the index of its shards, or a folder of them; reads no tensor yet.

    Raises:
        ValueError: If a file is missing or damaged, or would run code; it names the file.
    """
    if isinstance(checkpoint, Mapping):
        held = state_dict(checkpoint, "the checkpoint")
        return Checkpoint({name: tuple(tensor.shape) for name, tensor in held.items()}, held)
    path = Path(checkpoint)
    if path.is_dir():
        # safetensors before pickles where a folder has both, as transformers does
        indices = sorted(path.glob("*.index.json"), key=lambda i: (".safetensors" not in i.name, i.name))
        return _open_index(indices[0]) if indices else _Sharded(_files(path))
    return _open_index(path) if path.suffix == ".json" else _open_file(path)


def _open_file(path: Path) -> Checkpoint:
    if not path.is_file():
        raise ValueError(f"{path} does not exist.")
    return _Safetensors(path) if path.suffix == ".safetensors" else _Pickled(path)


def _open_index(path: Path) -> Checkpoint:
    try:
        files: dict[str, str] = json.loads(path.read_text())["weight_map"]
        shards = sorted(set(files.values()))
        outside = [name for name in shards if Path(name).name != name]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not an index of shards: needs JSON with 'weight_map', from names of tensors to "
            f"names of files ({type(error).__name__}: {error})."
        ) from error
    if outside:
        raise ValueError(f"{path} names shards outside of its folder, which is refused: {outside}.")
    sharded = _Sharded(path.with_name(name) for name in shards)
    lost = sorted(f"{name} in {file}" for name, file in files.items() if name not in sharded.shapes)
    if lost:
        raise ValueError(f"{path} names tensors that are not in their shard: {', '.join(lost[:6])}.")
    return sharded


def _files(folder: Path) -> list[Path]:
    """Returns the files of a folder without an index that together hold its state dict."""
    for suffix in _SUFFIXES:
        files = sorted(p for p in folder.glob(f"*{suffix}") if not _COMPANIONS.match(p.name))
        for match in filter(None, (_NUMBERED.match(path.stem) for path in files)):
            count, digits = int(match["count"]), len(match["shard"])
            for shard in range(1, count + 1):
                needed = folder / f"{match['stem']}-{shard:0{digits}}-of-{match['count']}{suffix}"
                if needed not in files:
                    raise ValueError(f"{needed} does not exist; {count} shards are needed.")
        if files:
            return files
    raise ValueError(
        f"{folder} holds no checkpoint: needs an .index.json or files that end in {', '.join(_SUFFIXES)}."
    )


def _tied(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))


def parameters(wrapped: PeftModel, places: Iterable[Place]) -> dict[Place, nn.Parameter]:
    """Returns the parameters of a wrapped model that belong to places in the official top-down module.

    Feedback comes from the top, so what belongs to blocks below `steer_from` is left out.
    """
    steering = find_steering(wrapped)
    assert steering is not None
    values = {value.unit.number: value for value in steering.values}
    kept = [place for place in places if place[0] is None or place[0] in values]
    return {place: _parameter(steering.selector, values, place) for place in kept}


def _parameter(selector: ToastSelector, values: dict[int, ToastValue], place: Place) -> Any:
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
