"""Official TOAST and TOAST-Lite checkpoints, loaded into plain timm and transformers models."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from toast.anatomy import Anatomy, find_anatomy
from toast.config import ToastConfig
from toast.layer import FACTORS, ToastSelector, ToastValue
from toast.model import find_steering
from toast.wrapping import wrap

Shape = tuple[int, ...]

# decoders.N.linear is this project's `to_state`, decoders.N.linear2 its `to_signal`.
_DECODER = re.compile(
    r"(?P<prefix>(.*\.)?)decoders\.(?P<block>\d+)\.(?P<map>linear2?)\.(?P<part>weight|lora_[AB])$"
)
_SELECTOR = re.compile(r"(?P<prefix>(.*\.)?)(?P<part>prompt|top_down_transform)$")
# What data-parallel training, DeepSpeed and torch.compile put before every name.
_WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")
# What PEFT puts into the names of wrapped modules; `modules_to_save` keeps two copies, both are filled.
_WRAPPED = re.compile(r"(?<=\.)(base_layer|original_module|modules_to_save\.[^.]+)\.")
# Tables that old releases of transformers stored and newer ones compute.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$")
# What trainers leave beside the weights, and how shards are numbered.
_COMPANIONS = re.compile(r"^(training_args|optimizer|scheduler|scaler|rng_state)")
_NUMBERED = re.compile(r"(?P<stem>.*)-(?P<shard>\d+)-of-(?P<count>\d+)$")
_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")

# Pages of a mapped file stay in memory until it is unmapped, so it is opened anew after so many bytes.
_BYTES_MAPPED = 64 * 2**20

#: By family, what makes a model's name of a backbone's official name, where they differ.
RENAMED: dict[str, Callable[[str], str]] = {}


def load_official(
    model: nn.Module, checkpoint: str | Path | Mapping[str, Tensor], **options: Any
) -> PeftModel:
    """Puts an official TOAST or TOAST-Lite state dict into a plain model.

    Tensors are read one at a time and copied into the model's own, so a file needs no second copy in memory.

    Args:
        model: The plain backbone: a timm ViT or a Llama of transformers. It is wrapped in place.
        checkpoint: The state dict, or its file: `.safetensors`, or `.pth` / `.pt` / `.bin` read with
            `weights_only`, or the `.index.json` of its shards, or a folder of them. A file may nest it under
            `model`, `module` or `state_dict`. It holds the top-down module, and the backbone's weights either
            all or not at all.
        **options: Fields of `ToastConfig` that override the official variant, such as `lora_alpha`
            (official: 1).

    Returns:
        The wrapped model, in evaluation mode.

    Raises:
        ValueError: If keys are missing, unexpected or of another shape; it lists them, and the model is as it
            was. Also if a file is missing, damaged, or would run code.
    """
    source = open_checkpoint(checkpoint)
    anatomy = find_anatomy(model)
    names = sort_names(source.shapes)
    check_top_down(source, names, anatomy)
    backbone = model_names(names, anatomy)
    if backbone:
        own = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        if "lm_head.weight" not in backbone and _tied(model):
            own.pop("lm_head.weight", None)
        compare("backbone", own, {name: source.shapes[held] for name, held in backbone.items()})

    config = ToastConfig.official(
        variant(anatomy, names.rank), **(({"lora_rank": names.rank} if names.rank else {}) | options)
    )
    wrapped = wrap(model, config)
    with torch.no_grad():
        # What stands around a module of the wrapped model shows in its name.
        for name, own_tensor in wrapped.get_base_model().state_dict().items():
            plain = _WRAPPED.sub("", name)
            if ".toast_" not in name and plain in backbone:
                own_tensor.copy_(source.take(backbone[plain]))
        for place, parameter in parameters(wrapped, names.top_down).items():
            parameter.copy_(source.take(names.top_down[place]))
    return wrapped.eval()  # type: ignore[no-any-return]


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
        return self._held[name]


class _Safetensors(Checkpoint):
    """A safetensors file; each tensor is read from a mapping of its own."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with safe_open(path, "pt") as file:
                super().__init__({n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}, {})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged or no safetensors file: {error}.") from error

    def take(self, name: str) -> Tensor:
        with safe_open(self._path, "pt") as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]


class _Pickled(Checkpoint):
    """A file of `torch.save`; its tensors are backed by the file, which is mapped anew from time to time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # The format from before torch 1.6 cannot be mapped.
        self._mapped = zipfile.is_zipfile(path)
        self._taken = 0
        held = self._load()
        super().__init__({name: tuple(tensor.shape) for name, tensor in held.items()}, held)

    def take(self, name: str) -> Tensor:
        if self._mapped and self._taken >= _BYTES_MAPPED:
            self._held, self._taken = {}, 0
            self._held = self._load()
        tensor = self._held[name]
        self._taken += tensor.nbytes
        return tensor

    def _load(self) -> Mapping[str, Tensor]:
        path = self._path
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=self._mapped)
        except Exception as error:  # torch raises many kinds for files that are cut off, foreign or hold code
            raise ValueError(
                f"{path} is damaged, or holds more than tensors, which is refused: {error}"
            ) from error
        for key in ("model", "module", "state_dict"):
            if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
                loaded = loaded[key]
        if not isinstance(loaded, Mapping) or not all(isinstance(t, Tensor) for t in loaded.values()):
            raise ValueError(
                f"{path} holds no state dict: needs names to tensors, or that under 'model', 'module' or "
                "'state_dict'."
            )
        return loaded


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


def open_checkpoint(checkpoint: str | Path | Mapping[str, Tensor]) -> Checkpoint:
    """Opens a state dict, its file, the index of its shards, or a folder of them; reads no tensor yet.

    Raises:
        ValueError: If a file is missing or damaged, or would run code; it names the file.
    """
    if isinstance(checkpoint, Mapping):
        return Checkpoint({name: tuple(tensor.shape) for name, tensor in checkpoint.items()}, checkpoint)
    path = Path(checkpoint)
    if path.is_dir():
        # safetensors before pickles where a folder has both, as transformers does
        indices = sorted(path.glob("*.index.json"), key=lambda i: (".safetensors" not in i.name, i.name))
        return _open_index(indices[0]) if indices else _Sharded(_files(path))
    return _open_index(path) if path.suffix == ".json" else _open_file(path)


def _open_file(path: Path) -> Checkpoint:
    if not path.is_file():
        raise ValueError(f"{path} is not there.")
    return _Safetensors(path) if path.suffix == ".safetensors" else _Pickled(path)


def _open_index(path: Path) -> Checkpoint:
    try:
        files: dict[str, str] = json.loads(path.read_text())["weight_map"]
        shards = sorted(set(files.values()))
        outside = [name for name in shards if Path(name).name != name]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no index of shards: needs JSON with 'weight_map', from names of tensors to names of "
            f"files ({type(error).__name__}: {error})."
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
                    raise ValueError(f"{needed} is not there; {count} shards are needed.")
        if files:
            return files
    raise ValueError(
        f"{folder} holds no checkpoint: needs an .index.json or files that end in {', '.join(_SUFFIXES)}."
    )


Place = tuple[int | None, str, str]


@dataclass(frozen=True)
class Names:
    """What the names in a checkpoint mean.

    Args:
        top_down: By place in the top-down module, the name in the checkpoint.
        backbone: By official name of a backbone's tensor, the name in the checkpoint.
        prefix: What stands before the names of the top-down module, without wrappers.
        rank: Rank of the LoRA factors; 0 if there are none.
    """

    top_down: dict[Place, str]
    backbone: dict[str, str]
    prefix: str
    rank: int


def sort_names(shapes: Mapping[str, Shape]) -> Names:
    """Tells the top-down module from the backbone.

    Raises:
        ValueError: If two names mean the same tensor, or LoRA factors have different ranks.
    """
    top_down: dict[Place, str] = {}
    backbone: dict[str, str] = {}
    prefixes = []
    for name in shapes:
        plain = _WRAPPERS.sub("", name)
        if match := _DECODER.match(plain) or _SELECTOR.match(plain):
            prefixes.append(match["prefix"])
            place = _place(match)
            other = top_down.setdefault(place, name)
        elif _COMPUTED.search(plain):
            continue
        else:
            other = backbone.setdefault(plain, name)
        if other != name:
            raise ValueError(
                f"the checkpoint holds one tensor under two names, {other} and {name}; keep one."
            )
    ranks = {shapes[name][0] for (_, _, part), name in top_down.items() if part == "lora_A"}
    if len(ranks) > 1:
        raise ValueError(f"the checkpoint has LoRA factors of different ranks ({sorted(ranks)}); needs one.")
    return Names(top_down, backbone, prefixes[0] if prefixes else "", ranks.pop() if ranks else 0)


def model_names(names: Names, anatomy: Anatomy) -> dict[str, str]:
    """Returns, by name of a backbone's tensor in the model, its name in the checkpoint."""
    # The top-down module stands in the trunk, so what is before it and not the trunk's path is around all.
    around = names.prefix.removesuffix(f"{anatomy.trunk_name}." if anatomy.trunk_name else "")
    renamed = RENAMED.get(anatomy.family.name, str)
    return {renamed(name.removeprefix(around)): held for name, held in names.backbone.items()}


def variant(anatomy: Anatomy, rank: int) -> str:
    """Returns the official variant, a key of `toast.config.OFFICIAL`."""
    return anatomy.family.official + ("-lite" if rank else "")


def check_top_down(source: Checkpoint, names: Names, anatomy: Anatomy) -> None:
    """Checks names and shapes of the top-down module.

    Raises:
        ValueError: If tensors are missing, unexpected or of another shape; it lists them.
    """
    compare(
        "top-down module",
        {_spelled(place): shape for place, shape in _expected(anatomy, names.rank).items()},
        {_spelled(place): source.shapes[name] for place, name in names.top_down.items()},
    )


def _place(match: re.Match[str]) -> Place:
    """Says where an official name belongs: block (None: selector), map, part."""
    found = match.groupdict()
    if "block" in found:
        return int(found["block"]), found["map"], found["part"]
    return None, found["part"], ""


def _spelled(place: Place) -> str:
    block, what, part = place
    return what if block is None else f"decoders.{block}.{what}.{part}"


def _expected(anatomy: Anatomy, rank: int) -> dict[Place, Shape]:
    width = anatomy.width
    shapes: dict[Place, Shape] = {
        (None, "prompt", ""): (width,),
        (None, "top_down_transform", ""): (width, width),
    }
    parts = {"weight": (width, width)} | ({"lora_A": (rank, width), "lora_B": (width, rank)} if rank else {})
    for block in range(len(anatomy.values)):
        shapes |= {
            (block, linear, part): shape for linear in ("linear", "linear2") for part, shape in parts.items()
        }
    return shapes


def compare(what: str, expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    """Compares names and shapes.

    Raises:
        ValueError: If tensors are missing, unexpected or of another shape; it lists them.
    """
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    misshapen = [
        f"{name} is {found[name]}, needs {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    if missing or unexpected or misshapen:
        raise ValueError(
            f"the checkpoint's {what} does not fit the model. Missing: {missing or 'none'}. "
            f"Unexpected: {unexpected or 'none'}. Of another shape: {misshapen or 'none'}."
        )


def _tied(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))


def parameters(wrapped: PeftModel, places: Iterable[Place]) -> dict[Place, nn.Parameter]:
    """Returns the parameters of a wrapped model that belong to places in the official top-down module."""
    steering = find_steering(wrapped)
    assert steering is not None
    return {place: _parameter(steering.selector, steering.values, place) for place in places}


def _parameter(selector: ToastSelector, values: list[ToastValue], place: Place) -> Any:
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
