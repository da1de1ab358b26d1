"""Finds the parts of a live model that a family row names."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from toast.compiled import COMPILED
from toast.families.guessing import Guess, guess
from toast.families.layouts import COUNT_HEADS, LAYOUTS, Layout, find_layout, stride
from toast.families.table import FAMILIES, REFUSED, REFUSED_SIGNS, Family, make_row


@dataclass(frozen=True)
class Unit:
    """One step of the feedback path: a module that makes values, and what comes down to it.

    Args:
        number: Its place in the path, counted from the bottom.
        name: Path of the module in the model.
        path: The same in the trunk.
        block: Its block, counted from 0; a block with several attentions has several units.
        place: Its place among the units of its block.
        layout: Where the values lie in its output.
        above: Channels of the state that comes from the unit above.
        scale: By which factor that state's grid of tokens is coarser than this unit's.
    """

    number: int
    name: str
    path: str
    block: int
    place: int
    layout: Layout
    above: int
    scale: int = 1

    @property
    def width(self) -> int:
        """Channels of what enters the block, and of the signal."""
        return self.layout.width

    @property
    def to_state_shape(self) -> tuple[int, int]:
        """Shape of the weight of `to_state`: each coarse token gives `scale` x `scale` fine ones."""
        return self.scale**2 * self.width, self.above


@dataclass
class Anatomy:
    """A family row found in a live model.

    Args:
        family: The row.
        trunk_name: Path of the trunk in the model; empty if the model is the trunk.
        trunk: The trunk.
        norm_name: Path of the final norm in the model.
        norm: The final norm, unwrapped.
        blocks: Paths of the blocks in the trunk, bottom first.
        units: The units, bottom first.
        values: Their modules, unwrapped.
        width: Channels of the features that the selector reads.
        guessed: Fields of the row, if it came from names and shapes alone, and has to be proved.
    """

    family: Family
    trunk_name: str
    trunk: nn.Module
    norm_name: str
    norm: nn.Module
    blocks: list[str]
    units: list[Unit]
    values: list[nn.Module] = field(repr=False)
    width: int
    guessed: dict[str, Any] | None = None

    @property
    def value_names(self) -> list[str]:
        """Paths of the modules that make the values, in the model, bottom block first."""
        return [unit.name for unit in self.units]

    def from_block(self, first: int) -> Anatomy:
        """Returns the same without the units below a block."""
        kept = [index for index, unit in enumerate(self.units) if unit.block >= first]
        return replace(self, units=[self.units[i] for i in kept], values=[self.values[i] for i in kept])

    @property
    def is_plain(self) -> bool:
        """Whether all blocks have the same tokens and width."""
        return all(unit.scale == 1 and unit.width == unit.above == self.width for unit in self.units)

    @property
    def target_modules(self) -> str:
        """Regular expression that matches the norm's and the value projections' names, and no other."""
        row = self.family
        compiled = any(COMPILED in name for name in (self.norm_name, *self.value_names))
        if row.first_value or self.units[0].number > 0 or compiled:
            return "|".join(map(re.escape, [self.norm_name, *self.value_names]))
        pattern = re.escape(_join(self.trunk_name, row.blocks, "*", row.value)).replace(r"\*", r"\d+")
        return f"{re.escape(self.norm_name)}|{pattern}"


def unwrapped(module: nn.Module) -> nn.Module:
    """Returns the module that adapter layers were put around."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def find_anatomy(model: nn.Module, by_hand: dict[str, Any] | None = None) -> Anatomy:
    """Finds the one trunk of a model that TOAST can steer.

    Of a model that generates text and also sees or hears, it is the language model.

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
        row = make_row(by_hand, what="anatomy")
        name = by_hand.get("trunk", "")
        return read_row(name, _submodule(model, name, "trunk", row), row)
    if len(found) > 1 and _generates(model):
        decoders = [place for place in found if _fitting(*place[1:]).kind == "decoder"]
        found = decoders if len(decoders) == 1 else found
    if len(found) == 1:
        name, trunk, rows = found[0]
        return read_row(name, trunk, _fitting(trunk, rows))
    if not found:
        _refuse_known(model)
        return _guess(model, _at(by_hand))
    places = ", ".join(f"{name or 'the model'} ({rows[0].name})" for name, _, rows in found)
    raise ValueError(
        f"{type(model).__name__} contains several trunks: {places}. Wrap the one to be steered alone, "
        "or name it with ToastConfig(anatomy={'trunk': ...})."
    )


def _guess(model: nn.Module, at: str) -> Anatomy:
    """Reads the row that names and shapes suggest; whoever uses it has to prove it."""
    guessed = guess(model) if not at else Guess(missing={"trunk": "contains no known trunk"})
    if not guessed.missing:
        fields = guessed.fields | {"name": f"guessed for {type(model).__name__}"}
        if _generates(model):
            fields["kind"] = "decoder"
        elif _takes_pictures(model):
            fields["kind"] = "vision"
        row = make_row(fields, what="anatomy")
        trunk = _submodule(model, fields["trunk"], "trunk", row)
        return replace(read_row(fields["trunk"], trunk, row), guessed=fields)
    found = "".join(f" Found: {name}={value!r}." for name, value in guessed.fields.items())
    lacks = "".join(f" Not found: {name} ({why})." for name, why in guessed.missing.items())
    raise ValueError(
        f"{type(model).__name__} contains no trunk that TOAST knows{at} (`toast families` lists those)."
        f"{found}{lacks} Say where its parts are, for example ToastConfig(anatomy={{'trunk': 'model', "
        "'blocks': 'layers', 'value': 'self_attn.v_proj', 'norm': 'norm', 'layout': 'separate'}), or for all "
        f"models of the class with toast.register_family; layouts are {', '.join(LAYOUTS)}."
    )


def _at(by_hand: dict[str, Any] | None) -> str:
    return "" if by_hand is None else f" at {by_hand['trunk']!r}"


def _generates(model: nn.Module) -> bool:
    can_generate = getattr(model, "can_generate", None)
    return bool(callable(can_generate) and can_generate())


def _takes_pictures(model: nn.Module) -> bool:
    """Whether a model of transformers or timm is one of pictures, as it says of itself."""
    return getattr(model, "main_input_name", None) == "pixel_values" or any(
        hasattr(model, name) for name in ("pretrained_cfg", "patch_embed")
    )


def _classes(module: nn.Module) -> list[str]:
    return [f"{ancestor.__module__}.{ancestor.__qualname__}" for ancestor in type(module).__mro__]


def _trunks(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[Family]]]:
    """Yields every trunk of a known class with its rows."""
    rows: dict[str, list[Family]] = defaultdict(list)
    for row in FAMILIES:
        rows[row.trunk].append(row)
    for name, module in model.named_modules():
        for ancestor in _classes(module):
            if ancestor in REFUSED:
                break
            if ancestor in rows:
                yield name, module, rows[ancestor]
                break


def _refuse_known(model: nn.Module) -> None:
    """Refuses a model for the reason that is known."""
    for name, module in model.named_modules():
        for ancestor in _classes(module):
            if ancestor in REFUSED:
                raise ValueError(
                    f"{type(module).__name__}{f' at {name!r}' if name else ''} cannot be steered: "
                    f"{REFUSED[ancestor]}."
                )
        for sign, reason in REFUSED_SIGNS.items():
            if sign in module._modules:
                raise ValueError(f"{type(module).__name__} at {name!r} cannot be steered: {reason}.")


def _fitting(trunk: nn.Module, rows: list[Family]) -> Family:
    """Returns the first row whose parts are there; if none fits, the first, whose error says what lacks."""

    def fits(row: Family) -> bool:
        if not isinstance(_lookup(trunk, row.norm), nn.Module):
            return False
        first = next(iter(_blocks(trunk, row)), None)
        return first is not None and bool(_expand(trunk.get_submodule(first), row.value) or row.first_value)

    return next((row for row in rows if fits(row)), rows[0])


def read_row(trunk_name: str, trunk: nn.Module, row: Family) -> Anatomy:
    """Reads the parts that a row names in a live trunk.

    Args:
        trunk_name: Path of the trunk in the model.
        trunk: The trunk.
        row: The row.

    Raises:
        ValueError: If a part is not there or cannot be steered.
    """
    blocks = _blocks(trunk, row)
    if not blocks:
        holder = _submodule(trunk, row.blocks.partition(".*")[0], "list of blocks", row)
        raise ValueError(
            f"{type(trunk).__name__}.{row.blocks} is not a list of blocks (family {row.name}), so there is "
            f"no attention to steer; it holds {', '.join(holder._modules) or 'nothing'}."
        )
    norm = _submodule(trunk, row.norm, "final norm", row)
    norm_path = next(name for name, module in trunk.named_modules(remove_duplicate=False) if module is norm)
    places = list(_value_places(trunk, row, blocks))
    values = [unwrapped(trunk.get_submodule(place)) for _, place in places]
    if len({id(value) for value in values}) < len(values):
        raise ValueError(
            f"{type(trunk).__name__} shares one value projection ({row.value}) between blocks, "
            "so single blocks cannot be steered."
        )
    for method in row.methods:
        if not callable(getattr(trunk, method, None)):
            raise ValueError(  # noqa: TRY004 - the model is wrong, not the type of an argument
                f"{type(trunk).__name__} has no method {method!r} to steer (family {row.name})."
            )
    units = _units(trunk_name, trunk, row, places, values)
    return Anatomy(
        family=row,
        trunk_name=trunk_name,
        trunk=trunk,
        norm_name=_join(trunk_name, norm_path),
        norm=unwrapped(norm),
        blocks=blocks,
        units=units,
        values=values,
        width=units[-1].above,
    )


def _value_places(trunk: nn.Module, row: Family, blocks: list[str]) -> Iterator[tuple[int, str]]:
    """Yields the modules that make values, bottom first: block, path in the trunk."""
    for index, block in enumerate(blocks):
        if index == 0 and row.first_value:
            _submodule(trunk, row.first_value, "lowest value module", row)
            yield index, row.first_value
            continue
        holder = trunk.get_submodule(block)
        paths = _expand(holder, row.value)
        if not paths:  # the error says what is there
            _submodule(holder, row.value, f"value projection of block {index}", row)
        yield from ((index, _join(block, path)) for path in paths)


def _units(
    trunk_name: str, trunk: nn.Module, row: Family, places: list[tuple[int, str]], values: list[nn.Module]
) -> list[Unit]:
    """Returns the units of the feedback path; what comes down to each is known from the one above."""
    layouts = []
    for (_, place), value in zip(places, values, strict=True):
        counts = [0, 0]
        if row.layout in COUNT_HEADS:
            attention = trunk.get_submodule(place.rpartition(".")[0])
            counts = [_count(attention, path, row) for path in (row.heads, row.head_width)]
        layouts.append(find_layout(row.layout, value, place, *counts))
    widths = [layout.width for layout in layouts]
    if len(set(widths)) > 1 and row.coarsens == 1 and row.layout != "input":
        raise ValueError(
            f"{type(trunk).__name__} has blocks of different widths "
            f"({', '.join(map(str, sorted(set(widths))))}); the feedback path needs one width, or a row "
            "that says by which factor the grid of tokens gets coarser with the width (`coarsens`)."
        )
    units = []
    for index, ((block, place), layout) in enumerate(zip(places, layouts, strict=True)):
        if row.layout == "input":  # what comes down passed through the module itself on its way up
            above, scale = layout.out, stride(values[index])
        else:
            above = widths[min(index + 1, len(widths) - 1)]
            scale = row.coarsens if above != layout.width else 1
        beside = sum(each == block for each, _ in places[:index])
        units.append(Unit(index, _join(trunk_name, place), place, block, beside, layout, above, scale))
    return units


def _count(attention: nn.Module, path: str, row: Family) -> int:
    found = _lookup(attention, path)
    if not isinstance(found, int):
        raise ValueError(  # noqa: TRY004 - the model is wrong, not the type of an argument
            f"{type(attention).__name__} has no number at {path!r}, which layout {row.layout!r} needs "
            f"(family {row.name}). Say with heads= and head_width= which attributes hold the number of key "
            "and value heads and the channels of a head."
        )
    return found


def _blocks(trunk: nn.Module, row: Family) -> list[str]:
    """Returns the paths of the blocks in the trunk, bottom first; none if there is no list of blocks."""
    return _expand(trunk, f"{row.blocks}.*")


def _expand(parent: nn.Module, pattern: str) -> list[str]:
    """Returns the paths that a pattern stands for; a `*` for every child of a list of modules.

    They lead into modules that are compiled one by one, which hold the one that was written.
    """
    paths = [""]
    for part in pattern.split("."):
        longer = []
        for path in paths:
            holder = parent.get_submodule(path)
            while part not in holder._modules and COMPILED in holder._modules:
                path, holder = _join(path, COMPILED), holder.get_submodule(COMPILED)
            # Not by `children()`, which would leave out a block that is used twice.
            children = holder._modules
            if part == "*" and all(name.isdigit() for name in children):
                longer += [_join(path, name) for name, child in children.items() if child is not None]
            elif children.get(part) is not None:
                longer.append(_join(path, part))
        paths = longer
    return paths


def _lookup(parent: Any, path: str) -> Any:
    """Returns what stands at a path; None if nothing does. `-1` is the last of a list."""
    for part in path.split("."):
        if part.startswith("-"):
            children = list(parent.children()) if isinstance(parent, nn.Module) else []
            parent = children[int(part)] if children else None
        else:
            parent = getattr(parent, part, None)
    return parent


def _submodule(parent: nn.Module, path: str, what: str, row: Family) -> nn.Module:
    found = _lookup(parent, path) if path else parent
    if isinstance(found, nn.Module):
        return found
    raise ValueError(
        f"{type(parent).__name__} has no {what} at {path!r} (family {row.name}); its children are "
        f"{', '.join(name for name, _ in parent.named_children()) or 'none'}. "
        "Pass the right names with ToastConfig(anatomy={'blocks': ..., 'value': ..., 'norm': ...})."
    )


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
