"""Official checkpoints as PEFT adapter folders, written without the backbone at hand.

The backbone is built from sizes on the meta device and wrapped there as `toast.wrap` does it anywhere, so the
names and the configuration are the very ones of a saved adapter; the tensors come from the file, one by one.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME, get_peft_model_state_dict
from torch import Tensor, nn

from toast.config import ToastConfig
from toast.families.anatomy import Anatomy, find_anatomy
from toast.files.adapter_folder import WEIGHTS
from toast.files.atomic import named, try_folder
from toast.files.shapes import refuse_misfits
from toast.files.tensors import refuse_values
from toast.injection.fitting import fingerprint
from toast.official.kinds import Kind, Sizes, find_kind
from toast.official.models import Checkpoint, Flattened, naming_file, open_checkpoint, parameters
from toast.official.naming import (
    Names,
    backbone_names,
    check_top_down,
    sort_names,
    spelled,
    variant,
)
from toast.saving.names import without_adapter_name
from toast.wrapping import wrap

_ADAPTER = "default"
_BASE = "base_model.model."

# Names of the safetensors format for what checkpoints are made of.
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Imported:
    """What was written.

    Args:
        folder: The adapter's folder.
        kind: Name of the kind.
        variant: The official variant, as in `ToastConfig.official`.
        blocks: Number of blocks; of a ConvNeXt, of stages.
        width: Channels of the features.
        rank: Rank of the LoRA factors; 0 is full TOAST.
        head: Whether the trained classifier is in it.
        knows_backbone: Whether a few weights of the backbone are kept, so that another one is refused.
        tensors: Number of tensors.
        size: Bytes of the file of tensors.
    """

    folder: Path
    kind: str
    variant: str
    blocks: int
    width: int
    rank: int
    head: bool
    knows_backbone: bool
    tensors: int
    size: int


def import_official(
    source: str | Path | Mapping[str, Tensor],
    out: str | Path,
    head: bool | None = None,
    kind: str | None = None,
) -> Path:
    """Writes an official checkpoint as an adapter folder that `PeftModel.from_pretrained` loads.

    Args:
        source: What `toast.load_official` takes.
        out: The folder. Other files there stay; one that holds an adapter already is refused.
        head: Whether to keep the trained classifier, as `modules_to_save`; None keeps it if it is there.
        kind: `vision`, `language` or `convnext`; needed only for a checkpoint without a backbone and
            telling names or shapes.

    Returns:
        The folder.

    Raises:
        ValueError: If the checkpoint is damaged, fits no kind or lacks tensors, or `out` is taken. Nothing is
            written then.
    """
    return convert(source, out, head, kind).folder


def convert(
    source: str | Path | Mapping[str, Tensor],
    out: str | Path,
    head: bool | None = None,
    kind: str | None = None,
) -> Imported:
    """Does `import_official` and says what was written."""
    out = named(out)
    _refuse_taken(out)
    try_folder(out, "out")
    checkpoint = open_checkpoint(source)
    with naming_file(source):
        return _convert(checkpoint, out, head, kind)


def _convert(checkpoint: Checkpoint, out: Path, head: bool | None, kind: str | None) -> Imported:
    names = sort_names(checkpoint.shapes)
    row = find_kind(names, checkpoint.shapes, kind)
    sizes = _sizes(row, checkpoint, names)
    with torch.device("meta"):
        model = row.build(sizes)
    anatomy = find_anatomy(model)
    check_top_down(checkpoint.shapes, names, anatomy)
    checkpoint = Flattened(checkpoint, names)
    backbone = backbone_names(names, anatomy)
    knows_backbone = bool(row.marked(names))
    if knows_backbone:
        _check_values(checkpoint, backbone, anatomy)
    kept = _head(row, head, model, checkpoint, backbone, anatomy)

    official = variant(anatomy, names.rank)
    options: dict[str, Any] = {"lora_rank": names.rank} if names.rank else {}
    if kept:
        options["modules_to_save"] = [row.head]
    wrapped = wrap(model, ToastConfig.official(official, **options))
    held = {_BASE + name: name_there for name, name_there in kept.items()}
    own = {id(parameter): name for name, parameter in wrapped.named_parameters()}
    for place, parameter in parameters(wrapped, names.top_down).items():
        held[without_adapter_name(own[id(parameter)], _ADAPTER)] = names.top_down[place]
    assert held.keys() == get_peft_model_state_dict(wrapped, save_embedding_layers=False).keys()

    types = _types(checkpoint, held)
    _fill_fingerprint(wrapped, checkpoint, backbone, knows_backbone)
    size = _write(wrapped, checkpoint, held, types, out)
    return Imported(
        folder=out,
        kind=row.name,
        variant=official,
        blocks=sizes.blocks,
        width=sizes.width,
        rank=names.rank,
        head=bool(kept),
        knows_backbone=knows_backbone,
        tensors=len(held),
        size=size,
    )


def _refuse_taken(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; needs a folder for the adapter, new or without an adapter.")
    for name in (CONFIG_NAME, WEIGHTS):
        if (out / name).exists():
            raise ValueError(
                f"{out} holds an adapter already ({name}), which would be lost; choose another folder, or "
                "remove it first."
            )


def _sizes(row: Kind, checkpoint: Checkpoint, names: Names) -> Sizes:
    """Reads the sizes off the checkpoint; what does not go together is found when it is compared."""
    prompt = names.top_down.get((None, "prompt", ""))
    decoders = {block for block, _, _ in names.top_down if block is not None}
    if prompt is None or not decoders or len(checkpoint.shapes[prompt]) != 1:
        raise ValueError(
            "the checkpoint does not show its sizes: needs prompt with one dimension, and decoders.N; got "
            f"{'no prompt' if prompt is None else f'prompt of shape {checkpoint.shapes[prompt]}'} and "
            f"{len(decoders)} decoders."
        )
    around = names.prefix.removesuffix(row.prefix)
    shapes = {name.removeprefix(around): checkpoint.shapes[held] for name, held in names.backbone.items()}
    # Counted: were it the highest number, a stray one would ask for as many blocks.
    blocks = len(row.marked(names)) or len(decoders)
    maps = {
        block: checkpoint.shapes[held]
        for (block, what, part), held in names.top_down.items()
        if block is not None and (what, part) == ("linear", "weight")
    }
    return Sizes(blocks, checkpoint.shapes[prompt][0], shapes, maps)


def _check_values(checkpoint: Checkpoint, backbone: Mapping[str, str], anatomy: Anatomy) -> None:
    """Checks the weights of the modules that make the values, of which some numbers are kept."""
    expected = {}
    for name, value in zip(anatomy.value_names, anatomy.values, strict=True):
        weight, tensor = _weight(value)
        expected[spelled(f"{name}.{weight}", anatomy)] = tuple(tensor.shape)
    ends = {re.sub(r"\d+", "N", name) for name in expected}
    shapes = {name: checkpoint.shapes[held] for name, held in backbone.items()}
    found = {
        name: shape
        for name, shape in shapes.items()
        # A norm beside the convolutions of a ConvNeXt has such a name too.
        if name in expected or (re.sub(r"\d+", "N", name) in ends and len(shape) > 1)
    }
    refuse_misfits("the checkpoint's backbone", expected, found)


def _weight(value: nn.Module) -> tuple[str, nn.Parameter]:
    """Returns the weight of which `fingerprint` keeps some numbers, with its path in the module."""
    return next((name, tensor) for name, tensor in value.named_parameters() if tensor.ndim > 1)


def _head(
    row: Kind,
    wanted: bool | None,
    model: nn.Module,
    checkpoint: Checkpoint,
    backbone: Mapping[str, str],
    anatomy: Anatomy,
) -> dict[str, str]:
    """Returns the names of the classifier that is kept, in the model and in the checkpoint."""
    start = spelled(f"{row.head}.", anatomy)
    found = {name: held for name, held in backbone.items() if row.head and name.startswith(start)}
    if wanted is False or (wanted is None and not found):
        return {}
    if not found:
        raise ValueError("the checkpoint holds no head.weight and head.bias; import it without the head.")
    assert row.head is not None
    own = {
        f"{row.head}.{name}": tensor for name, tensor in model.get_submodule(row.head).state_dict().items()
    }
    expected = {spelled(name, anatomy): tuple(tensor.shape) for name, tensor in own.items()}
    given = {name: checkpoint.shapes[held] for name, held in found.items()}
    refuse_misfits("the checkpoint's head", expected, given)
    return {name: found[spelled(name, anatomy)] for name in own}


def _fill_fingerprint(
    wrapped: PeftModel, checkpoint: Checkpoint, backbone: Mapping[str, str], known: bool
) -> None:
    """Says what the adapter is made for, as far as the checkpoint tells."""
    config: Any = wrapped.peft_config[_ADAPTER]
    assert config.backbone is not None
    if not known:
        del config.backbone["value_width"]
        return
    anatomy = find_anatomy(wrapped.get_base_model())
    empty = []
    for end in (0, -1):
        value: Any = anatomy.values[end]
        path, own = _weight(value)
        holder = value.get_submodule(path.rpartition(".")[0])
        held = backbone[spelled(f"{anatomy.value_names[end]}.{path}", anatomy)]
        holder.weight = nn.Parameter(checkpoint.take(held), requires_grad=False)
        empty.append((holder, own))
    config.backbone = fingerprint(anatomy)
    for holder, own in empty:  # lets go of the file
        holder.weight = own


def _types(checkpoint: Checkpoint, held: Mapping[str, str]) -> dict[str, torch.dtype]:
    """Returns the types of the tensors that are written, by name in the file.

    Raises:
        ValueError: If one is no floating-point type that a model can have.
    """
    types = {name: checkpoint.take(there).dtype for name, there in held.items()}
    for name, dtype in types.items():
        if dtype not in _DTYPES:
            raise ValueError(f"{held[name]} is of type {dtype}; needs one of {', '.join(map(str, _DTYPES))}.")
    for there in held.values():
        refuse_values(checkpoint.where(there), [(there, checkpoint.peek(there))])
    return types


def _write(
    wrapped: PeftModel,
    checkpoint: Checkpoint,
    held: Mapping[str, str],
    types: Mapping[str, torch.dtype],
    out: Path,
) -> int:
    """Writes the folder's files beside it and renames them, and returns the bytes of the tensors' file."""
    config: Any = wrapped.peft_config[_ADAPTER]
    config.inference_mode = True
    mapping = None
    if config.task_type is None:  # as PEFT does when it saves
        base = type(wrapped.get_base_model())
        mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as beside:
        _write_tensors(Path(beside, WEIGHTS), checkpoint, held, types)
        config.save_pretrained(beside, auto_mapping_dict=mapping)
        out.mkdir(exist_ok=True)
        # The configuration comes last: until it is there, nothing loads what is not complete.
        for name in (WEIGHTS, CONFIG_NAME):
            Path(beside, name).replace(out / name)
    return (out / WEIGHTS).stat().st_size


def _write_tensors(
    path: Path, checkpoint: Checkpoint, held: Mapping[str, str], types: Mapping[str, torch.dtype]
) -> None:
    """Writes a safetensors file with one tensor in memory at a time, where the library wants all at once.

    Args:
        path: The file.
        checkpoint: Where the tensors are.
        held: By name in the file, the name in the checkpoint.
        types: By name in the file, the type.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # Wide numbers first, so that each stands at a multiple of its own size.
    order = sorted(held, key=lambda name: (-types[name].itemsize, name))
    end = 0
    for name in order:
        shape = checkpoint.shapes[held[name]]
        start, end = end, end + torch.Size(shape).numel() * types[name].itemsize
        header[name] = {"dtype": _DTYPES[types[name]], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = checkpoint.take(held[name]).detach().cpu().contiguous()
            file.write(tensor.view(torch.uint8).numpy().data)
