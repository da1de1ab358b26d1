"""The kinds of official checkpoints: what tells them apart, and what backbone stands under each."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from toast.official.naming import Names, Shape

# What a checkpoint of the top-down module may hold beside it.
_HEAD = {"head.weight", "head.bias"}


@dataclass(frozen=True)
class Sizes:
    """What a backbone is built from; only what shows in names and widths.

    Args:
        blocks: Number of blocks; of a ConvNeXt, of stages.
        width: Channels of the features.
        shapes: Shapes of the backbone's tensors in the checkpoint by official name; empty without it.
        maps: Shapes of the weights `decoders.N.linear`, by number.
    """

    blocks: int
    width: int
    shapes: Mapping[str, Shape]
    maps: Mapping[int, Shape]


@dataclass(frozen=True)
class Kind:
    """A kind of official checkpoint.

    Args:
        name: What it is called.
        marks: Matches, at the start, a name that only backbones of this kind have, once for each block.
        prefix: What stands before the names of the top-down module. If it is something, it tells the kind
            where a checkpoint holds nothing else.
        build: Makes the plain backbone, called on the meta device.
        head: Name of the classifier in the plain backbone, if there is one.
        convolutional: Whether the feedback maps are convolutions, which tells the kind too.
    """

    name: str
    marks: str
    prefix: str
    build: Callable[[Sizes], nn.Module]
    head: str | None = None
    convolutional: bool = False

    def marked(self, names: Names) -> set[str]:
        """Returns what marks the blocks of this kind in the backbone's names, once for each block."""
        return {match[0] for match in (re.match(self.marks, name) for name in names.backbone) if match}


def _vit(sizes: Sizes) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    # The number of heads is in no shape, and in no name.
    return VisionTransformer(  # type: ignore[no-any-return]
        img_size=16, embed_dim=sizes.width, depth=sizes.blocks, num_heads=1, num_classes=_classes(sizes)
    )


def _convnext(sizes: Sizes) -> nn.Module:
    from timm.models.convnext import ConvNeXt

    # The map that leads down through a convolution has the shape of its weight: out, in, size, size.
    steps = {
        stage: sizes.shapes.get(
            f"downsample_layers.{stage}.{min(stage, 1)}.weight", sizes.maps.get(stage, ())
        )
        for stage in range(4)
    }
    steps = {stage: shape for stage, shape in steps.items() if len(shape) == 4}
    # Where one is missing, which is reported later, the step above tells as much.
    dims = [steps[s][0] if s in steps else steps.get(s + 1, (0, sizes.width))[1] for s in range(4)]
    # How many blocks a stage has shows in no name of the adapter.
    return ConvNeXt(  # type: ignore[no-any-return]
        in_chans=steps.get(0, (0, 3))[1], num_classes=_classes(sizes), depths=(1, 1, 1, 1), dims=dims
    )


def _llama(sizes: Sizes) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    values = next((s[0] for n, s in sizes.shapes.items() if n.endswith("v_proj.weight") and s), sizes.width)
    config = LlamaConfig(
        hidden_size=sizes.width, num_hidden_layers=sizes.blocks, num_attention_heads=1,
        num_key_value_heads=1, head_dim=values, intermediate_size=8, vocab_size=8,
    )  # fmt: skip
    return LlamaForCausalLM(config)  # type: ignore[no-any-return]


def _classes(sizes: Sizes) -> int:
    return next(iter(sizes.shapes.get("head.weight", ())), 0)


#: The kinds of checkpoints, one row each.
KINDS: tuple[Kind, ...] = (
    Kind("vision", marks=r"(.*\.)?blocks\.\d+\.attn\.", prefix="", build=_vit, head="head"),
    Kind("language", marks=r"(.*\.)?layers\.\d+\.self_attn\.", prefix="model.", build=_llama),
    Kind(
        "convnext", marks=r"(.*\.)?downsample_layers\.\d+\.", prefix="", build=_convnext, head="head.fc",
        convolutional=True,
    ),
)  # fmt: skip


def find_kind(names: Names, shapes: Mapping[str, Shape], wanted: str | None) -> Kind:
    """Returns the kind that a checkpoint fits, or the one that was asked for.

    Args:
        names: What its names mean.
        shapes: Its shapes.
        wanted: Name of the kind that was asked for.

    Raises:
        ValueError: If it is none, fits none or several, or another than was asked for.
    """
    if not names.top_down:
        raise ValueError(
            "this is not an official TOAST checkpoint: needs prompt, top_down_transform and "
            f"decoders.N.linear; its names begin with {', '.join(sorted(names.backbone)[:6]) or 'nothing'}."
        )
    known = ", ".join(row.name for row in KINDS)
    if wanted is not None and wanted not in {row.name for row in KINDS}:
        raise ValueError(f"kind: needs one of {known}; got {wanted!r}.")
    fitting = [row for row in KINDS if row.marked(names)]
    if not fitting and names.backbone.keys() <= _HEAD:
        alone = _fitting_alone(names, shapes)
        fitting = [row for row in alone if wanted in (None, row.name)] or alone
        if len(fitting) > 1 and wanted is None:
            raise ValueError(
                "the checkpoint holds the top-down module alone, and its names do not show the kind of the "
                f"backbone; give it with kind (--kind), one of {', '.join(row.name for row in fitting)}."
            )
    if len(fitting) != 1 or wanted not in (None, fitting[0].name):
        fits = " and ".join(row.name for row in fitting) or "no kind"
        raise ValueError(
            f"the checkpoint fits {fits}; needed is one of {wanted or known}. Beside the top-down "
            f"module it holds {', '.join(sorted(names.backbone)[:6]) or 'nothing'}."
        )
    return fitting[0]


def _fitting_alone(names: Names, shapes: Mapping[str, Shape]) -> list[Kind]:
    """Returns the kinds that a top-down module without a backbone fits."""
    convolutional = any(len(shapes[held]) == 4 for held in names.top_down.values())
    rows = [row for row in KINDS if row.convolutional == convolutional]
    if names.backbone:
        return [row for row in rows if row.head]
    return [row for row in rows if row.prefix and names.prefix.endswith(row.prefix)] or rows
