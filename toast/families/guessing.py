"""A family row for a model that no row fits, from names and shapes, where these leave no choice.

What is found here is only believed after `toast.probing` has shown it on the live model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

#: Names of value projections, with those of the queries and keys that must stand beside them.
_SEPARATE = {
    "v_proj": ("q_proj", "k_proj"),
    "value": ("query", "key"),
    "to_v": ("to_q", "to_k"),
    "v_lin": ("q_lin", "k_lin"),
    "v": ("q", "k"),
}
#: Names of projections that make queries, keys and values together, mostly in this order.
_FUSED = ("qkv", "Wqkv", "qkv_proj", "query_key_value", "c_attn", "in_proj")


@dataclass
class Guess:
    """What names and shapes say of a model.

    Args:
        fields: Fields of a family row, with `trunk` as a path in the model.
        missing: Fields that could not be found, and why.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def guess(model: nn.Module) -> Guess:
    """Looks for the parts of a transformer of an unknown family."""
    found = Guess()
    lists = [(name, blocks) for name, blocks in _block_lists(model) if _value_paths(blocks)[0]]
    if len(lists) != 1:
        names = ", ".join(f"{name!r}" for name, _ in lists) or "none with attention in its blocks"
        found.missing["blocks"] = f"needs a single list of blocks; candidates are {names}"
        return found
    name, blocks = lists[0]
    _find_value(found, blocks)
    _find_norm(found, model, name, blocks)
    return found


def _block_lists(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the outermost lists of modules of one class."""
    seen: list[str] = []
    for name, module in model.named_modules():
        children = list(module._modules.items())
        alike = len({type(child) for _, child in children}) == 1
        numbered = all(key.isdigit() for key, _ in children)
        inside = any(name.startswith(f"{outer}.") for outer in seen)
        if len(children) > 1 and alike and numbered and not inside:
            seen.append(name)
            yield name, module


def _value_paths(blocks: nn.Module) -> tuple[list[str], list[str]]:
    """Returns the paths, common to all blocks, of value projections, and of fused projections among them."""
    common: set[str] | None = None
    fused: set[str] = set()
    for block in blocks.children():
        here = set()
        for path, module in block.named_modules():
            holder, _, name = path.rpartition(".")
            beside = block.get_submodule(holder)
            if not hasattr(module, "weight") or any(True for _ in module.children()):
                continue
            if name in _SEPARATE and all(hasattr(beside, other) for other in _SEPARATE[name]):
                here.add(path)
            elif name in _FUSED:
                here.add(path)
                fused.add(path)
        common = here if common is None else common & here
    return sorted(common or ()), sorted(fused & (common or set()))


def _find_value(found: Guess, blocks: nn.Module) -> None:
    paths, fused = _value_paths(blocks)
    if len(paths) > 1:
        found.missing["value"] = f"several projections could make the values: {', '.join(paths)}"
        return
    found.fields["value"] = paths[0]
    found.fields["layout"] = "last_third" if fused else "separate"


def _find_norm(found: Guess, model: nn.Module, name: str, blocks: nn.Module) -> None:
    """Finds the trunk: the innermost module around the blocks with one norm behind them."""
    width = _width(blocks, found.fields.get("value"))
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        trunk_name = ".".join(parts[:depth])
        trunk = model.get_submodule(trunk_name)
        children = list(trunk.named_children())
        place = [child for child, _ in children].index(parts[depth])
        norms = [child for child, module in children[place + 1 :] if _is_norm(module, width)]
        if not norms:
            continue
        found.fields |= {"trunk": trunk_name, "blocks": ".".join(parts[depth:])}
        if len(norms) > 1:
            found.missing["norm"] = f"several norms follow the blocks: {', '.join(norms)}"
            return
        found.fields |= {"norm": norms[0], "methods": _methods(trunk)}
        return
    found.fields["blocks"] = name
    found.missing["norm"] = (
        "no norm follows the blocks; if every block ends with one, name the last block's and say "
        "reads='post_norm'"
    )


def _width(blocks: nn.Module, value: str | None) -> int | None:
    projection = None if value is None else next(blocks.children()).get_submodule(value)
    return getattr(projection, "in_features", None)


def _is_norm(module: nn.Module, width: int | None) -> bool:
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and (
        weight is None or width is None or tuple(weight.shape) == (width,)
    )


def _methods(trunk: nn.Module) -> list[str]:
    """Returns how the trunk is run: timm's models and those in its manner have methods without the head."""
    named = [name for name in ("forward_features", "forward_intermediates") if hasattr(trunk, name)]
    return named if "forward_features" in named else ["forward"]
