"""Where the values lie in the output of the module that makes them, and how a signal is added there.

Shapes: `width` input channels of the projection, `value_width` channels of the values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Layout:
    """The values are the last `1 / parts` of the output channels of a linear map.

    Args:
        name: Name of the layout.
        parts: 1 for a projection of its own; 3 for queries, keys and values fused in this order.
    """

    name: str
    parts: int

    def widths(self, projection: nn.Module, name: str) -> tuple[int, int]:
        """Returns `(width, value_width)` of a projection.

        Raises:
            ValueError: If it is not a linear map, or its output does not divide into `parts`.
        """
        weight: Any = getattr(projection, "weight", None)
        if weight is None:
            raise ValueError(f"{name} is a {type(projection).__name__} with no weight; needs a linear map.")
        if hasattr(projection, "in_features") and hasattr(projection, "out_features"):
            width, out = int(projection.in_features), int(projection.out_features)  # type: ignore[arg-type]
        elif weight.ndim == 2 and is_transposed(projection):
            width, out = weight.shape
        else:
            raise ValueError(
                f"{name} is a {type(projection).__name__} with a weight of shape {tuple(weight.shape)}; "
                "needs nn.Linear, or Conv1D of transformers."
            )
        if out % self.parts or (self.parts > 1 and out < self.parts):
            raise ValueError(f"{name} has {out} outputs, which do not divide into {self.parts} parts.")
        return width, out // self.parts

    def value_weight(self, projection: Any) -> Tensor | None:
        """Returns `W_V`, `(value_width, width)`; None if the weight does not say what the map computes.

        So it is with wrapped and quantised maps, and with one whose weight Accelerate fetches in a `forward`
        of its own.
        """
        linear = isinstance(projection, nn.Linear) and type(projection).forward is nn.Linear.forward
        if not (linear or is_transposed(projection)) or "forward" in vars(projection):
            return None
        weight: Tensor = projection.weight.T if is_transposed(projection) else projection.weight
        return weight[weight.shape[0] - weight.shape[0] // self.parts :]

    def shift(self, projection: Any, x: Tensor, shift: Tensor, bias_twice: bool) -> Tensor:
        """Runs a projection and adds to its values.

        Args:
            projection: The projection.
            x: Its input, `(batch, tokens, width)`.
            shift: What the values get, `(batch, tokens, value_width)`.
            bias_twice: Whether the values get the bias a second time, as in the official ViT code.

        Returns:
            `(batch, tokens, parts * value_width)`.
        """
        out: Tensor = projection(x)
        start = out.shape[-1] - out.shape[-1] // self.parts
        bias = getattr(projection, "bias", None)
        if bias_twice and bias is not None:
            shift = shift + bias[start:]
        if self.value_weight(projection) is None or projection._forward_hooks:
            # Somebody may hold on to this output.
            return torch.cat([out[..., :start], out[..., start:] + shift.to(out.dtype)], dim=-1)
        # The output is fresh and no backward of a plain linear map needs it: adding in place saves a copy.
        out[..., start:] += shift.to(out.dtype)
        return out

    def steer(self, projection: Any, x: Tensor, signal: Tensor, bias_twice: bool) -> Tensor:
        """Runs a projection so that its values are those of `x + signal`; queries and keys those of `x`.

        Args:
            projection: The projection, which may itself be wrapped or quantised.
            x: Its input, `(batch, tokens, width)`.
            signal: The top-down signal, `(batch, tokens, width)`.
            bias_twice: Whether the values get the bias a second time, as in the official ViT code.

        Returns:
            `(batch, tokens, parts * value_width)`.
        """
        signal = signal.to(x.device, x.dtype)
        if self.parts == 1:
            out: Tensor = projection(x + signal)
            bias = getattr(projection, "bias", None)
            return out + bias if bias_twice and bias is not None else out
        weight = self.value_weight(projection)
        if weight is not None:
            return self.shift(projection, x, F.linear(signal, weight), bias_twice)
        out = projection(x)
        start = out.shape[-1] - out.shape[-1] // self.parts
        steered = out + projection(signal) if bias_twice else projection(x + signal)
        return torch.cat([out[..., :start], steered[..., start:]], dim=-1)


def is_transposed(projection: nn.Module) -> bool:
    """Whether the weight is stored `(in, out)`, as in `Conv1D` of transformers."""
    return type(projection).__name__ == "Conv1D" and hasattr(projection, "nf")


def fresh_weight_like(projection: Any) -> dict[str, Any]:
    """Returns the device and the floating dtype that new parameters beside a projection should have."""
    weight = projection.weight
    dtype = getattr(projection, "compute_dtype", None) or weight.dtype
    dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
    return {"device": weight.device, "dtype": dtype}


LAYOUTS = {layout.name: layout for layout in (Layout("separate", 1), Layout("last_third", 3))}
