"""What is known of each family of models, as data, and the search for it in a model.

A row says which module is the trunk (the part that runs twice), where its blocks are, which module of a block
makes the values and in which layout, and which norm the selector reads. A model that no row fits is refused
with what was looked for; `ToastConfig(anatomy={...})` passes a row by hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from toast.layouts import LAYOUTS, Layout

#: What a selector can read; explained at `ToastConfig.select_features`.
FEATURES = ("normed", "unnormed", "mixed")


@dataclass(frozen=True)
class Family:
    """One row of knowledge; names are attribute paths.

    Args:
        name: Name of the row.
        trunk: Class of the trunk, `module.Class`; subclasses fit too. Empty: passed by hand.
        blocks: Path of the list of blocks, in the trunk.
        value: Path of the module that makes the values, in a block.
        layout: Where the values lie in that module's output; a key of `LAYOUTS`.
        norm: Path of the final norm, in the trunk.
        methods: Methods of the trunk that run it, and that are steered.
        select_features: What the selector reads, if the configuration does not say.
        official: Which of the official variants its checkpoints are, `vision` or `language`.
    """

    name: str
    trunk: str
    blocks: str
    value: str
    layout: str
    norm: str
    methods: tuple[str, ...] = ("forward",)
    select_features: str = "normed"
    official: str = "language"


def _decoder(name: str, trunk: str) -> Family:
    """A decoder of transformers in Llama's arrangement: separate projections, a norm at the end."""
    return Family(name, trunk, blocks="layers", value="self_attn.v_proj", layout="separate", norm="norm")


FAMILIES: tuple[Family, ...] = (
    Family(
        name="timm-vit",
        trunk="timm.models.vision_transformer.VisionTransformer",
        blocks="blocks",
        value="attn.qkv",
        layout="last_third",
        norm="norm",
        methods=("forward_features", "forward_intermediates"),
        official="vision",
    ),
    _decoder("llama", "transformers.models.llama.modeling_llama.LlamaModel"),
    _decoder("mistral", "transformers.models.mistral.modeling_mistral.MistralModel"),
    _decoder("qwen2", "transformers.models.qwen2.modeling_qwen2.Qwen2Model"),
    _decoder("qwen3", "transformers.models.qwen3.modeling_qwen3.Qwen3Model"),
    _decoder("gemma", "transformers.models.gemma.modeling_gemma.GemmaModel"),
    Family(
        name="gpt2",
        trunk="transformers.models.gpt2.modeling_gpt2.GPT2Model",
        blocks="h",
        value="attn.c_attn",
        layout="last_third",
        norm="ln_f",
    ),
)


@dataclass
class Anatomy:
    """A family row found in a live model.

    Args:
        family: The row.
        trunk_name: Path of the trunk in the model; empty if the model is the trunk.
        trunk: The trunk.
        norm_name: Path of the final norm in the model.
        norm: The final norm, unwrapped.
        value_names: Paths of the value projections in the model, bottom block first.
        values: The value projections, unwrapped.
        width: Channels of the features, the input width of the value projections.
        layout: The layout of the values.
    """

    family: Family
    trunk_name: str
    trunk: nn.Module
    norm_name: str
    norm: nn.Module
    value_names: list[str]
    values: list[nn.Module] = field(repr=False)
    width: int
    layout: Layout

    @property
    def target_modules(self) -> str:
        """Regular expression that matches the norm's and the value projections' names, and no other."""
        prefix = self._path(self.trunk_name, self.family.blocks)
        blocks = re.escape(prefix) + r"\.\d+\." + re.escape(self.family.value)
        return f"{re.escape(self.norm_name)}|{blocks}"

    @staticmethod
    def _path(*parts: str) -> str:
        return ".".join(part for part in parts if part)


def unwrapped(module: nn.Module) -> nn.Module:
    """Returns the module that adapter layers were put around."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def find_anatomy(model: nn.Module, by_hand: dict[str, Any] | None = None) -> Anatomy:
    """Finds the one trunk of a model that TOAST can steer.

    Args:
        model: A timm or transformers model, wrapped already or not.
        by_hand: Fields of a `Family` row, `trunk` then being a path in the model. The path alone chooses
            among several trunks of known families.

    Raises:
        ValueError: If no family fits or the model lacks what the row names. The message says what was
            looked for and what to pass by hand.
    """
    found = list(_trunks(model))
    if by_hand is not None and by_hand.keys() == {"trunk"}:
        found = [place for place in found if place[0] == by_hand["trunk"]]
    elif by_hand is not None:
        row = _row_by_hand(by_hand)
        name = by_hand.get("trunk", "")
        return _read(name, _submodule(model, name, "trunk", row), row)
    if len(found) == 1:
        return _read(*found[0])
    known = ", ".join(row.trunk.rpartition(".")[2] for row in FAMILIES)
    if not found:
        raise ValueError(
            f"{type(model).__name__} holds no trunk that TOAST knows{_at(by_hand)}: looked for one of "
            f"{known}. "
            "For another transformer say by hand where its parts are, for example "
            "ToastConfig(anatomy={'trunk': 'model', 'blocks': 'layers', 'value': 'self_attn.v_proj', "
            f"'norm': 'norm', 'layout': 'separate'}}); layouts are {', '.join(LAYOUTS)}."
        )
    places = ", ".join(f"{name or 'the model'} ({row.name})" for name, _, row in found)
    raise ValueError(
        f"{type(model).__name__} holds several trunks: {places}. Wrap the one to be steered alone, "
        "or name it with ToastConfig(anatomy={'trunk': ...})."
    )


def _at(by_hand: dict[str, Any] | None) -> str:
    return "" if by_hand is None else f" at {by_hand['trunk']!r}"


def _row_by_hand(by_hand: dict[str, Any]) -> Family:
    known = {f.name for f in fields(Family)}
    required = {"blocks", "value", "norm"}
    given = set(by_hand)
    if given - known or required - given:
        raise ValueError(
            f"anatomy: needs {', '.join(sorted(required))} and may have "
            f"{', '.join(sorted(known - required))}; got {', '.join(sorted(given))}."
        )
    for name, allowed in (("layout", tuple(LAYOUTS)), ("select_features", FEATURES)):
        if name in by_hand and by_hand[name] not in allowed:
            raise ValueError(f"anatomy: {name} needs one of {', '.join(allowed)}; got {by_hand[name]!r}.")
    wrong = [name for name, value in by_hand.items() if name != "methods" and not isinstance(value, str)]
    if wrong or isinstance(by_hand.get("methods"), str):
        raise ValueError(
            "anatomy: needs names as text, and 'methods' as a list of them; got "
            f"{', '.join(f'{name}={by_hand[name]!r}' for name in wrong or ['methods'])}."
        )
    options = {"name": "by-hand", "trunk": "", "layout": "separate"} | by_hand
    return Family(**(options | {"methods": tuple(by_hand.get("methods", ("forward",)))}))


def _trunks(model: nn.Module) -> Iterator[tuple[str, nn.Module, Family]]:
    rows = {row.trunk: row for row in FAMILIES}
    for name, module in model.named_modules():
        for ancestor in type(module).__mro__:
            row = rows.get(f"{ancestor.__module__}.{ancestor.__qualname__}")
            if row is not None:
                yield name, module, row
                break


def _read(trunk_name: str, trunk: nn.Module, row: Family) -> Anatomy:
    blocks = _submodule(trunk, row.blocks, "list of blocks", row)
    children = blocks._modules  # `children()` would leave out a block that is used twice
    if not children or not all(name.isdigit() for name in children):
        raise ValueError(
            f"{type(trunk).__name__}.{row.blocks} is no list of blocks (family {row.name}), so there is no "
            f"attention to steer; it holds {', '.join(children) or 'nothing'}."
        )
    norm = unwrapped(_submodule(trunk, row.norm, "final norm", row))
    values = [
        unwrapped(_submodule(block, row.value, f"value projection of block {i}", row))
        for i, block in children.items()
        if block is not None
    ]
    if len({id(value) for value in values}) < len(values):
        raise ValueError(
            f"{type(trunk).__name__} shares one value projection ({row.value}) between blocks, "
            "so a block cannot be steered by itself."
        )
    layout = LAYOUTS[row.layout]
    widths = {layout.widths(value, f"{row.blocks}.{i}.{row.value}") for i, value in enumerate(values)}
    inputs = {width for width, _ in widths}
    if len(inputs) > 1:
        raise ValueError(
            f"{type(trunk).__name__} has blocks of different widths ({', '.join(map(str, sorted(inputs)))}); "
            "the feedback path needs one width."
        )
    for method in row.methods:
        if not callable(getattr(trunk, method, None)):
            raise ValueError(  # noqa: TRY004 - the model is wrong, not the type of an argument
                f"{type(trunk).__name__} has no method {method!r} to steer (family {row.name})."
            )
    path = Anatomy._path
    return Anatomy(
        family=row,
        trunk_name=trunk_name,
        trunk=trunk,
        norm_name=path(trunk_name, row.norm),
        norm=norm,
        value_names=[path(trunk_name, row.blocks, str(i), row.value) for i in range(len(values))],
        values=values,
        width=inputs.pop(),
        layout=layout,
    )


def _submodule(parent: nn.Module, path: str, what: str, row: Family) -> nn.Module:
    try:
        return parent.get_submodule(path)
    except AttributeError:
        raise ValueError(
            f"{type(parent).__name__} has no {what} at {path!r} (family {row.name}); its children are "
            f"{', '.join(name for name, _ in parent.named_children()) or 'none'}. "
            "Pass the right names with ToastConfig(anatomy={'blocks': ..., 'value': ..., 'norm': ...})."
        ) from None
