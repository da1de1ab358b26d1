"""The names and shapes in official checkpoints, and what they mean in plain models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from einops import rearrange
from torch import Tensor

from toast.families.anatomy import Anatomy
from toast.files.shapes import refuse_misfits

Shape = tuple[int, ...]

#: Where a tensor belongs in the official top-down module: block (None: selector), map, part.
Place = tuple[int | None, str, str]

# decoders.N.linear is this project's `to_state`, decoders.N.linear2 its `to_signal`.
_DECODER = re.compile(
    r"(?P<prefix>(.*\.)?)decoders\.(?P<block>\d+)\.(?P<map>linear2?)\.(?P<part>weight|lora_[AB])$"
)
_SELECTOR = re.compile(r"(?P<prefix>(.*\.)?)(?P<part>prompt|top_down_transform)$")
# What data-parallel training, DeepSpeed and torch.compile put before every name.
_WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")
# Tables that old releases of transformers stored and newer ones compute.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$")

# timm's names of a ConvNeXt, and the official ones. timm's `checkpoint_filter_fn` goes the other way; but it
# wants all tensors, and messages need the official names of what is missing.
_CONVNEXT = (
    (r"^stem\.(\d+)\.", r"downsample_layers.0.\1."),
    (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
    (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"\.mlp\.fc(\d)\.", r".pwconv\1."),
    (r"\.mlp\.grn\.weight$", ".grn.gamma"),  # ConvNeXt V2
    (r"\.mlp\.grn\.bias$", ".grn.beta"),
    (r"^head\.norm\.", "norm."),
    (r"^head\.fc\.", "head."),
)

#: By family, patterns in a trunk's names and what stands for them in official names, where they differ.
RENAMED: dict[str, tuple[tuple[str, str], ...]] = {
    "timm-convnext": _CONVNEXT,
    "timm-convnext-head-norm-first": _CONVNEXT,
}


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
    factors = [name for (_, _, part), name in top_down.items() if part.startswith("lora_")]
    for name in factors:
        if len(shapes[name]) != 2:
            raise ValueError(f"the checkpoint's {name} is of shape {shapes[name]}; needs two dimensions.")
    ranks = {shapes[name][0] for name in factors if name.endswith("lora_A")}
    if len(ranks) > 1:
        raise ValueError(f"the checkpoint has LoRA factors of different ranks ({sorted(ranks)}); needs one.")
    return Names(top_down, backbone, prefixes[0] if prefixes else "", ranks.pop() if ranks else 0)


def backbone_names(names: Names, anatomy: Anatomy) -> dict[str, str]:
    """Returns, by official name of a backbone's tensor (see `spelled`), its name in the checkpoint."""
    # The top-down module stands in the trunk, so what is before it and not the trunk's path is around all.
    around = names.prefix.removesuffix(f"{anatomy.trunk_name}." if anatomy.trunk_name else "")
    return {name.removeprefix(around): held for name, held in names.backbone.items()}


def spelled(name: str, anatomy: Anatomy) -> str:
    """Returns the official name of a tensor of the plain model, in the trunk or around it."""
    trunk = f"{anatomy.trunk_name}." if anatomy.trunk_name else ""
    renamed = RENAMED.get(anatomy.family.name, ())
    if not renamed or not name.startswith(trunk):
        return name
    name = name.removeprefix(trunk)
    for pattern, official in renamed:
        name = re.sub(pattern, official, name)
    return trunk + name


def official_shape(name: str, tensor: Tensor, anatomy: Anatomy) -> Shape:
    """Returns the official shape of a tensor of the plain model."""
    shape = tuple(tensor.shape)
    # timm can make a ConvNeXt's linear layers as convolutions of size 1 (`conv_mlp`).
    is_linear = anatomy.family.name in RENAMED and re.search(r"\.mlp\.fc\d\.weight$", name)
    return shape[:2] if is_linear else shape


def variant(anatomy: Anatomy, rank: int) -> str:
    """Returns the official variant, a key of `toast.presets.OFFICIAL`."""
    return anatomy.family.official + ("-lite" if rank else "")


def check_top_down(shapes: Mapping[str, Shape], names: Names, anatomy: Anatomy) -> None:
    """Checks names and shapes of the top-down module.

    Args:
        shapes: Shapes in the checkpoint.
        names: What its names mean.
        anatomy: The model that it has to fit.

    Raises:
        ValueError: If tensors are missing, unexpected or of another shape; it lists them. Also for LoRA
            factors of convolutions.
    """
    if names.rank and _is_convolutional(anatomy):
        raise ValueError(
            f"the checkpoint holds LoRA factors of rank {names.rank} for a {type(anatomy.trunk).__name__}; "
            "no official TOAST-Lite code for ConvNeXt is known, so what they mean is not known either. Load "
            "a full checkpoint, or train TOAST-Lite with ToastConfig.official('convnext-lite')."
        )
    refuse_misfits(
        "the checkpoint's top-down module",
        {_joined(place): shape for place, shape in _expected(anatomy, names.rank).items()},
        {_joined(place): shapes[name] for place, name in names.top_down.items()},
    )


def flattened(tensor: Tensor, place: Place) -> Tensor:
    """Returns a tensor of the official top-down module as this project's linear map has it.

    Args:
        tensor: The tensor; one that is no convolution is returned as it is.
        place: Its place. `linear` is a transposed convolution whose stride is its size, `(in, out, k, k)`:
            each coarse token gives `k` x `k` fine ones. `linear2` is a convolution `(out, in, 1, 1)`.
    """
    if tensor.ndim != 4:
        return tensor
    if place[1] == "linear":
        return rearrange(tensor, "above c sh sw -> (sh sw c) above")
    return tensor.flatten(1)


def _place(match: re.Match[str]) -> Place:
    """Says where an official name belongs."""
    found = match.groupdict()
    if "block" in found:
        return int(found["block"]), found["map"], found["part"]
    return None, found["part"], ""


def _joined(place: Place) -> str:
    block, what, part = place
    return what if block is None else f"decoders.{block}.{what}.{part}"


def _is_convolutional(anatomy: Anatomy) -> bool:
    return anatomy.family.official == "convnext"


def _expected(anatomy: Anatomy, rank: int) -> dict[Place, Shape]:
    shapes: dict[Place, Shape] = {
        (None, "prompt", ""): (anatomy.width,),
        (None, "top_down_transform", ""): (anatomy.width, anatomy.width),
    }
    for unit in anatomy.units:
        for linear, (out, into) in (
            ("linear", unit.to_state_shape),
            ("linear2", (unit.width, unit.width)),
        ):
            weight: Shape = (out, into)
            if _is_convolutional(anatomy):
                size = (unit.scale, unit.scale)
                weight = (unit.above, unit.width, *size) if linear == "linear" else (out, into, 1, 1)
            shapes[unit.number, linear, "weight"] = weight
            if rank:
                shapes[unit.number, linear, "lora_A"] = (rank, into)
                shapes[unit.number, linear, "lora_B"] = (out, rank)
    return shapes
