"""Where the values lie in the output of the module that makes them, and how a signal is added there.

Shapes: `width` input channels of the projection, `value_width` channels of the values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as _modules

#: Hooks that PyTorch keeps for all modules at once.
_GLOBAL_HOOKS = ("forward_", "backward_", "backward_pre_")

#: Name of a layout -> which output channels are values, from the number of input and of output channels, of
#: key and value heads, and of channels a head: the groups of channels, and the slice of each group.
LAYOUTS: dict[str, Callable[[int, int, int, int], tuple[int, int, int]]] = {
    # a projection of its own
    "separate": lambda width, out, heads, size: (1, 0, out),
    # queries, keys, values, as wide as each other
    "last_third": lambda width, out, heads, size: (1, out - out // 3, out),
    # anything, then values as wide as the input
    "last_width": lambda width, out, heads, size: (1, out - width, out),
    # anything, then as many channels as the value heads have
    "last_heads": lambda width, out, heads, size: (1, out - heads * size, out),
    # for each key and value head: its queries, its key, its value
    "grouped": lambda width, out, heads, size: (heads, out // heads - size, out // heads),
    # four groups of heads, each with its queries, values, keys
    "four_groups_q_v_k": lambda width, out, heads, size: (4, out // 12, out // 6),
    # no values: what is added goes into the input of a module that need not be linear
    "input": lambda width, out, heads, size: (1, 0, out),
}

#: Layouts that ask for the number of heads.
COUNT_HEADS = ("last_heads", "grouped")


@dataclass(frozen=True)
class Layout:
    """The values are the channels `start` to `stop` of each of `groups` groups of output channels.

    Args:
        name: Name of the layout, a key of `LAYOUTS`.
        width: Input channels.
        out: Output channels.
        groups: Number of groups of equal size.
        start: First value channel in a group.
        stop: Last value channel in a group, exclusive.
    """

    name: str
    width: int
    out: int
    groups: int
    start: int
    stop: int

    @property
    def value_width(self) -> int:
        """Channels of the values."""
        return self.groups * (self.stop - self.start)

    @property
    def whole(self) -> bool:
        """Whether all of the output are values."""
        return self.value_width == self.out

    def value_weight(self, projection: Any) -> Tensor | None:
        """Returns `W_V`, `(value_width, width)`; None if the weight does not say what the map computes.

        So it is with wrapped and quantised maps, with weights that are a class of tensor of their own
        (torchao, DTensor), and with one whose weight Accelerate fetches in a `forward` of its own.
        """
        linear = isinstance(projection, nn.Linear) and type(projection).forward is nn.Linear.forward
        if not (linear or is_transposed(projection)) or "forward" in vars(projection):
            return None
        if _is_partitioned(projection) or not is_plain(projection.weight):
            return None
        return self.rows(projection.weight.T if is_transposed(projection) else projection.weight)

    def rows(self, whole: Tensor) -> Tensor:
        """Returns the values' part of a weight, `(out, width)`, or of a bias, `(out,)`."""
        return self._values(whole, dim=0).reshape(self.value_width, *whole.shape[1:])

    def shift(self, out: Tensor, shift: Tensor, fresh: bool) -> Tensor:
        """Adds to the values in the output of a projection.

        Args:
            out: The output, `(batch, tokens, out)`.
            shift: What the values get, `(batch, tokens, value_width)`.
            fresh: Whether nobody else holds on to `out`: adding in place then saves a copy.

        Returns:
            `(batch, tokens, out)`.
        """
        shift = shift.to(out.dtype)
        if self.groups > 1:
            shift = shift.view(*shift.shape[:-1], self.groups, -1)
        if fresh:
            self._values(out).add_(shift)
            return out
        return self._put(out, self._values(out) + shift)

    def steer(self, projection: Any, x: Tensor, signal: Tensor, bias_twice: bool) -> Tensor:
        """Runs a projection so that its values are those of `x + signal`; queries and keys those of `x`.

        Args:
            projection: The projection, which may itself be wrapped or quantised.
            x: Its input, `(batch, tokens, width)`.
            signal: The top-down signal, of the same shape.
            bias_twice: Whether the values get the bias a second time, as in the official ViT code.

        Returns:
            `(batch, tokens, out)`.
        """
        signal = signal.to(x.device, x.dtype)
        if self.whole:
            return _of_sum(projection, x, signal, bias_twice)
        weight = self.value_weight(projection)
        if weight is not None:
            return self.run_and_shift(projection, x, F.linear(signal, weight), bias_twice)
        out: Tensor = projection(x)
        return self._put(out, self._values(_of_sum(projection, x, signal, bias_twice)))

    def run_and_shift(self, projection: Any, x: Tensor, shift: Tensor, bias_twice: bool) -> Tensor:
        """Runs a projection on `x` and adds `shift`, `(batch, tokens, value_width)`, to its values."""
        out: Tensor = projection(x)
        shift = shift.to(out.device)
        bias = getattr(projection, "bias", None)
        if bias_twice and bias is not None:
            shift = shift + self.rows(bias)
        # No backward of a plain linear map needs its output, but a hook may hold on to it.
        fresh = may_write() and self.value_weight(projection) is not None and not _is_hooked(projection)
        return self.shift(out, shift, fresh)

    def _values(self, tensor: Tensor, dim: int = -1) -> Tensor:
        """Returns the values along a dimension of `out` channels; with several groups, one dimension more."""
        if self.groups > 1:
            at = dim % tensor.ndim
            tensor = tensor.view(*tensor.shape[:at], self.groups, -1, *tensor.shape[at + 1 :])
            dim += dim >= 0
        return tensor.narrow(dim, self.start, self.stop - self.start)

    def _put(self, out: Tensor, values: Tensor) -> Tensor:
        """Returns the output with other values, in new memory."""
        if self.groups > 1:
            out = out.view(*out.shape[:-1], self.groups, -1)
        whole = torch.cat([out[..., : self.start], values, out[..., self.stop :]], dim=-1)
        return whole.flatten(-2) if self.groups > 1 else whole


def find_layout(name: str, projection: nn.Module, place: str, heads: int = 1, head_width: int = 1) -> Layout:
    """Returns where the values of one projection lie.

    Args:
        name: A key of `LAYOUTS`.
        projection: The module that makes the values.
        place: Its name in the model, for messages.
        heads: Number of key and value heads, for the layouts that ask for it.
        head_width: Channels of a head, for the same.

    Raises:
        ValueError: If it is no linear map, or its output does not divide as the layout says.
    """
    width, out = _convolution_widths(projection, place) if name == "input" else _widths(projection, place)
    groups, start, stop = LAYOUTS[name](width, out, heads, head_width)
    parts = {"last_third": 3, "four_groups_q_v_k": 12}.get(name, groups)
    if out % parts or not 0 <= start < stop <= out // groups:
        needs = f"{parts} parts" if parts > 1 else f"{heads} heads of {head_width} channels and the rest"
        raise ValueError(f"{place} has {out} outputs, which do not divide into {needs} (layout {name!r}).")
    return Layout(name, width, out, groups, start, stop)


def _widths(projection: nn.Module, place: str) -> tuple[int, int]:
    weight: Any = getattr(projection, "weight", None)
    if weight is None:
        raise ValueError(f"{place} is a {type(projection).__name__} with no weight; needs a linear map.")
    if hasattr(projection, "in_features") and hasattr(projection, "out_features"):
        return int(projection.in_features), int(projection.out_features)  # type: ignore[arg-type]
    if weight.ndim == 2 and is_transposed(projection):
        width, out = weight.shape
        return int(width), int(out)
    raise ValueError(
        f"{place} is a {type(projection).__name__} with a weight of shape {tuple(weight.shape)}; "
        "needs nn.Linear, or Conv1D of transformers."
    )


def _convolution_widths(module: nn.Module, place: str) -> tuple[int, int]:
    layers = convolutions(module)
    if not layers:
        raise ValueError(f"{place} is a {type(module).__name__} without a convolution, which it needs.")
    return layers[0].in_channels, layers[-1].out_channels


def convolutions(module: nn.Module) -> list[nn.Conv2d]:
    """Returns the convolutions of a module in their order."""
    return [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]


def stride(module: nn.Module) -> int:
    """Returns by which factor the convolutions of a module make the grid of tokens coarser."""
    return math.prod(int(layer.stride[0]) for layer in convolutions(module))


def _of_sum(projection: Any, x: Tensor, signal: Tensor, bias_twice: bool) -> Tensor:
    """Returns what a projection makes of `x + signal`, maybe with its bias a second time."""
    if not bias_twice or getattr(projection, "bias", signal) is None:
        return projection(x + signal)  # type: ignore[no-any-return]
    bias = getattr(projection, "bias", None)
    if bias is None or bias.is_meta:  # hidden in a wrapper, or fetched in the `forward`
        return projection(x) + projection(signal)  # type: ignore[no-any-return]
    out: Tensor = projection(x + signal)
    return out + bias.to(out.dtype)  # type: ignore[no-any-return]


def _is_partitioned(projection: nn.Module) -> bool:
    """Whether ZeRO-3 holds the weight sharded now; taking it by its name would gather it for a whole call."""
    status = getattr(projection._parameters.get("weight"), "ds_status", None)
    return status is not None and status.name != "AVAILABLE"


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is an ordinary tensor, or stands for one that is traced: it can be sliced."""
    return type(weight) in (Tensor, nn.Parameter) or type(weight).__name__ == "FakeTensor"


def may_write() -> bool:
    """Whether a product may be written to in place where nobody else holds it.

    The exporter of ONNX that traces loses such writes, and of an exported one ONNX has a slow ScatterND;
    transforms of `torch.func` cannot write what is mapped into what is not.
    """
    if torch.compiler.is_exporting():
        return False
    if torch.compiler.is_compiling():
        return True
    traced: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return not traced and not torch._C._are_functorch_transforms_active()


def _is_hooked(module: nn.Module) -> bool:
    """Whether a hook sees the output of a module, in forward or backward."""
    own = (module._forward_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(own) or any(getattr(_modules, f"_global_{name}hooks") for name in _GLOBAL_HOOKS)


def is_transposed(projection: nn.Module) -> bool:
    """Whether the weight is stored `(in, out)`, as in `Conv1D` of transformers."""
    return type(projection).__name__ == "Conv1D" and hasattr(projection, "nf")


def fresh_weight_like(projection: Any) -> dict[str, Any]:
    """Returns the device and the floating dtype that new parameters beside a projection should have."""
    weight = getattr(projection, "weight", None)
    weight = next(projection.parameters()) if weight is None else weight
    dtype = getattr(projection, "compute_dtype", None) or weight.dtype
    dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
    return {"device": _device(projection, weight), "dtype": dtype}


def _device(projection: Any, weight: Tensor) -> torch.device:
    """Returns where a projection computes, also if Accelerate keeps its weight elsewhere in between."""
    hook: Any = getattr(projection, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        if getattr(each, "offload", False) and each.execution_device is not None:
            return torch.device(each.execution_device)
    return weight.device
