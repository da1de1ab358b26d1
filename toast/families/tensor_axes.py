"""What the axes of a model's tensors are, as data: which of them is the residual stream, which are heads.

An axis is a name or a product of names in brackets, the outermost first, as in einops: `(3 heads head) width`
is the weight of a projection that makes queries, keys and values of `heads` heads. The same name means the
same channels. Numbers and `_`, which stands for any, are no channels, and nor are axes that are not written.
Linear maps are written `(out, in)`, and their bias has the first axis.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from operator import attrgetter

from torch import nn

from toast.families.anatomy import Anatomy
from toast.families.layouts import is_transposed

Axis = tuple[str, ...]


@dataclass(frozen=True)
class TensorAxes:
    """The axes of the tensors of some families.

    Args:
        families: Names of their rows in `toast.families.table`.
        layers: Name of the lists of layers.
        tensors: By the end of a tensor's name, a regular expression without `.weight` and `.bias`, its axes.
            `{here}` stands for the number that the expression catches, `{below}` for the one before it.
        heads: Path in the trunk of the number of heads, of keys and values where these are fewer.
        answers: Those of the expressions whose tensors turn features into an answer.
    """

    families: tuple[str, ...]
    layers: str
    tensors: dict[str, str]
    heads: str | None = None
    answers: tuple[str, ...] = ()


_STAGE = r"stages\.(\d+)\.blocks\.\d+"

TENSOR_AXES = [
    TensorAxes(
        ("timm-vit",),
        "blocks",
        {
            "cls_token|reg_token|dist_token|pos_embed": "_ _ width",
            r"patch_embed\.(proj|norm)": "width",
            r"norm\d?|norm_pre|fc_norm|ls\d\.gamma": "width",
            r"attn\.qkv": "(3 heads head) width",
            r"attn\.[qk]_norm": "head",
            r"attn\.norm": "(heads head)",
            r"attn\.proj": "width (heads head)",
            r"mlp\.fc1(_g|_x)?": "(_ hidden) width",  # a gated one has two halves, which may be one map
            r"mlp\.norm": "hidden",
            r"mlp\.fc2": "width hidden",
            "head|head_dist": "_ width",
        },
        heads="blocks.0.attn.num_heads",
        answers=("head|head_dist",),
    ),
    TensorAxes(
        ("timm-convnext", "timm-convnext-head-norm-first"),
        "blocks",
        {
            r"stem\.\d": "width0",
            r"stages\.(\d+)\.downsample\.0": "width{below}",
            r"stages\.(\d+)\.downsample\.1": "width{here} width{below}",
            rf"{_STAGE}\.(?:conv_dw|norm|gamma)": "width{here}",
            rf"{_STAGE}\.mlp\.fc1": "hidden{here} width{here}",
            rf"{_STAGE}\.mlp\.grn": "hidden{here}",
            rf"{_STAGE}\.mlp\.fc2": "width{here} hidden{here}",
            r"norm_pre|head\.norm": "width3",
            r"head\.fc": "_ width3",
        },
        answers=(r"head\.fc",),
    ),
    TensorAxes(
        ("vit", "deit"),
        "layers",
        {
            "cls_token|distillation_token|mask_token|position_embeddings": "_ _ width",
            r"patch_embeddings\.projection": "width",
            r"layernorm(_before|_after)?": "width",
            r"attention\.[qkv]_proj": "(heads head) width",
            r"attention\.o_proj": "width (heads head)",
            r"mlp\.fc1": "hidden width",
            r"mlp\.fc2": "width hidden",
            r"pooler\.dense": "pooled width",
            "(cls_|distillation_)?classifier": "_ width",
        },
        heads="config.num_attention_heads",
        answers=(r"pooler\.dense", "(cls_|distillation_)?classifier"),
    ),
    TensorAxes(
        ("llama", "mistral", "qwen2", "qwen3"),
        "layers",
        {
            "embed_tokens": "_ width",
            r"(input_|post_attention_)?(layer)?norm": "width",
            # Rotary embeddings turn channel i of a head with channel i + half.
            r"self_attn\.q_proj": "(heads group 2 pair) width",
            r"self_attn\.[kv]_proj": "(heads 2 pair) width",
            r"self_attn\.[qk]_norm": "(2 pair)",
            r"self_attn\.o_proj": "width (heads group 2 pair)",
            r"mlp\.(gate|up)_proj": "hidden width",
            r"mlp\.down_proj": "width hidden",
            "lm_head|score": "_ width",
        },
        heads="config.num_key_value_heads",
        answers=("lm_head|score",),
    ),
    TensorAxes(
        ("gpt2",),
        "h",
        {
            "wte|wpe": "_ width",
            r"ln_(\d|f)": "width",
            r"attn\.c_attn": "(3 heads head) width",
            r"attn\.c_proj": "width (heads head)",
            r"mlp\.c_fc": "hidden width",
            r"mlp\.c_proj": "width hidden",
            "lm_head|score": "_ width",
        },
        heads="config.num_attention_heads",
        answers=("lm_head|score",),
    ),
]


@dataclass(frozen=True)
class NamedTensor:
    """A tensor of a model with its axes.

    Args:
        tensor: The parameter.
        axes: Of each of its dimensions the names, the outermost first.
        answers: Whether it is one of those that turn features into an answer.
    """

    tensor: nn.Parameter
    axes: tuple[Axis, ...]
    answers: bool


def find_tensor_axes(family: str) -> TensorAxes:
    """Returns the row of a family of `toast.families.table`.

    Raises:
        ValueError: If there is none.
    """
    for row in TENSOR_AXES:
        if family in row.families:
            return row
    known = ", ".join(name for row in TENSOR_AXES for name in row.families)
    raise ValueError(f"the axes of the tensors of {family!r} are not known; they are of {known}.")


def named_tensors(model: nn.Module, row: TensorAxes) -> dict[str, NamedTensor]:
    """Returns all parameters of a model by name, shared ones under each of their names.

    Raises:
        ValueError: If one is none of the row's, or is on no device.
    """
    found = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if tensor.is_meta:
            raise ValueError(f"{name} has no values (device 'meta'); load the model's weights first.")
        owner, _, leaf = name.rpartition(".")
        path = owner if leaf in ("weight", "bias") else name
        for pattern, written in row.tensors.items():
            match = re.search(rf"(?:^|\.)(?:{pattern})$", path)
            if match is None:
                continue
            here = int(match[1]) if "{" in written else 0
            axes = [
                tuple(each.strip("()").split())
                for each in re.findall(r"\([^)]*\)|\S+", written.format(here=here, below=here - 1))
            ]
            if leaf == "weight" and is_transposed(model.get_submodule(owner)):
                axes.reverse()
            axes = (axes + [("_",)] * tensor.ndim)[: tensor.ndim]
            found[name] = NamedTensor(tensor, tuple(axes), pattern in row.answers)
            break
        else:
            raise ValueError(
                f"{type(model).__name__} has a tensor {name!r}, whose axes are not known: a plain model of "
                f"{', '.join(row.families)} has none such. Select weights before adapters are added."
            )
    return found


def channel_counts(anatomy: Anatomy, row: TensorAxes, tensors: dict[str, NamedTensor]) -> dict[str, int]:
    """Returns how many channels each name of a model has: what divides an axis that has one unknown name."""
    counts = {"2": 2, "3": 3}
    if row.heads is not None:
        counts["heads"] = int(attrgetter(row.heads)(anatomy.trunk))
    before = 0
    while len(counts) > before:
        before = len(counts)
        for each in tensors.values():
            for axis, length in zip(each.axes, each.tensor.shape, strict=True):
                unknown = [name for name in axis if name not in counts]
                if len(unknown) == 1 and unknown != ["_"]:
                    counts[unknown[0]] = length // math.prod(counts[name] for name in axis if name in counts)
    return counts


def factors(name: str, axis: Axis, length: int, counts: dict[str, int]) -> list[int]:
    """Returns how an axis of a tensor divides among its names.

    Args:
        name: The tensor's, for the message.
        axis: The axis.
        length: Its length.
        counts: See `channel_counts`.

    Raises:
        ValueError: If it does not, since other tensors have another number of those channels.
    """
    known = math.prod(counts.get(each, 1) for each in axis)
    rest = length // known
    if rest * known != length or (rest != 1 and "_" not in axis):
        sizes = ", ".join(f"{each}={counts.get(each, '?')}" for each in axis if each != "_")
        raise ValueError(f"an axis of {name} has {length} channels, which are not those of {sizes}.")
    return [rest if each == "_" else counts[each] for each in axis]
