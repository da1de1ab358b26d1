"""AdaptFormer (Chen et al., arXiv 2205.13535): a bottleneck in parallel to every block's MLP.

PEFT has no adapter of this form: its bottlenecks change a weight (LoRA and kin), and none is a second path
with a non-linearity of its own.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from toast.baselines.added import Added, find_added, remove_added
from toast.families.anatomy import Anatomy, find_anatomy

#: Where the MLP is in a block: the modules that its input enters and that its output leaves, the same or two.
#: `*` stands for every child of a list. The first row that fits the live block is taken.
MLPS = (
    ("mlp", "mlp"),
    ("ffn", "ffn"),
    ("feed_forward", "feed_forward"),
    ("ffns.*.mlp", "ffns.*.mlp"),
    ("fc1", "fc2"),
    ("intermediate", "output.dense"),
)

#: Where the adapters stand in a block.
NAME = "adapters"

_running = threading.local()


class ParallelAdapter(Added):
    """`s · ReLU(x W_down) W_up`, added to what the MLP makes of the same x.

    `W_up` and the biases start at zero, so that the model starts where it was; `W_down` as any linear layer.

    Args:
        width: Channels of a token, `d` in the paper.
        bottleneck: Channels between the two projections.
        scale: `s`.
        dropout: Share of the bottleneck's channels that training drops.
    """

    def __init__(self, width: int, bottleneck: int, scale: float = 0.1, dropout: float = 0.0) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.up = nn.Linear(bottleneck, width)
        self.dropout = nn.Dropout(dropout)
        self.scale = scale
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(parameter)

    @property
    def options(self) -> dict[str, Any]:
        """What `add_adapters` has to be given to make the same again."""
        return {"bottleneck": self.down.out_features, "scale": self.scale, "dropout": self.dropout.p}

    def forward(self, x: Tensor) -> Tensor:
        """Computes the adapter's part, `(..., width)`, in its own precision; returned in that of `x`."""
        hidden = self.dropout(torch.relu(self.down(x.to(self.down.weight.dtype))))
        adapted: Tensor = self.scale * self.up(hidden)
        return adapted.to(x.dtype)

    def stand_beside(self, first: nn.Module, last: nn.Module) -> None:
        """Puts the hooks on an MLP: what enters `first` is adapted and added to what leaves `last`."""
        self.handles = [
            first.register_forward_pre_hook(self.enter),
            last.register_forward_hook(self.leave),
        ]

    def enter(self, mlp: nn.Module, args: tuple[Any, ...]) -> None:
        """Keeps what enters the MLP, for this thread, until the MLP is left."""
        _inputs()[self] = args[0]

    def leave(self, mlp: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        """Adds the adapter's part. Mixtures of experts may return more than the features; that is kept."""
        adapted = self(_inputs().pop(self))
        return (out[0] + adapted, *out[1:]) if isinstance(out, tuple) else out + adapted


def make_adapters(
    model: nn.Module, bottleneck: int = 64, scale: float = 0.1, dropout: float = 0.0
) -> tuple[Anatomy, dict[str, list[ParallelAdapter]]]:
    """Makes the adapters for a model, and leaves the model as it is.

    Returns:
        The model's parts, and by path of the block its adapters: one, or one for each of parallel MLPs.

    Raises:
        ValueError: If no MLP is found, the model has adapters, or an option is out of range.
    """
    if bottleneck < 1:
        raise ValueError(f"bottleneck: needs at least 1 channel; got {bottleneck}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: needs a fraction from 0 to below 1; got {dropout}.")
    anatomy = find_anatomy(model)
    widths = {unit.block: unit.width for unit in anatomy.units}
    made: dict[str, list[ParallelAdapter]] = {}
    for index, path in enumerate(anatomy.blocks):
        block = anatomy.trunk.get_submodule(path)
        if NAME in block._modules:
            raise ValueError(f"{type(model).__name__} has adapters already; remove_adapters removes them.")
        first = next(p for p in block.parameters() if p.is_floating_point())
        made[path] = [
            ParallelAdapter(widths[index], bottleneck, scale, dropout).to(
                first.device, torch.promote_types(first.dtype, torch.float32)
            )
            for _ in _mlps(block, path)
        ]
    return anatomy, made


def attach_adapters(anatomy: Anatomy, made: dict[str, list[ParallelAdapter]]) -> None:
    """Puts adapters into the model that they were made for, and freezes all else."""
    anatomy.trunk.requires_grad_(False)
    for path, adapters in made.items():
        block = anatomy.trunk.get_submodule(path)
        for adapter, (first, last) in zip(adapters, _mlps(block, path), strict=True):
            adapter.stand_beside(first, last)
        block.add_module(NAME, nn.ModuleList(adapters).train(block.training))


def add_adapters(
    model: nn.Module, bottleneck: int = 64, scale: float = 0.1, dropout: float = 0.0
) -> nn.Module:
    """Puts a parallel bottleneck beside every block's MLP, in place.

    Input is what the MLP gets: in pre-norm blocks `LN(x)`, as in the paper's equation, while the authors'
    code takes `x`. What the block does with the MLP's output (layer scale, drop path, a norm behind it), it
    does with the sum. Only the adapters are trained then; `train_only(model, "adapters")` adds the head.

    Args:
        model: A timm or transformers model whose blocks have an MLP (`MLPS`).
        bottleneck: Channels between the projections; the paper's default.
        scale: Factor of the adapter's part; the paper's default.
        dropout: Share of the bottleneck's channels that training drops.

    Returns:
        The same model.

    Raises:
        ValueError: If no MLP is found, the model has adapters, or an option is out of range.
    """
    anatomy, made = make_adapters(model, bottleneck, scale, dropout)
    model.requires_grad_(False)
    attach_adapters(anatomy, made)
    return model


def find_adapters(model: nn.Module) -> list[ParallelAdapter]:
    """Returns the adapters of a model, bottom first."""
    return find_added(model, ParallelAdapter)


def remove_adapters(model: nn.Module) -> nn.Module:
    """Takes the adapters off again; the model then computes what it did, to the bit. It stays frozen.

    Returns:
        The same model.

    Raises:
        ValueError: If it has none.
    """
    remove_added(model, ParallelAdapter, NAME, "no adapters; add_adapters adds some")
    return model


def _inputs() -> dict[ParallelAdapter, Tensor]:
    """Returns what entered the MLPs that run now, in this thread."""
    if not hasattr(_running, "inputs"):
        _running.inputs = {}
    inputs: dict[ParallelAdapter, Tensor] = _running.inputs
    return inputs


def _mlps(block: nn.Module, path: str) -> list[tuple[nn.Module, nn.Module]]:
    """Returns where the MLPs of a block are entered and left."""
    for first, last in MLPS:
        entered, left = _submodules(block, first), _submodules(block, last)
        if entered and left:
            return list(zip(entered, left, strict=True))
    raise ValueError(
        f"adapters need an MLP in every block, at one of {', '.join(dict.fromkeys(row[0] for row in MLPS))}; "
        f"{type(block).__name__} at {path!r} has {', '.join(block._modules)}."
    )


def _submodules(parent: nn.Module, pattern: str) -> list[nn.Module]:
    """Returns the modules that a path stands for; `*` is every child."""
    found = [parent]
    for part in pattern.split("."):
        found = [
            child
            for module in found
            for name, child in module._modules.items()
            if child is not None and part in ("*", name)
        ]
    return found
