"""Which parameters are trained, as named groups."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from toast.baselines.adaptformer import ParallelAdapter
from toast.baselines.attentive import AttentivePool
from toast.baselines.heads import heads_of
from toast.baselines.vpt import Prompts
from toast.families.anatomy import Anatomy, find_anatomy

#: What can be trained. The last three are those of `toast.baselines.vpt`, `.adaptformer` and `.attentive`.
PARTS = ("linear", "full", "partial", "bias", "prompts", "adapters", "probe")

#: What the libraries call biases that stand in no module of their own.
BIASES = (
    "bias", "q_bias", "v_bias", "qkv_bias", "mlp_bias", "in_proj_bias", "gate_up_proj_bias",
    "down_proj_bias",
)  # fmt: skip

#: Modules of a trunk that come after the blocks although they were registered before them.
ABOVE = ("project_out",)

_ADDED: dict[str, type[nn.Module]] = {"prompts": Prompts, "adapters": ParallelAdapter, "probe": AttentivePool}


def train_only(
    model: nn.Module, what: str, *, freeze: int = 0, head: str | Sequence[str] | None = None
) -> dict[str, list[str]]:
    """Trains one part of a model and freezes the rest, in place.

    Args:
        model: A timm or transformers model.
        what: `linear` trains the head alone. `full` trains everything. `partial` freezes the embeddings and
            the first `freeze` blocks, and trains what is above. `bias` trains biases and head (BitFit,
            arXiv 2106.10199). `prompts`, `adapters` and `probe` train what was put in, and the head.
        freeze: Of `partial`: how many blocks stay frozen (of ConvNeXt: stages).
        head: Paths of the modules that are the head; None is what the library says. An empty sequence leaves
            the head frozen, but in `full`.

    Returns:
        Group -> names of its trained parameters. Groups are `embeddings` (what stands before the blocks, the
        vision tower of a language model included), `blocks`, `norm` (the final one), `above` (between blocks
        and head), `bias`, `prompts`, `adapters`, `probe`, `head`; of a model of no known family, `model`.

    Raises:
        ValueError: If `what` is none of these, `freeze` is out of range, the model has nothing of the kind,
            or the head shares its weight with something that is to stay frozen.
    """
    if what not in PARTS:
        raise ValueError(f"what: needs one of {', '.join(PARTS)}; got {what!r}.")
    if freeze and what != "partial":
        raise ValueError(f"freeze: belongs to 'partial', which freezes the first blocks; got {what!r}.")
    names = [name for name, _ in model.named_parameters()]
    heads, left_out = _head_names(model, what, head)
    if what != "full":
        _check_ties(model, heads)
    added = {part: _names_within(model, kind) for part, kind in _ADDED.items()}
    apart = heads.union(left_out, *added.values())
    rest = [name for name in names if name not in apart]
    groups: dict[str, list[str]] = {}
    if what == "bias":
        groups["bias"] = [name for name in rest if name.rpartition(".")[2] in BIASES]
    elif what in _ADDED:
        groups[what] = [name for name in names if name in added[what]]
    elif what == "partial":
        groups = _grouped(rest, model, find_anatomy(model), freeze)
    elif what == "full":
        try:
            groups = _grouped(rest, model, find_anatomy(model), None)
        except ValueError:  # no known family: nothing to tell apart
            groups = {"model": rest}
    if what in ("bias", *_ADDED) and not groups[what]:
        raise ValueError(f"{what}: {type(model).__name__} has none, so the head alone would be trained.")
    groups["head"] = [name for name in names if name in heads]
    groups = {group: members for group, members in groups.items() if members}
    if not groups:
        raise ValueError(f"{what}: trains the head alone, and `head` names none. Leave it at None.")
    trained = {name for members in groups.values() for name in members}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return groups


def _head_names(model: nn.Module, what: str, head: str | Sequence[str] | None) -> tuple[set[str], set[str]]:
    """Returns the head's parameters that are trained, and those that are not to be."""
    if head is not None and len(head) > 0:
        return _parameters_of(heads_of(model, head)), set()
    try:
        known = _parameters_of(heads_of(model))
    except ValueError:
        if what == "full" or head is not None:  # a trunk without a head
            return set(), set()
        raise
    return (known, set()) if head is None or what == "full" else (set(), known)


def _parameters_of(modules: dict[str, nn.Module]) -> set[str]:
    return {f"{path}.{name}" for path, module in modules.items() for name, _ in module.named_parameters()}


def _names_within(model: nn.Module, kind: type[nn.Module]) -> set[str]:
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, kind)
        for name, _ in module.named_parameters()
    }


def _holder(name: str) -> str:
    """Returns the name of the module that holds a parameter, in its own parent."""
    return name.rpartition(".")[0].rpartition(".")[2]


def _grouped(
    names: list[str], model: nn.Module, anatomy: Anatomy, freeze: int | None
) -> dict[str, list[str]]:
    """Returns the groups of what is above the frozen blocks; `freeze=None` freezes nothing.

    A model registers its parts in the order in which it runs them, so what stands before the first block
    makes embeddings, and what stands between two blocks goes with the upper one.
    """
    blocks = [".".join(part for part in (anatomy.trunk_name, path) if part) + "." for path in anatomy.blocks]
    if freeze is not None and not 0 <= freeze <= len(blocks):
        raise ValueError(
            f"freeze: {type(model).__name__} has {len(blocks)} blocks, so needs 0 to {len(blocks)}; "
            f"got {freeze}."
        )
    frozen_below = -1 if freeze is None else freeze
    groups: dict[str, list[str]] = {"embeddings": [], "blocks": [], "norm": [], "above": []}
    reached = 0  # blocks that have begun
    for name in names:
        inside = next((index for index, path in enumerate(blocks) if name.startswith(path)), None)
        if inside is not None:
            reached, group, level = inside + 1, "blocks", inside
        elif name.startswith(f"{anatomy.norm_name}."):
            group, level = "norm", len(blocks)
        elif reached == len(blocks) or _holder(name) in ABOVE:
            group, level = "above", len(blocks)
        elif reached:
            group, level = "blocks", reached
        else:
            group, level = "embeddings", -1
        if level >= frozen_below:
            groups[group].append(name)
    return groups


def _check_ties(model: nn.Module, heads: set[str]) -> None:
    """Refuses a head that would be trained while the frozen rest has the same weight."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for tied in names.values():
        others = [name for name in tied if name not in heads]
        if others and len(others) < len(tied):
            own = next(name for name in tied if name in heads)
            raise ValueError(
                f"head: {own} is the same weight as {', '.join(others)}, which stays frozen. Pass head=() to "
                "leave the head frozen too, train the model in full, or untie them (transformers: load with "
                "tie_word_embeddings=False)."
            )
